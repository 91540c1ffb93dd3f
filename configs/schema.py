"""Every number that a user may change, its default, unit, meaning and source. Standard library only.

A `Run` is complete and frozen; impossible combinations are refused when it is built. Fields typed `Curve` hold a
schedule in the notation of configs/curve.py. Everything that is not here is derived from what is here by a formula.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from configs.curve import parse_curve
from configs.newton_schulz import check_ns

Curve = str  # the notation of configs/curve.py
RuleName = Literal["steepest", "adam", "normuon", "muon2", "muown", "dion", "dion2",
                   "sm3", "prodigy", "agd", "swan", "shampoo", "soap", "soap_muon"]
NormName = Literal["spectral", "rms_operator", "schatten", "row", "column", "sign", "frobenius"]

# The norms that have a unit beside their plain one.
UNIT_NORMS: dict[str, tuple[NormName, ...]] = {
    "at_least_one": ("spectral",), "match_adam": ("spectral",), "fan_in": ("row", "column", "sign"),
    "rms": ("frobenius", "schatten"),
}

# The fields of a Group that each rule reads, beside those that every rule reads.
EVERY_RULE_READS = frozenset({"rule", "lr", "weight_decay", "decay", "constraint", "rounding", "state_dtype",
                              "clip", "clip_norm", "graft"})
AVERAGE_READS = frozenset({"momentum", "averaging", "nesterov", "averages", "momentum_fast"})
STEEPEST_READS = EVERY_RULE_READS | AVERAGE_READS | {"norm", "unit", "schatten_p", "ns", "ns_steps", "equilibrate"}
RULE_READS: dict[str, frozenset[str]] = {
    "steepest": STEEPEST_READS,
    "adam": EVERY_RULE_READS | {"beta1", "beta2", "eps"},
    "normuon": STEEPEST_READS | {"beta2", "eps", "normalise"},
    "muon2": STEEPEST_READS | {"beta2", "eps"},
    "muown": STEEPEST_READS | {"beta1", "beta2", "eps"},
    "dion": EVERY_RULE_READS | {"momentum", "rank_frac"},
    "dion2": EVERY_RULE_READS | {"momentum", "rank_frac", "ns", "ns_steps"},
    "sm3": EVERY_RULE_READS | AVERAGE_READS,
    "prodigy": EVERY_RULE_READS | {"beta1", "beta2", "eps", "distance_start"},
    "agd": EVERY_RULE_READS,
    "swan": EVERY_RULE_READS | {"whiten_steps"},
    "shampoo": EVERY_RULE_READS | AVERAGE_READS | {"gram_beta", "every_steps", "eps", "sides", "exponent", "root"},
    "soap": EVERY_RULE_READS | {"beta1", "beta2", "eps", "gram_beta", "every_steps"},
    "soap_muon": STEEPEST_READS | {"beta2", "eps", "gram_beta", "every_steps"},
}


def refuse(condition: bool, message: str) -> None:
    """Raise ValueError(message) where `condition` holds."""
    if condition:
        raise ValueError(message)


def _refuse_below(owner: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        refuse(value is not None and not least <= value < math.inf, f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The run as a process: its name, folder, machine and end."""

    name: str = ""
    """Folder under `dir`; empty: the preset's name, numbered if that folder is taken."""
    dir: str = "runs"
    """Where run folders live."""
    seed: int = 1
    """Seeds the initial weights and the data order."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, else Apple's MPS, else the CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for the model and the orthogonalization; auto: on for CUDA alone."""
    resume: bool = False
    """Continue runs/<name> from its checkpoint."""
    target_loss_nats: float | None = None
    """Validation loss whose first crossing is recorded (step and training seconds)."""
    stop_at_target: bool = False
    """End the run at that crossing."""
    checkpoint_every_steps: int = 0
    """0: only at the end or when interrupted."""
    dry_run: bool = False
    """Print the plan and stop."""

    def __post_init__(self) -> None:
        _refuse_below(self, 0, "seed", "checkpoint_every_steps")
        refuse(self.stop_at_target and self.target_loss_nats is None,
               "stop_at_target needs --run.target_loss_nats, a validation loss in nats per token")
        refuse(self.resume and self.dry_run, "resume and dry_run exclude each other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Which tokens the model sees, and on which it is judged."""

    source: Literal["corpus", "shards", "text", "random"] = "corpus"
    """corpus: what every Python brings along; shards: the speedrun's .bin files (FineWeb); text: your UTF-8 files;
    random: uniform tokens, for timing."""
    corpus: Literal["code", "prose"] = "code"
    """code: the source of Python's standard library, 11 MB; prose: Python's language reference in English, 0.5 MB."""
    tokenizer: Literal["bpe", "bytes", "gpt2"] = "bpe"
    """bpe: a small byte-pair encoding trained on the train split; bytes: raw bytes; gpt2: tiktoken's."""
    bpe_vocab_tokens: int = 1024
    """Size of the trained BPE, the end-of-text token apart."""
    train_files: tuple[str, ...] = ()
    """Files or glob patterns, for shards and text."""
    val_files: tuple[str, ...] = ()
    """Files or glob patterns; for text, none means the last 10 % of the training text."""
    order: Literal["contiguous", "shuffled", "documents"] = "shuffled"
    """contiguous: slices of the stream in turn; shuffled: every window once an epoch, in seeded order; documents: rows
    packed with pieces that begin at document starts."""
    sequence_tokens: int = 128
    """Context length in training, unless scheduled."""
    val_sequence_tokens: int | None = None
    """Context length in validation; None: as in training."""
    max_document_tokens: int = 2048
    """order=documents: longer documents are clipped to this many tokens."""
    val_tokens: int = 10_485_760
    """shards and random: validation is the first so many tokens (the speedrun's rule)."""
    val_bytes: int = 565_000
    """corpus and text: validation is the first so many bytes of the validation split."""

    def __post_init__(self) -> None:
        _refuse_below(self, 1, "sequence_tokens", "val_sequence_tokens", "max_document_tokens", "val_tokens", "val_bytes")
        refuse(not 256 <= self.bpe_vocab_tokens <= 65_535,
               f"bpe_vocab_tokens must lie between 256 (the bytes) and 65535 (uint16), got {self.bpe_vocab_tokens}")
        refuse(self.source in ("shards", "text") and not self.train_files,
               f"--data.source {self.source} needs --data.train_files")
        refuse(self.source == "shards" and not self.val_files, "--data.source shards needs --data.val_files")
        refuse(self.source in ("corpus", "random") and bool(self.train_files or self.val_files),
               f"--data.source {self.source} reads no files; did you mean --data.source text or shards?")
        refuse(self.corpus != "code" and self.source != "corpus",
               f"--data.corpus {self.corpus} has no effect on --data.source {self.source}")
        refuse(self.source == "shards" and self.tokenizer != "gpt2",
               f"shards hold GPT-2 tokens: --data.tokenizer must be gpt2, got {self.tokenizer}")
        refuse(self.order == "documents" and self.source in ("corpus", "random"),
               "--data.order documents needs a source with document starts: shards, or text with several files")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The GPT: sizes, and one flag per technique; a technique that is off costs nothing and changes nothing."""

    layers: int = 2
    dim: int = 128
    """Width of the residual stream."""
    head_dim: int = 64
    """dim / head_dim heads."""
    mlp_dim: int | None = None
    """Hidden width of the MLP; None: 4 dim."""
    vocab_multiple: int = 64
    """The vocabulary is padded up to a multiple of this (efficient matrix shapes)."""
    position: Literal["none", "learned", "rotary", "half_rotary"] = "rotary"
    """Learned table (GPT-2), rotary (Su et al. 2021, arXiv 2104.09864), or rotary on half the dimensions."""
    rotary_base: float = 1024.0
    """Longest wavelength of the rotary embedding, over 2 pi."""
    qk_norm: bool = True
    """RMS-normalised queries and keys (Henry et al. 2020, arXiv 2010.04245)."""
    attention_scale: float | None = None
    """Softmax scale; None: 1 / sqrt(head_dim)."""
    activation: Literal["relu2", "gelu", "swiglu"] = "relu2"
    """ReLU squared (So et al. 2021, arXiv 2109.08668), GELU, or SwiGLU (Shazeer 2020, arXiv 2002.05202)."""
    norm_gains: bool = False
    """Learned gains in the RMS norms."""
    biases: bool = False
    """Biases in all linear maps."""
    norm_embedding: bool = True
    """RMS norm right after the token embedding."""
    zero_init_projections: bool = True
    """The maps that write to the stream, and the head, start at zero (muP's advice, Yang et al. 2022, arXiv 2203.03466)."""
    tied_head: bool = False
    """The head is the token embedding, transposed."""
    init_gain: float = 0.33
    """Hidden matrices start with variance init_gain / fan_in (speedrun)."""
    embed_std: float = 1.0
    """Standard deviation of the token embedding's start."""
    softcap: Literal["none", "tanh", "rational", "sigmoid"] = "tanh"
    """Bounded logits: c tanh(z/c) (Gemma 2, 2024, arXiv 2408.00118), c z / sqrt(z^2 + c^2), or the speedrun's
    2c sigmoid(2z/c) - c, which is tanh's function by another kernel."""
    softcap_value: float = 15.0
    """The bound c."""
    x0_skip: bool = False
    """Each block reads lambda_r x + lambda_0 x0, x0 the normed embedding (speedrun, Nov 2024)."""
    smear: bool = False
    """x_t += lambda sigmoid(gate(x_t)) x_{t-1} right after the embedding (speedrun, Sep 2025)."""
    value_embeds: int = 0
    """So many last layers mix a second token embedding into their values (speedrun, Dec 2024)."""
    bigram_buckets: int = 0
    """Rows of a hashed table of (previous, current) token pairs, added to the embedding; 0: none (speedrun, Jan 2026)."""
    window_tokens: int | None = None
    """Sliding-window attention: each token sees so many last tokens; None: all."""
    full_attention_every: int = 0
    """With a window: every so-many-th layer still sees everything; 0: none does."""
    document_mask: bool = False
    """Attention stays within a document."""
    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"
    """Kernel; auto: sdpa, or flex on CUDA where a window or document mask is on."""
    embed_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the token embedding (and of its optimizer state)."""
    loss_chunk_tokens: int = 0
    """Head and loss in chunks of so many tokens, recomputed in the backward pass; 0: all at once."""

    def __post_init__(self) -> None:
        _refuse_below(self, 1, "layers", "dim", "head_dim", "mlp_dim", "vocab_multiple", "window_tokens")
        _refuse_below(self, 0, "value_embeds", "bigram_buckets", "full_attention_every", "loss_chunk_tokens")
        refuse(self.dim % self.head_dim != 0, f"head_dim must divide dim, got {self.head_dim} and {self.dim}")
        refuse(self.position in ("rotary", "half_rotary") and self.head_dim % 4 != 0,
               f"{self.position} needs head_dim divisible by 4, got {self.head_dim}")
        refuse(self.value_embeds > self.layers,
               f"value_embeds must be at most layers ({self.layers}), got {self.value_embeds}")
        refuse(self.full_attention_every > 0 and self.window_tokens is None,
               "full_attention_every has no effect without --model.window_tokens")
        refuse(self.softcap != "none" and self.softcap_value <= 0,
               f"softcap_value must be positive, got {self.softcap_value}")
        refuse(self.attention == "varlen" and not self.document_mask,
               "--model.attention varlen packs documents: it needs --model.document_mask")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """How the tensors of one role are trained. Which fields act depends on the rule: see RULE_READS."""

    rule: RuleName = "adam"
    """steepest: momentum, then the norm's dual (Muon, Signum, Scion's LMOs, normalised SGD); adam: Adam(W); for the others
    see their files in optim/rules."""
    lr: float = 0.01
    """Step length in units of the rule's norm, before the lr curve."""
    weight_decay: float = 0.0
    """Decay per step, before its curve."""
    decay: Literal["decoupled", "independent", "corrected", "cautious", "none"] = "decoupled"
    """W -= lr wd W; W -= wd (lr / peak lr) W; W -= wd lr (lr / peak lr) W (Defazio 2025, arXiv 2506.02285); the first, only
    where update and weight agree in sign (Chen et al. 2025, arXiv 2510.12402); or none."""
    constraint: Literal["none", "hyperball"] = "none"
    """hyperball: each matrix keeps the Frobenius norm that it started with (Wen et al. 2025, MuonH and AdamH)."""
    rounding: Literal["nearest", "stochastic", "remainder"] = "nearest"
    """Of weights stored in bfloat16: to the nearest; up or down by chance, right in the mean; or with the 16 bits that
    rounding drops kept beside them."""
    state_dtype: Literal["same", "float32"] = "same"
    """Memories of bfloat16 weights in bfloat16 too, or in float32."""
    graft: Literal["", "steepest", "adam", "normuon", "muon2", "dion", "dion2", "sm3", "swan", "shampoo", "soap",
                   "soap_muon"] = ""
    """Another rule, whose direction's Frobenius length each tensor's step takes: rule#graft (Agarwal et al. 2020,
    arXiv 2002.11803). It reads the same fields."""
    clip: float = 0.0
    """Before all else each tensor's gradient is projected onto the ball of this radius in clip_norm; 0: it is not."""
    clip_norm: NormName = "frobenius"
    """The ball's norm: frobenius scales the gradient, sign clips its entries, row its rows, spectral its singular values."""
    momentum: float = 0.95
    """Coefficient of the gradient average, unless scheduled."""
    averaging: Literal["ema", "heavy_ball", "none"] = "ema"
    """m <- mu m + (1 - mu) g, m <- mu m + g, or m <- g."""
    nesterov: bool = True
    """Step along the average's next value as the present gradient foresees it."""
    averages: int = 1
    """Step along the mean of so many running averages, their ages 1 / (1 - mu) log-spaced; averaging ema alone."""
    momentum_fast: float = 0.5
    """Coefficient of the youngest of several averages; `momentum` is the oldest's."""
    norm: NormName = "rms_operator"
    """The norm of steepest descent."""
    unit: Literal["plain", "at_least_one", "match_adam", "fan_in", "rms"] = "plain"
    """Length of a step of size 1: the norm's own; spectral x max(1, m/n)^.5 (Jordan); spectral x .2 max(m, n)^.5
    (Moonlight, Liu et al. 2025, arXiv 2502.16982); row, column or sign / inputs (Scion, Pethick et al. 2025,
    arXiv 2502.07529); frobenius at RMS 1, schatten as long as rms_operator."""
    schatten_p: float = 4.0
    """norm schatten: 1 is nuclear, 2 normalised SGD, and towards infinity Muon; by SVD."""
    ns: str = "polar_express"
    """How matrices are orthogonalised: quintic, polar_express, convergent, dion or radii (tables of coefficients), an inline
    table 'a,b,c;a,b,c;...' (configs/newton_schulz.py), or svd: exactly."""
    ns_steps: int = 5
    """Newton-Schulz iterations; a table's last triple repeats."""
    equilibrate: bool = False
    """Rows of the averaged gradient scaled to one length before they are orthogonalised (nanochat's MuonEq)."""
    normalise: Literal["rows", "longer"] = "rows"
    """NorMuon's second moments: of rows (Li et al. 2025, arXiv 2510.05491), or of the slices across the longer side
    (speedrun)."""
    rank_frac: float = 0.25
    """Dion: rank of a step, dion2: rows of a step, each as a share of the matrix's shorter side."""
    beta1: float = 0.8
    """Adam's average of the gradient."""
    beta2: float = 0.95
    """Adam's average of its square."""
    eps: float = 1e-10
    """Adam's floor under the root mean square gradient."""
    gram_beta: float = 0.95
    """Average of the gradients' Gram matrices; 1: their sum (Gupta et al. 2018, arXiv 1802.09568)."""
    every_steps: int = 1
    """Roots (Shampoo) or bases (SOAP) are refreshed every so many updates."""
    sides: Literal["both", "left", "right", "smaller"] = "both"
    """Which Gram matrices Shampoo takes: of rows (left), of columns (right)."""
    exponent: float | None = None
    """Shampoo's power of each; None: -1/4 for two, -1/2 for one."""
    root: Literal["eigh", "newton"] = "eigh"
    """Shampoo's roots: by eigenvectors, or by the coupled Newton iteration (exponents -1/p)."""
    distance_start: float = 1e-6
    """Prodigy's first estimate d0 of the distance to a solution; its steps start as small as lr d0."""
    whiten_steps: int = 10
    """SWAN's Newton-Schulz iterations: of a 256 x 768 Gaussian's singular values 5 leave .66 to 1, 10 all at 1."""

    def __post_init__(self) -> None:
        _refuse_below(self, 0, "lr", "weight_decay", "eps", "clip")
        _refuse_below(self, 1, "ns_steps", "averages", "whiten_steps", "every_steps")
        refuse(not 0 <= self.gram_beta <= 1, f"gram_beta must lie in [0, 1], got {self.gram_beta}")
        refuse(self.exponent is not None and not -1 <= self.exponent < 0,
               f"exponent must lie in [-1, 0), got {self.exponent}")
        check_ns(self.ns)
        refuse(self.graft == self.rule, f"graft must be another rule than {self.rule}")
        refuse(bool(self.graft) and self.rule in ("prodigy", "agd", "muown"),
               f"rule {self.rule} sets its own length: it cannot be grafted")
        refuse(not 0 < self.distance_start < math.inf, f"distance_start must be positive, got {self.distance_start}")
        for name in ("momentum", "momentum_fast", "beta1", "beta2"):
            value = getattr(self, name)
            refuse(not 0 <= value < 1, f"{name} must lie in [0, 1), got {value}")
        having = UNIT_NORMS.get(self.unit, (self.norm,))
        refuse(self.norm not in having, f"unit {self.unit} belongs to norm {' or '.join(having)}, got norm {self.norm}")
        refuse(not 1 <= self.schatten_p < math.inf,
               f"schatten_p must be at least 1 and finite (norm spectral is its limit), got {self.schatten_p}")
        refuse(not 0 < self.rank_frac <= 1, f"rank_frac must lie in (0, 1], got {self.rank_frac}")
        refuse(self.averages > 1 and self.averaging != "ema",
               f"averages {self.averages} belong to averaging ema, got {self.averaging}")
        refuse(self.equilibrate and self.norm not in ("spectral", "rms_operator"),
               f"equilibrate belongs to norm spectral or rms_operator, got norm {self.norm}")


def acting_fields(group: Group) -> frozenset[str]:
    """The fields of a group that its rule, norm and averaging let act."""
    acting = set(RULE_READS[group.rule]) | (RULE_READS[group.graft] if group.graft else set())
    if "norm" in acting and group.norm not in ("spectral", "rms_operator"):
        acting -= {"ns", "ns_steps", "equilibrate"}
    if group.norm == "rms_operator":
        acting -= {"unit"}
    if group.norm != "schatten":
        acting -= {"schatten_p"}
    if group.ns == "svd":
        acting -= {"ns_steps"}
    if not group.clip:
        acting -= {"clip_norm"}
    if "averaging" in acting and group.averaging == "none":
        acting -= AVERAGE_READS - {"averaging"}
    if group.averages == 1:
        acting -= {"momentum_fast"}
    return frozenset(acting)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    """One group per parameter role: the role chooses the norm (Bernstein & Newhouse 2024, arXiv 2409.20325)."""

    matrix: Group = field(default_factory=lambda: Group(rule="steepest", lr=0.03))
    """Hidden matrices of attention and MLP."""
    embed: Group = field(default_factory=lambda: Group(lr=0.3))
    """Token and position embeddings."""
    head: Group = field(default_factory=lambda: Group(lr=0.02))
    """The output matrix."""
    value_embed: Group = field(default_factory=lambda: Group(lr=0.1))
    """Token embeddings mixed into the values."""
    bigram_embed: Group = field(default_factory=lambda: Group(lr=0.1))
    """The hashed bigram table."""
    gate: Group = field(default_factory=lambda: Group(lr=0.02))
    """Small matrices that open and close a technique."""
    gain: Group = field(default_factory=lambda: Group(lr=0.02))
    """Gains of the norms."""
    bias: Group = field(default_factory=lambda: Group(lr=0.02))
    """Biases."""
    scalar: Group = field(default_factory=lambda: Group(lr=0.02))
    """Single learned numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What changes over the steps, each as a curve (notation: configs/curve.py).

    Every curve but momentum multiplies a configured value.
    """

    lr: Curve = "0=1 40%=1 100%=0.1"
    """Multiplies every group's lr."""
    weight_decay: Curve = "1"
    """Multiplies every group's weight decay, beside the lr that it is coupled to."""
    momentum: Curve | None = None
    """Momentum of the groups whose rule has one; None: each group's own."""
    batch_tokens: Curve = "1"
    """Multiplies train.batch_tokens; rounded to whole sequences."""
    sequence_tokens: Curve = "1"
    """Multiplies data.sequence_tokens."""
    window_tokens: Curve = "1"
    """Multiplies model.window_tokens."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "momentum", "batch_tokens", "sequence_tokens", "window_tokens"):
            text = getattr(self, name)
            if text is not None:
                low = min(knot.value for knot in parse_curve(text))
                refuse(low < 0, f"curve {name} must not be negative, got {text!r}")
        high = max(knot.value for knot in parse_curve(self.momentum or "0"))
        refuse(high >= 1, f"curve momentum must stay below 1, got {self.momentum!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """How long, and in what portions."""

    steps: int = 280
    """Optimizer steps."""
    batch_tokens: int = 4096
    """Tokens per optimizer step, over all ranks, unless scheduled."""
    micro_tokens: int = 65_536
    """Most tokens in one forward-backward on one rank: lower it when memory runs out."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """Gradients of the mean over the step's tokens, or of the sum (track 3)."""
    val_every_steps: int = 40
    """0: only at the end."""
    final_val_every_steps: int = 0
    """In the last 10 % of the run, validate every so many steps; 0: as before."""
    warmup_steps: int = 2
    """Untimed steps before the run, undone afterwards, where code is compiled."""
    weight_average: float = 0.0
    """Validate an average of the weights, avg <- beta avg + (1 - beta) W after each step (Polyak & Juditsky 1992), not the
    last weights; 0: off. Training goes on from the last ones."""
    weight_average_start: float = 0.0
    """Share of the steps after which it begins, at the weights of that time."""
    weight_average_blend: float = 1.0
    """Validate blend avg + (1 - blend) W."""

    def __post_init__(self) -> None:
        _refuse_below(self, 1, "steps", "batch_tokens", "micro_tokens")
        _refuse_below(self, 0, "val_every_steps", "final_val_every_steps", "warmup_steps")
        refuse(not 0 <= self.weight_average < 1, f"weight_average must lie in [0, 1), got {self.weight_average}")
        for name in ("weight_average_start", "weight_average_blend"):
            value = getattr(self, name)
            refuse(not 0 <= value <= 1, f"{name} must lie in [0, 1], got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What is written down beside the summary."""

    every_steps: int = 10
    """Training loss and times go to metrics.jsonl every so many steps."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if a wandb key is configured, else off."""
    wandb_project: str = "steepest"
    wandb_tags: tuple[str, ...] = ()
    experiment: str = ""
    """What the seeds of one experiment share, say an ablation's name; reports and wandb group by it."""
    diagnostics: bool = True
    """Per group, at each validation: size of the weights, size and angle of the step."""
    sample_tokens: int = 96
    """Length of the continuation sampled at the end; 0: none."""

    def __post_init__(self) -> None:
        _refuse_below(self, 1, "every_steps")
        _refuse_below(self, 0, "sample_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A complete run: same Run, same tokens, same machine: same losses."""

    preset: str = "tiny"
    """The name it started from; set by the command line."""
    run: Identity = field(default_factory=Identity)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        data, train = self.data, self.train
        nearest = max(1, round(train.batch_tokens / data.sequence_tokens)) * data.sequence_tokens
        refuse(train.batch_tokens != nearest,
               f"train.batch_tokens must be a multiple of data.sequence_tokens ({data.sequence_tokens}), got "
               f"{train.batch_tokens}; nearest: {nearest}")
        refuse(train.micro_tokens < data.sequence_tokens,
               f"train.micro_tokens must hold one sequence of {data.sequence_tokens} tokens, got {train.micro_tokens}")
        refuse(self.schedule.window_tokens != "1" and self.model.window_tokens is None,
               "schedule.window_tokens needs --model.window_tokens, the window that it multiplies")
