"""From the step to the numbers that hold at it: a pure function, so that resuming is right by construction."""

from typing import NamedTuple

from configs.notation import evaluate_curve, parse_curve
from configs.schema import Run


class Values(NamedTuple):
    """What holds at one step."""

    lr: float
    """Multiplies each group's lr."""
    weight_decay: float
    """Multiplies each group's weight decay."""
    momentum: float | None
    """Momentum of every group whose rule has one, in place of its own; None: each group's own."""
    batch_tokens: int
    """Tokens of the step, over all ranks: a multiple of sequence_tokens."""
    sequence_tokens: int
    """Context length."""
    window_tokens: int | None
    """Sliding window of attention; None: none."""
    long_window_tokens: int | None = None
    """Window of the layers that see further; None: everything."""
    mtp: float = 99.0
    """How many further tokens multi-token prediction reaches."""
    prefix_loss: float = 1.0
    """Multiplies the weight of the prefix loss."""
    max_document_tokens: int = 2048
    """Longer documents are clipped."""

    @property
    def windows(self) -> dict[str, int | None]:
        """As the model takes them."""
        return {"window": self.window_tokens, "long_window": self.long_window_tokens}


class Schedule:
    """The curves of a run, evaluated."""

    def __init__(self, run: Run) -> None:
        self.total_steps = run.train.steps
        self._curves = {name: parse_curve(text) for name in Values._fields if (text := getattr(run.schedule, name))}
        self._base = {"batch_tokens": run.train.batch_tokens, "sequence_tokens": run.data.sequence_tokens,
                      "window_tokens": run.model.window_tokens, "long_window_tokens": run.model.long_window_tokens,
                      "max_document_tokens": run.data.max_document_tokens}

    def values(self, step: int) -> Values:
        """What holds at optimizer step 0, 1, ..., total_steps - 1."""
        now = {name: evaluate_curve(knots, step, self.total_steps) for name, knots in self._curves.items()}
        sequence = max(1, round(self._base["sequence_tokens"] * now["sequence_tokens"]))
        batch = max(1, round(self._base["batch_tokens"] * now["batch_tokens"] / sequence)) * sequence
        windows = (None if self._base[name] is None else max(1, round(self._base[name] * now[name]))
                   for name in ("window_tokens", "long_window_tokens"))
        longest = max(1, round(self._base["max_document_tokens"] * now["max_document_tokens"]))
        return Values(now["lr"], now["weight_decay"], now.get("momentum"), batch, sequence, *windows, now["mtp"],
                      now["prefix_loss"], longest)

    def portions(self, step: int) -> tuple[int, int, int]:
        """(batch_tokens, sequence_tokens, max_document_tokens) of a step: what the data pipeline must know."""
        values = self.values(step)
        return values.batch_tokens, values.sequence_tokens, values.max_document_tokens

    def tokens_before(self, step: int) -> int:
        """Training tokens of all steps before `step`."""
        return sum(self.values(i).batch_tokens for i in range(step))
