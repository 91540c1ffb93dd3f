"""Every number that a user may change, its default, unit, meaning and source. Standard library only.

A `Run` is complete and frozen; impossible combinations are refused when it is built. Fields typed `Curve` hold a
schedule in the notation of configs/notation.py. Everything that is not here is derived from what is here by a formula.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from configs.model import Model
from configs.notation import check_ranges, parse_curve, raise_if, technique
from configs.optim import Optim

Curve = str  # the notation of configs/notation.py
# Where numbers must lie.
RANGES = {
    "[0, inf)": ("seed", "checkpoint_every_steps", "val_every_steps", "final_val_every_steps", "warmup_steps", "lookahead",
                 "sample_tokens", "layers_every_steps"),
    "[1, inf)": ("sequence_tokens", "val_sequence_tokens", "max_document_tokens", "val_tokens", "val_bytes", "steps",
                 "batch_tokens", "micro_tokens", "every_steps"),
    "[256, 65535]": ("bpe_vocab_tokens",),  # at least the bytes, and end-of-text fits uint16
    "[0, 1)": ("weight_average", "lookahead_gamma"),
    "[0, 1]": ("weight_average_start", "weight_average_blend", "lookahead_start", "lookahead_end", "tied_until_frac"),
}


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
    """Continue runs/<name> from its checkpoint, with the same settings but those of run (seed apart), log and
    train.micro_tokens."""
    target_loss_nats: float | None = None
    """Validation loss whose first crossing is recorded (step and training seconds)."""
    stop_at_target: bool = False
    """End the run at that crossing."""
    checkpoint_every_steps: int = 0
    """0: only at the end or when interrupted."""
    dry_run: bool = False
    """Print the plan and stop."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        raise_if(self.stop_at_target and self.target_loss_nats is None,
               "stop_at_target needs --run.target_loss_nats, a validation loss in nats per token")
        raise_if(self.resume and self.dry_run, "resume and dry_run exclude each other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Which tokens the model sees, and on which it is judged."""

    source: Literal["corpus", "shards", "text"] = "corpus"
    """corpus: what every Python brings along; shards: the speedrun's .bin files (FineWeb); text: your UTF-8 files."""
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
    """shards: validation is the first so many tokens (the speedrun's rule)."""
    val_bytes: int = 565_000
    """corpus and text: validation is the first so many bytes of the validation split."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        raise_if(self.source in ("shards", "text") and not self.train_files,
               f"--data.source {self.source} needs --data.train_files")
        raise_if(self.source == "shards" and not self.val_files, "--data.source shards needs --data.val_files")
        raise_if(self.source == "corpus" and bool(self.train_files or self.val_files),
               f"--data.source {self.source} reads no files; did you mean --data.source text or shards?")
        raise_if(self.corpus != "code" and self.source != "corpus",
               f"--data.corpus {self.corpus} has no effect on --data.source {self.source}")
        raise_if(self.source == "shards" and self.tokenizer != "gpt2",
               f"shards hold GPT-2 tokens: --data.tokenizer must be gpt2, got {self.tokenizer}")
        raise_if(self.order == "documents" and self.source == "corpus",
               "--data.order documents needs a source with document starts: shards, or text with several files")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What changes over the steps, each as a curve (notation: configs/notation.py).

    Every curve but momentum multiplies a configured value.
    """

    lr: Curve = technique("0=1 40%=1 100%=0.1", name="lr_cooldown", off="1")
    """Multiplies every group's lr."""
    weight_decay: Curve = "1"
    """Multiplies every group's weight decay, beside the lr that it is coupled to."""
    momentum: Curve | None = technique(None, name="momentum_curve", off=None, needs={"optim.matrix.averaging": "ema"})
    """Momentum of the groups whose rule has one, in place of optim.ROLE.momentum; None: each group's own."""
    batch_tokens: Curve = technique("1", name="batch_growth", off="1")
    """Multiplies train.batch_tokens; rounded to whole sequences."""
    sequence_tokens: Curve = technique("1", name="sequence_growth", off="1")
    """Multiplies data.sequence_tokens."""
    window_tokens: Curve = technique("1", name="window_growth", off="1", needs={"model.window_tokens": 3})
    """Multiplies model.window_tokens."""
    long_window_tokens: Curve = technique("1", name="", off="1", needs={"schedule.window_tokens": "2"})
    """Multiplies model.long_window_tokens."""
    mtp: Curve = "99"
    """How many further tokens model.mtp_weights reach; 1.5: the first whole, and half of the second's weight."""
    prefix_loss: Curve = "1"
    """Multiplies model.prefix_loss."""
    max_document_tokens: Curve = "1"
    """Multiplies data.max_document_tokens."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "momentum", "batch_tokens", "sequence_tokens", "window_tokens",
                     "long_window_tokens", "mtp", "prefix_loss", "max_document_tokens"):
            text = getattr(self, name)
            if text is not None:
                low = min(knot.value for knot in parse_curve(text))
                raise_if(low < 0, f"curve {name} must not be negative, got {text!r}")
        high = max(knot.value for knot in parse_curve(self.momentum or "0"))
        raise_if(high >= 1, f"curve momentum must stay below 1, got {self.momentum!r}")


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
    tied_until_frac: float = technique(0.0, name="tied_start", off=0.0)
    """For this share of the steps the head is the embedding, both trained by the sum of their gradients; then each goes its
    own way, from the same optimizer state (speedrun, 2025: 2/3)."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        raise_if(self.lookahead > 0 and self.lookahead_start >= self.lookahead_end,
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
    layers_every_steps: int = 0
    """Sizes of features, spectra and turns of weights and learned factors of every layer, each so many steps, with the clock
    stopped; 0: never. Spectra take their time: see data/run/diagnostics.py."""
    sample_tokens: int = 96
    """Length of the continuation sampled at the end; 0: none."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)


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
        raise_if(train.batch_tokens != nearest,
               f"train.batch_tokens must be a multiple of data.sequence_tokens ({data.sequence_tokens}), got "
               f"{train.batch_tokens}; nearest: {nearest}")
        raise_if(train.micro_tokens < data.sequence_tokens,
               f"train.micro_tokens must hold one sequence of {data.sequence_tokens} tokens, got {train.micro_tokens}")
        raise_if(self.schedule.window_tokens != "1" and self.model.window_tokens is None,
               "schedule.window_tokens needs --model.window_tokens, the window that it multiplies")
        tied = train.tied_until_frac > 0
        raise_if(tied and (self.optim.embed != self.optim.head or self.model.embed_dtype != "float32"),
               "train.tied_until_frac needs optim.embed and optim.head to be alike, and --model.embed_dtype float32")
        raise_if(tied and (self.model.tied_head or self.model.geometry == "sphere"),
               "train.tied_until_frac unties a head that was the embedding: --model.no_tied_head, geometry euclidean")
        slow = [role.name for role in fields(Optim) if getattr(self.optim, role.name).update_every > 1]
        raise_if(train.lookahead > 0 and bool(slow),
               f"train.lookahead needs every group's update_every to be 1; it is more for {', '.join(slow)}")


def with_settings(config: Any, settings: Mapping[str, object]) -> Any:
    """The dataclass `config` with other values by dotted name: {"model.layers": 4, "optim.matrix": Adam(lr=0.003)}.

    All at once, so that only the result must be possible. Raises ValueError for what is not.
    """
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        head, _, rest = name.partition(".")
        if rest:
            changes.setdefault(head, {})[rest] = value
        else:
            changes[head] = value
    nested = {name.partition(".")[0] for name in settings if "." in name}
    return replace(config, **{name: with_settings(getattr(config, name), value) if name in nested else value
                              for name, value in changes.items()})
