"""A number that changes over a run, written as one short string.

A curve is a row of knots `POSITION=VALUE`, straight lines between them: `0=1 40%=1 100%=0.1` holds 1 for the first
40 % of the steps and then falls to 0.1. A position is a step (`250`), a share of the run (`40%`) or a distance from its
end (`-50`). A word before a knot changes how it is approached: `cos` by half a cosine, `hold` by a jump at the knot.
`0=0 250=1 cos 100%=0.1` is the linear warm-up and cosine decay of nanoGPT. A plain number is a constant.
"""

import math
from dataclasses import dataclass
from typing import Literal

Approach = Literal["line", "cos", "hold"]
GRAMMAR = "knots are POSITION=VALUE with POSITION a step, a percentage or -steps from the end: '0=1 40%=1 cos 100%=0.1'"


@dataclass(frozen=True, slots=True)
class Knot:
    """One point of a curve: `percent` of the run plus `steps` (either may be 0), its value, how it is approached."""

    percent: float
    steps: float
    value: float
    approach: Approach

    def step(self, total_steps: int) -> float:
        """The knot's place in steps for a run of `total_steps`."""
        return self.percent * total_steps / 100 + self.steps


def parse_curve(text: str) -> tuple[Knot, ...]:
    """The knots of a curve's notation. Raises ValueError, quoting the offending word."""
    knots: list[Knot] = []
    approach: Approach = "line"
    words = text.split()
    if len(words) == 1 and "=" not in text:
        words = [f"0={text}"]
    for word in words:
        if word in ("cos", "hold"):
            approach = word
            continue
        knots.append(_parse_knot(word, approach, text))
        approach = "line"
    if not knots or approach != "line":
        raise ValueError(f"curve {text!r} must end with a knot; {GRAMMAR}")
    return tuple(knots)


def _parse_knot(word: str, approach: Approach, text: str) -> Knot:
    position, _, value = word.partition("=")
    try:
        if position.endswith("%"):
            percent, steps = float(position[:-1]), 0.0
        else:
            percent, steps = (100.0 if position.startswith("-") else 0.0), float(position)
        knot = Knot(percent, steps, float(value), approach)
    except ValueError:
        raise ValueError(f"cannot read {word!r} in curve {text!r}; {GRAMMAR}") from None
    if not (0 <= percent <= 100 and math.isfinite(steps) and math.isfinite(knot.value)):
        raise ValueError(f"knot {word!r} of curve {text!r} must lie within the run and be finite")
    return knot


def evaluate_curve(knots: tuple[Knot, ...], step: float, total_steps: int) -> float:
    """The curve's value at `step` of `total_steps`; constant before the first and after the last knot.

    Knots that a short run pushes out of order are read from the left: the first segment holding `step` decides.
    """
    if step <= knots[0].step(total_steps):
        return knots[0].value
    for left, right in zip(knots, knots[1:], strict=False):
        start, end = left.step(total_steps), right.step(total_steps)
        if step < end:
            return _between(left.value, right, (step - start) / (end - start))
    return knots[-1].value


def _between(value: float, right: Knot, share: float) -> float:
    if right.approach == "hold":
        return value
    if right.approach == "cos":
        share = (1 - math.cos(math.pi * share)) / 2
    return value + (right.value - value) * share
