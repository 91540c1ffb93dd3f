"""Every number that a user may change, its default, unit, meaning and source. Standard library only.

A `Run` is complete and frozen; impossible combinations are refused when it is built. Fields typed `Curve` hold a
schedule in the notation of configs/curve.py. Everything that is not here is derived from what is here by a formula.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from configs.curve import parse_curve
from configs.groups import Optim
from configs.refuse import refuse, refuse_below

Curve = str  # the notation of configs/curve.py

# The sphere has norms everywhere and gains nowhere, and a zero vector has no direction.
SPHERE_NEEDS = {"zero_init_projections": False, "norm_gains": False, "biases": False, "tied_head": False, "qk_norm": True,
                "norm_embedding": True}


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
        refuse_below(self, 0, "seed", "checkpoint_every_steps")
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
        refuse_below(self, 1, "sequence_tokens", "val_sequence_tokens", "max_document_tokens", "val_tokens", "val_bytes")
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
    geometry: Literal["euclidean", "sphere"] = "euclidean"
    """sphere: vectors of the stream have length 1 and layers move them along it (nGPT, Loshchilov et al. 2024,
    arXiv 2410.01131); it belongs to the constraint sphere of the matrices, embeddings and head. attention_scale None is then
    sqrt(head_dim)."""
    eigen_lr: float = 0.05
    """On the sphere: the share of the way to a layer's suggestion that its step goes at the start; the paper's, for 24 and
    36 layers, about 1 / layers."""
    logit_scale: float = 1.0
    """On the sphere: the factor of the cosines that are the logits, at the start."""
    fused: Literal["auto", "off"] = "auto"
    """Loss, and linear map + ReLU^2, by fused Triton kernels; auto: where the device has them (CUDA, bfloat16 activations).
    With loss_chunk_tokens the head's product is inside the loss, and nothing is recomputed."""
    fp8: Literal["none", "head", "head_mlp"] = "none"
    """Training's matrix products in 8-bit floats: the head's, forward and backward, or also the MLP's, forward only
    (speedrun, 2025 and 2026); compute capability 8.9 or later."""
    fp8_scales: Literal["static", "dynamic", "delayed"] = "dynamic"
    """8-bit numbers are scaled for entries up to fp8_x_max and fp8_weight_max; up to the tensor's greatest; or up to the
    previous pass's greatest times the headroom."""
    fp8_x_max: float = 100.0
    """Static scales: the greatest entry of a map's input (the speedrun's, of the head)."""
    fp8_weight_max: float = 1.6
    """Static scales: the greatest weight (the speedrun's, of the head)."""
    fp8_grad_max: float = 0.0
    """The greatest gradient by a logit, the loss's factor included: .75 in the speedrun, over the step's tokens where
    train.loss_reduction is mean; 0: measured at each call."""
    fp8_x_headroom: float = 1.8
    """Delayed scales: room for the next input, over the last one's greatest entry (speedrun, 2026)."""
    fp8_weight_headroom: float = 1.12
    """Delayed scales: the same for the weights (speedrun, 2026)."""

    def __post_init__(self) -> None:
        refuse_below(self, 1, "layers", "dim", "head_dim", "mlp_dim", "vocab_multiple", "window_tokens")
        refuse_below(self, 0, "value_embeds", "bigram_buckets", "full_attention_every", "loss_chunk_tokens")
        refuse(self.dim % self.head_dim != 0, f"head_dim must divide dim, got {self.head_dim} and {self.dim}")
        refuse(self.position in ("rotary", "half_rotary") and self.head_dim % 4 != 0,
               f"{self.position} needs head_dim divisible by 4, got {self.head_dim}")
        refuse(self.value_embeds > self.layers,
               f"value_embeds must be at most layers ({self.layers}), got {self.value_embeds}")
        refuse(self.full_attention_every > 0 and self.window_tokens is None,
               "full_attention_every has no effect without --model.window_tokens")
        refuse(self.softcap != "none" and self.softcap_value <= 0,
               f"softcap_value must be positive, got {self.softcap_value}")
        refuse(not 0 < self.eigen_lr <= 1, f"eigen_lr must lie in (0, 1], got {self.eigen_lr}")
        refuse(not 0 < self.logit_scale < math.inf, f"logit_scale must be positive, got {self.logit_scale}")
        for name, wanted in SPHERE_NEEDS.items():
            refuse(self.geometry == "sphere" and getattr(self, name) != wanted,
                   f"geometry sphere needs --model.{'' if wanted else 'no_'}{name}")
        refuse(self.attention == "varlen" and not self.document_mask,
               "--model.attention varlen packs documents: it needs --model.document_mask")
        self._refuse_fp8()

    def _refuse_fp8(self) -> None:
        """8-bit products: what they cannot be, and sizes that the hardware's tiles cannot hold."""
        refuse_below(self, 0, "fp8_grad_max")
        refuse_below(self, 1, "fp8_x_headroom", "fp8_weight_headroom")
        for name in ("fp8_x_max", "fp8_weight_max"):
            refuse(not 0 < getattr(self, name) < math.inf, f"{name} must be positive, got {getattr(self, name)}")
        refuse(self.fp8 == "none" and self.fp8_scales != "dynamic",
               f"fp8_scales {self.fp8_scales} has no effect without --model.fp8 head or head_mlp")
        if self.fp8 == "none":
            return
        refuse(self.tied_head, f"fp8 {self.fp8} needs a head of its own: --model.no_tied_head")
        refuse(self.geometry == "sphere", f"fp8 {self.fp8} belongs to geometry euclidean, got {self.geometry}")
        refuse(self.fp8_scales == "delayed" and self.loss_chunk_tokens > 0,
               "fp8_scales delayed would move between a chunk and its recomputation; use static or dynamic, or "
               "--model.loss_chunk_tokens 0")
        for name in ("dim", "mlp_dim", "vocab_multiple"):
            size = getattr(self, name) or 16
            refuse(size % 16 != 0,
                   f"fp8 {self.fp8} needs {name} divisible by 16, got {size}; nearest: {max(1, round(size / 16)) * 16}")


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
    lookahead: float = 0.0
    """Take gradients b times the weights' mean movement ahead of them and step from there, b being so much times the lr
    curve (EMA-Nesterov, arXiv 2605.25395; speedrun track 3: .6 on Muon, .3 on SOAP-Muon); 0: off."""
    lookahead_gamma: float = 0.99
    """The mean movement is d <- gamma d + (1 - gamma) (the step's movement)."""
    lookahead_start: float = 0.1
    """Share of the steps before the first that looks ahead (track 3: .1 to .16)."""
    lookahead_end: float = 0.7
    """Share of the steps after which none does (track 3: .65 to .76)."""

    def __post_init__(self) -> None:
        refuse_below(self, 1, "steps", "batch_tokens", "micro_tokens")
        refuse_below(self, 0, "val_every_steps", "final_val_every_steps", "warmup_steps")
        refuse_below(self, 0, "lookahead")
        for name in ("weight_average", "lookahead_gamma"):
            refuse(not 0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("weight_average_start", "weight_average_blend", "lookahead_start", "lookahead_end"):
            value = getattr(self, name)
            refuse(not 0 <= value <= 1, f"{name} must lie in [0, 1], got {value}")
        refuse(self.lookahead > 0 and self.lookahead_start >= self.lookahead_end,
               f"lookahead_start must be less than lookahead_end ({self.lookahead_end}), got {self.lookahead_start}")


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
        refuse_below(self, 1, "every_steps")
        refuse_below(self, 0, "sample_tokens")


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
        slow = [role.name for role in fields(Optim) if getattr(self.optim, role.name).update_every > 1]
        refuse(train.lookahead > 0 and bool(slow),
               f"train.lookahead needs every group's update_every to be 1; it is more for {', '.join(slow)}")
