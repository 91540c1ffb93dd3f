"""Schedule: hyperparameters and sizes as a pure function of the step, so that a resumed run gets the right ones."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from configs.model import Model
from configs.notation import evaluate_curve, parse_curve, raise_if
from configs.schema import Run, Train


class Values(NamedTuple):
    """Scheduled hyperparameters and sizes of one step."""

    lr: float
    """Multiplies each group's learning rate."""
    weight_decay: float
    """Multiplies each group's weight decay."""
    momentum: float | None
    """Momentum of every group whose rule has one, in place of its own; None: each group's own."""
    batch_tokens: int
    """Tokens of the step over all ranks, a multiple of sequence_tokens."""
    sequence_tokens: int
    """Context length."""
    window_tokens: int | None
    """Sliding attention window; None: no window."""
    long_window_tokens: int | None = None
    """Sliding window of the layers with a long window; None: the whole context."""
    mtp: float = 99.0
    """Number of further tokens that multi-token prediction predicts."""
    prefix_loss: float = 1.0
    """Multiplies the weight of the prefix loss."""
    max_document_tokens: int | None = None
    """Length to which longer documents are clipped; None: the order clips none."""

    @property
    def windows(self) -> dict[str, int | None]:
        """Attention windows as keyword arguments of the model."""
        return {"window": self.window_tokens, "long_window": self.long_window_tokens}


class GraphKey(NamedTuple):
    """What a compiled training graph depends on, besides the model: a step with another key needs a graph of its own."""

    batch_tokens: int
    sequence_tokens: int
    window_tokens: int | None
    long_window_tokens: int | None
    max_document_tokens: int
    mtp_terms: int
    """Number of further tokens that the loss predicts."""
    prefix_loss: bool
    """True if the prefix loss acts."""


def graph_key(values: Values, config: Model) -> GraphKey:
    """Return the key of the graph of a step with these values."""
    mtp, prefix = loss_weights(values, config)
    return GraphKey(values.batch_tokens, values.sequence_tokens, values.window_tokens, values.long_window_tokens,
                    values.max_document_tokens, len(mtp), prefix > 0)


def loss_weights(values: Values, config: Model) -> tuple[tuple[float, ...], float]:
    """Return the weights of the further tokens that act, and that of the prefix loss, 0 if it does not act.

    The k-th weight w_k is multiplied by clamp(reach - k + 1, 0, 1): a reach of 1.5 predicts the token after the next, and
    the one after it at half its weight.
    """
    terms = config.mtp_weights[:max(0, math.ceil(values.mtp))]
    mtp = tuple(weight * min(values.mtp - k + 1, 1.0) for k, weight in enumerate(terms, start=1))
    return mtp, config.prefix_loss * values.prefix_loss


class Schedule:
    """Curves of a run, evaluated at any step."""

    def __init__(self, run: Run) -> None:
        self.total_steps = run.train.steps
        self._curves = {name: parse_curve(text) for name in Values._fields if (text := getattr(run.schedule, name))}
        clips = run.data.order == "documents"
        self._base = {"batch_tokens": run.train.batch_tokens, "sequence_tokens": run.data.sequence_tokens,
                      "window_tokens": run.model.window_tokens, "long_window_tokens": run.model.long_window_tokens,
                      "max_document_tokens": run.data.max_document_tokens if clips else None}
        self._val_long_window_tokens = run.train.val_long_window_tokens

    def values(self, step: int) -> Values:
        """Return the values of optimizer step 0, 1, ..., total_steps - 1."""
        curves = {name: evaluate_curve(knots, step, self.total_steps) for name, knots in self._curves.items()}
        sequence = self._scaled("sequence_tokens", curves)
        # Batches are whole sequences, at least one.
        batch = max(1, round(self._base["batch_tokens"] * curves["batch_tokens"] / sequence)) * sequence
        return Values(curves["lr"], curves["weight_decay"], curves.get("momentum"), batch, sequence,
                      self._scaled("window_tokens", curves), self._scaled("long_window_tokens", curves), curves["mtp"],
                      curves["prefix_loss"], self._scaled("max_document_tokens", curves))

    def validation_values(self, step: int) -> Values:
        """Return the values to validate with after step number `step`, counted from 1: those of that step, after the last
        one with the validation's long window. Before the first step: those of the first."""
        values = self.values(max(0, step - 1))
        if step < self.total_steps or self._val_long_window_tokens is None:
            return values
        return values._replace(long_window_tokens=self._val_long_window_tokens)

    def _scaled(self, name: str, curves: dict[str, float]) -> int | None:
        """Return a configured number of tokens times its curve, at least 1; None stays None."""
        tokens = self._base[name]
        return None if tokens is None else max(1, round(tokens * curves[name]))

    def portions(self, step: int) -> tuple[int, int, int | None]:
        """Return (batch_tokens, sequence_tokens, max_document_tokens) of a step, the sizes that the data pipeline needs."""
        values = self.values(step)
        return values.batch_tokens, values.sequence_tokens, values.max_document_tokens

    def tokens_before(self, step: int) -> int:
        """Return the number of training tokens of all steps before `step`."""
        return sum(self.values(i).batch_tokens for i in range(step))


# ---- Events -------------------------------------------------------------------------------------------------------------


def is_due(step: int, every_steps: int) -> bool:
    """True if an event with a period of `every_steps` (0: never) is due after step number `step`, counted from 1."""
    return every_steps > 0 and step % every_steps == 0


def is_validation_step(train: Train, step: int) -> bool:
    """True if the weights are validated after step number `step`: always after the last one, and more often in the last
    tenth of the run, so that the step that reaches the target is known more exactly."""
    is_late = train.final_val_every_steps and step >= 0.9 * train.steps
    return step == train.steps or is_due(step, train.final_val_every_steps if is_late else train.val_every_steps)


# ---- Graphs of a compiled run -------------------------------------------------------------------------------------------

MAX_SHAPES = 8
"""Shapes that a compiled run may have: each takes minutes to compile, for training and again for validation."""


def training_shapes(run: Run, *, limited: bool = False) -> list[Values]:
    """Return the values of the first step of each shape, in the order in which training meets them.

    With `limited`, for a compiled run, more than MAX_SHAPES raise ValueError, which names the curve that makes most of them.
    """
    shapes = _first_of_each(map(Schedule(run).values, range(run.train.steps)), lambda values: graph_key(values, run.model))
    curves = ("batch_tokens", "sequence_tokens", "window_tokens", "long_window_tokens")
    most = max(curves, key=lambda name: len({getattr(values, name) for values in shapes}))
    raise_if(limited and len(shapes) > MAX_SHAPES,
             f"the schedule has {len(shapes):,} shapes (batch, context, windows), and torch.compile takes minutes for each; "
             f"at most {MAX_SHAPES}: change --schedule.{most} in jumps, by `hold` knots in steps of 128 tokens such as "
             "'0=1 hold 33%=2 hold 67%=3', or take --run.compile off")
    return shapes


def validation_shapes(run: Run) -> list[Values]:
    """Return the values of the first validation of each shape, in order."""
    steps = (step for step in range(1, run.train.steps + 1) if is_validation_step(run.train, step))
    return _first_of_each(map(Schedule(run).validation_values, steps),
                          lambda values: (values.sequence_tokens, *values.windows.values()))


def _first_of_each(values: Iterable[Values], key: Callable[[Values], tuple]) -> list[Values]:
    shapes: dict[tuple, Values] = {}
    for of_step in values:
        shapes.setdefault(key(of_step), of_step)
    return list(shapes.values())

