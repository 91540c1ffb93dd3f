"""The schema of a run: every setting that a user may change, with default, unit, meaning and source.

A `Run` is frozen and complete: all other numbers follow from it by formulas. Building one raises ValueError for settings
that exclude each other. Fields of type `Curve` hold a schedule in the notation of configs/notation.py. The docstring of each
field is its text in `--help`. Imports the standard library only, so that the command line answers before torch is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from configs.model import Model
from configs.notation import check_ranges, parse_curve, raise_if, technique
from configs.optim import Optim

Curve = str  # the notation of configs/notation.py
# The interval of each numeric field, for `check_ranges`.
RANGES = {
    "[0, inf)": ("seed", "checkpoint_every_steps", "val_every_steps", "final_val_every_steps", "warmup_steps", "lookahead",
                 "sample_tokens", "layers_every_steps"),
    "[1, inf)": ("sequence_tokens", "val_sequence_tokens", "max_document_tokens", "val_tokens", "val_bytes", "steps",
                 "batch_tokens", "micro_tokens", "val_long_window_tokens", "every_steps"),
    "[256, 65535]": ("bpe_vocab_tokens",),  # one token per byte at least; with end-of-text, token numbers fit uint16
    "[0, 1)": ("weight_average", "lookahead_gamma"),
    "[0, 1]": ("weight_average_start", "weight_average_blend", "lookahead_start", "lookahead_end", "tied_until_frac"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Settings of the run as a process: name, folder, seed, device, checkpoints and target."""

    name: str = ""
    """Name of the run's folder in `dir`. Empty: the preset's name, with a number appended if that folder exists."""
    dir: str = "runs"
    """Folder that holds the run folders."""
    seed: int = 1
    """Seed of the initial weights and of the order of the training data."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Device to train on. auto: CUDA if there is a GPU, else MPS (Apple), else the CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile for the model and the optimizer's updates. auto: on for CUDA, off elsewhere."""
    combo_kernels: bool = True
    """On CUDA, let torch.compile join small independent kernels into one launch, which is experimental in PyTorch."""
    resume: bool = False
    """Continue the run `name` from its checkpoint. Settings must be those of the checkpoint, except log, train.micro_tokens
    and all of run but the seed."""
    target_loss_nats: float | None = None
    """Validation loss, in nats per token, whose first crossing is recorded with its step and training seconds. None: no
    target."""
    stop_at_target: bool = False
    """End the run when the validation loss reaches target_loss_nats."""
    checkpoint_every_steps: int = 0
    """Number of steps between checkpoints. 0: only at the end of the run or when it is interrupted."""
    final_checkpoint: bool = True
    """Write a checkpoint at the end of the run, which samples, exports and evaluations read: weights and optimizer state,
    8.6 GB for speedrun. An interrupted run always writes one."""
    dry_run: bool = False
    """Print the plan of the run and exit without training. Works without the data too: it then says what is missing."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        raise_if(self.stop_at_target and self.target_loss_nats is None,
                 "stop_at_target needs --run.target_loss_nats, a validation loss in nats per token")
        raise_if(self.resume and self.dry_run, "--run.resume and --run.dry_run exclude each other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Training and validation data: source, tokenizer, order and context length."""

    source: Literal["corpus", "shards", "text"] = "corpus"
    """Source of the tokens. corpus: text that every Python installation contains; shards: .bin files of GPT-2 tokens, such
    as the speedrun's FineWeb; text: your own UTF-8 files."""
    corpus: Literal["code", "prose"] = "code"
    """Text that source corpus reads. code: Python's standard library, 11 MB; prose: Python's language reference, English,
    0.5 MB."""
    tokenizer: Literal["bpe", "bytes", "gpt2"] = "bpe"
    """Tokenizer. bpe: a small byte-pair encoding trained on the training split; bytes: one token per byte; gpt2:
    tiktoken's."""
    bpe_vocab_tokens: int = 1024
    """Size of the vocabulary of tokenizer bpe, in tokens, without the end-of-text token."""
    train_files: tuple[str, ...] = ()
    """Training files or glob patterns, for sources shards and text."""
    val_files: tuple[str, ...] = ()
    """Validation files or glob patterns. Empty, for source text: the last 10 % of the training text."""
    order: Literal["contiguous", "shuffled", "documents"] = "shuffled"
    """Order of the training data. contiguous: consecutive slices of the token stream; shuffled: every window once per epoch,
    in an order that depends on the seed; documents: rows packed with pieces that begin at document starts."""
    sequence_tokens: int = 128
    """Context length in training, in tokens, before schedule.sequence_tokens."""
    val_sequence_tokens: int | None = None
    """Context length in validation, in tokens (speedrun: 262,144). None: sequence_tokens."""
    max_document_tokens: int = 2048
    """Largest number of tokens of a document where order is documents; longer documents are clipped."""
    val_tokens: int = 10_485_760
    """Number of validation tokens of source shards, from the start of the validation files (the speedrun's rule)."""
    val_bytes: int = 565_000
    """Number of validation bytes of sources corpus and text, from the start of the validation split."""

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
    """Schedules: quantities that change over the steps, each as a curve such as `0=1 40%=1 100%=0.1`.

    All curves are factors of a configured value, except momentum and mtp, which are values. Notation: configs/notation.py.
    """

    lr: Curve = technique("0=1 40%=1 100%=0.1", name="lr_cooldown", off="1")
    """Factor of the learning rate of every group. `0=1 40%=1 100%=0.1`: constant for 40 % of the run, then linear to a
    tenth."""
    weight_decay: Curve = "1"
    """Factor of the weight decay of every group, in addition to the learning rate that multiplies the decay."""
    momentum: Curve | None = technique(None, name="momentum_curve", off=None, needs={"optim.matrix.averaging": "ema"})
    """Momentum of every group whose rule has one, in place of optim.ROLE.momentum. None: each group keeps its own."""
    batch_tokens: Curve = technique("1", name="batch_growth", off="1")
    """Factor of train.batch_tokens; the result is rounded to whole sequences."""
    sequence_tokens: Curve = technique("1", name="sequence_growth", off="1")
    """Factor of data.sequence_tokens."""
    window_tokens: Curve = technique("1", name="window_growth", off="1", needs={"model.window_tokens": 3})
    """Factor of model.window_tokens."""
    long_window_tokens: Curve = technique("1", name="", off="1", needs={"schedule.window_tokens": "2"})
    """Factor of model.long_window_tokens."""
    mtp: Curve = "99"
    """Number of the weights in model.mtp_weights that act. 1.5: the first weight, and half of the second. 99: all of
    them."""
    prefix_loss: Curve = "1"
    """Factor of model.prefix_loss."""
    max_document_tokens: Curve = "1"
    """Factor of data.max_document_tokens."""

    def __post_init__(self) -> None:
        for curve in fields(self):
            text = getattr(self, curve.name)
            if text is not None:
                # A curve lies between the values of its knots, so that it is enough to check these.
                lowest = min(knot.value for knot in parse_curve(text))
                raise_if(lowest < 0, f"schedule.{curve.name} must not be negative, got {text!r}")
        highest = max(knot.value for knot in parse_curve(self.momentum or "0"))
        raise_if(highest >= 1, f"schedule.momentum must stay below 1, got {self.momentum!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """Training: number of steps, batch size, validation, and averages of the weights."""

    steps: int = 280
    """Number of optimizer steps."""
    batch_tokens: int = 4096
    """Number of tokens per optimizer step, over all ranks, before schedule.batch_tokens."""
    micro_tokens: int | None = 65_536
    """Largest number of tokens in one forward and backward pass on one rank. Lower it when memory runs out: gradients are
    then accumulated over more passes. None: as many as fit into the free memory of the GPU (data/run/memory.py)."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """Reduction of the loss over the tokens of a step, before gradients are taken: mean, or sum (speedrun track 3)."""
    val_every_steps: int = 40
    """Number of steps between validations. 0: only at the end."""
    final_val_every_steps: int = 0
    """Number of steps between validations in the last 10 % of the run. 0: val_every_steps."""
    val_long_window_tokens: int | None = technique(None, name="", off=None, needs={"model.long_window_tokens": 4})
    """Long attention window of the validation after the last step; YaRN stays at the last of its windows (speedrun: 2560
    after 1664 in training). None: the long window of that step."""
    warmup_steps: int = 2
    """Number of untimed steps before a compiled run, so that compilation is not timed; their changes are undone."""
    weight_average: float = 0.0
    """Coefficient beta of an average of the weights, avg <- beta avg + (1 - beta) W after each step (Polyak & Juditsky
    1992). Validation uses the average, training continues from W. 0: off."""
    weight_average_start: float = 0.0
    """Share of the steps after which the average starts, from the weights of that step."""
    weight_average_blend: float = 1.0
    """Share of the average in the validated weights, blend avg + (1 - blend) W, of roles without average_blend."""
    lookahead: float = 0.0
    """Factor b of EMA-Nesterov, times the lr curve: gradients are taken at the weights plus b times their mean movement, and
    the step starts there (arXiv 2605.25395; speedrun track 3: 0.6 for Muon, 0.3 for SOAP-Muon). 0: off."""
    lookahead_gamma: float = 0.99
    """Coefficient gamma of the mean movement, d <- gamma d + (1 - gamma) (movement of this step)."""
    lookahead_start: float = 0.1
    """Share of the steps after which lookahead starts (speedrun track 3: 0.1 to 0.16)."""
    lookahead_end: float = 0.7
    """Share of the steps after which lookahead ends (speedrun track 3: 0.65 to 0.76)."""
    tied_until_frac: float = technique(0.0, name="tied_start", off=0.0)
    """Share of the steps in which embedding and head are one matrix, trained by the sum of both gradients. Afterwards they
    are two, which start from the same weights and optimizer state (speedrun, 2025: 2/3). 0: never."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        raise_if(self.lookahead > 0 and self.lookahead_start >= self.lookahead_end,
                 f"lookahead_start must be less than lookahead_end ({self.lookahead_end}), got {self.lookahead_start}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Logging: metrics, wandb, diagnostics and the final sample."""

    every_steps: int = 10
    """Number of steps between lines of metrics.jsonl with the training loss and times."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Mode of Weights & Biases. auto: online if a wandb key is configured, else disabled."""
    wandb_project: str = "steepest"
    """Project on wandb."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run on wandb."""
    experiment: str = ""
    """Label that the seeds of one experiment share, such as an ablation's name; reports and wandb group runs by it."""
    diagnostics: bool = True
    """Log the size of the weights and the size and angle of the step, for every group at each validation."""
    layers_every_steps: int = 0
    """Number of steps between diagnostics of every layer: RMS of features, spectra and rotation of weights, learned factors.
    The clock is stopped for them; spectra are slow (data/run/diagnostics.py). 0: never."""
    sample_tokens: int = 96
    """Number of tokens of the text that is sampled at the end. 0: none."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A complete run. The same Run on the same tokens and machine gives the same losses, to the bit."""

    preset: str = "tiny"
    """Name of the preset that the run started from; the first word of the command line sets it."""
    run: Identity = field(default_factory=Identity)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        # Batches are whole sequences.
        data, train = self.data, self.train
        nearest = max(1, round(train.batch_tokens / data.sequence_tokens)) * data.sequence_tokens
        raise_if(train.batch_tokens != nearest,
                 f"train.batch_tokens must be a multiple of data.sequence_tokens ({data.sequence_tokens}), got "
                 f"{train.batch_tokens}; nearest: {nearest}")
        raise_if((train.micro_tokens or data.sequence_tokens) < data.sequence_tokens,
                 f"train.micro_tokens must hold one sequence of {data.sequence_tokens} tokens, got {train.micro_tokens}")
        raise_if(self.schedule.window_tokens != "1" and self.model.window_tokens is None,
                 "schedule.window_tokens needs --model.window_tokens, the window that it multiplies")
        raise_if(train.val_long_window_tokens is not None and self.model.long_window_tokens is None,
                 "train.val_long_window_tokens needs --model.long_window_tokens, the window that it replaces")
        # While they are tied, embedding and head are one tensor in one optimizer group: one rule, one dtype.
        tied = train.tied_until_frac > 0
        raise_if(tied and (self.optim.embed != self.optim.head or self.model.embed_dtype != self.model.head_dtype),
                 "train.tied_until_frac needs optim.embed and optim.head to be alike, and model.embed_dtype "
                 f"({self.model.embed_dtype}) and model.head_dtype ({self.model.head_dtype}) to be equal")
        raise_if(tied and (self.model.tied_head or self.model.geometry == "sphere"),
                 "train.tied_until_frac unties the head in the run: it needs --model.no_tied_head and geometry euclidean")
        blended = [role.name for role in fields(Optim) if getattr(self.optim, role.name).extra.average_blend is not None]
        raise_if(bool(blended) and not train.weight_average,
                 f"optim.{', '.join(blended)}.extra.average_blend has no effect without --train.weight_average")
        slow_roles = [role.name for role in fields(Optim) if getattr(self.optim, role.name).longest_period > 1]
        raise_if(train.lookahead > 0 and bool(slow_roles),
                 f"train.lookahead needs update_every 1 in every group; it is larger for {', '.join(slow_roles)}")


def with_settings(config: Any, settings: Mapping[str, object]) -> Any:
    """Return a copy of the dataclass `config` with new values by dotted name: {"model.layers": 4, "optim.matrix": Adam()}.

    All values are set at once: the result is checked, not each change alone. Raises ValueError if it is invalid.
    """
    changes = {name: value for name, value in settings.items() if "." not in name}
    for section in dict.fromkeys(name.partition(".")[0] for name in settings if "." in name):
        inner = {name: value for name, value in settings.items() if name.startswith(f"{section}.")}
        inner = {name.removeprefix(f"{section}."): value for name, value in inner.items()}
        changes[section] = with_settings(getattr(config, section), inner)
    return replace(config, **changes)
