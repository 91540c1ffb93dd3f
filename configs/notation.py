"""The small notations of settings: curves, numbers by tensor name, skips, tables; techniques; and how values are refused."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple


def raise_if(condition: bool, message: str) -> None:
    """Raise ValueError(message) where `condition` holds."""
    if condition:
        raise ValueError(message)


def check_ranges(config: object, ranges: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError for a number of `config` outside its range; None is no number.

    `ranges` maps an interval, as it is written, to names: {"[0, 1)": ["momentum"]}; ( and ) leave their end out.
    """
    for interval, names in ranges.items():
        low, high = (float(end) for end in interval.strip("[]()").split(","))
        wanted = f"lie in {interval}" if high < math.inf else f"be at least {low:g}" if interval[0] == "[" else "be positive"
        for name in names:
            value = getattr(config, name, None)
            wanted = f"lie in {interval}" if value == math.inf else wanted
            inside = value is None or (low <= value <= high and (value > low or interval[0] == "[")
                                       and (value < high or interval[-1] == "]"))
            raise_if(not inside, f"{name} must {wanted}, got {value}")


def check_field_names(wanted: Iterable[str], given: Iterable[str], what: str) -> None:
    """Refuse the first given name that is not among the wanted ones, with the nearest that is; `what` has the fields."""
    for name in given:
        if name not in wanted:
            near = difflib.get_close_matches(name, wanted, n=1)
            raise_if(True, f"{what} has no field {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def nearest(word: str, choices: Sequence[str]) -> str:
    """`; did you mean X?` with the choice closest to `word`, or the list of choices."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; choices: {', '.join(choices)}"


# ---- Techniques: fields that can be left out alone ------------------------------------------------------------------------


class Technique(NamedTuple):
    """How a field is left out of a run, and what it depends on: ablation rows, tests and help derive from it."""

    name: str | None
    """Of its leave-one-out row, without no_; None: the field's own; empty: it has no row, it only depends on others."""
    off: Any
    """The value that leaves it out."""
    on: Any
    """A small value that switches it on, for tests."""
    needs: Mapping[str, Any]
    """The settings, by dotted name, without which it does nothing: left out, they take it along. With small values."""
    only: tuple
    """The values that are the technique, if others beside `off` are not."""


def technique(default: Any, *, off: Any, on: Any = None, name: str | None = None, needs: Mapping[str, Any] | None = None,
              only: tuple = ()) -> Any:
    """A dataclass field that is a technique; see Technique."""
    return field(default=default, metadata={"technique": Technique(name, off, on, needs or {}, only)})


def techniques_of(config: type) -> dict[str, Technique]:
    """The techniques among a dataclass's fields, by field."""
    return {f.name: f.metadata["technique"] for f in fields(config) if "technique" in f.metadata}


def check_needs(config: Any, section: str) -> None:
    """Refuse a technique of `config`, the section of that name, that is on while a setting of the section that it needs is
    off."""
    declared = techniques_of(type(config))
    for name, one in declared.items():
        for need in (need.removeprefix(f"{section}.") for need in one.needs if need.startswith(f"{section}.")):
            on = getattr(config, name) != one.off
            raise_if(on and getattr(config, need) == declared[need].off, f"{name} has no effect without --{section}.{need}")


# ---- Curves: a number that changes over a run, written as one short string ------------------------------------------------
# A curve is a row of knots `POSITION=VALUE`, straight lines between them: `0=1 40%=1 100%=0.1` holds 1 for the first
# 40 % of the steps and then falls to 0.1. A position is a step (`250`), a share of the run (`40%`) or a distance from its
# end (`-50`). A word before a knot changes how it is approached: `cos` by half a cosine, `hold` by a jump at the knot.
# `0=0 250=1 cos 100%=0.1` is the linear warm-up and cosine decay of nanoGPT. A plain number is a constant.

Approach = Literal["line", "cos", "hold"]
GRAMMAR = "knots are POSITION=VALUE, a space between them; POSITION is a step, N% or -steps: '0=1 40%=1 cos 100%=0.1'"


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


# ---- NAME=NUMBER: a number for the tensors whose dotted name contains NAME as whole words: mlp.down=4 ---------------------


def parse_by_name(words: tuple[str, ...]) -> dict[str, float]:
    """Number by name. Raises ValueError, quoting the offending word."""
    numbers = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        raise_if(not name or not 0 < number < math.inf,
               f"numbers by name are NAME=NUMBER, positive, say mlp.down=4; got {word!r}")
        numbers[name] = number
    return numbers


def is_named(key: str, name: str) -> bool:
    """Whether the words of `key` stand in a dotted name: mlp.down in blocks.0.mlp.down.weight."""
    return f".{key}." in f".{name}."


def number_of(name: str, numbers: Mapping[str, float], default: float) -> float:
    """The number of a tensor: that of the last key that names it."""
    return ([default] + [number for key, number in numbers.items() if is_named(key, name)])[-1]


def unmatched_keys(numbers: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """Keys that name no tensor."""
    every = list(names)
    return [key for key in numbers if not any(is_named(key, name) for name in every)]


# ---- SOURCE>TARGET: a skip from what one layer wrote to what a later one reads --------------------------------------------


def parse_skips(words: tuple[str, ...], layers: int) -> tuple[tuple[int, int], ...]:
    """(source, target) of every skip. Raises ValueError, quoting the offending word."""
    pairs: list[tuple[int, int]] = []
    for word in words:
        source, _, target = word.partition(">")
        raise_if(not (source.isdigit() and target.isdigit()), f"a skip is SOURCE>TARGET, say 3>6; got {word!r}")
        raise_if(not int(source) < int(target) < layers,
               f"a skip goes from a layer to a later one of {layers} (numbered from 0), got {word!r}")
        pairs.append((int(source), int(target)))
    return tuple(pairs)


# ---- a,b,c;a,b,c;...: a table of odd quintics p(x) = a x + b x^3 + c x^5, one a Newton-Schulz step; the last repeats ------
# It may begin with `safety=1.02;`: inputs then have Frobenius norm 1 / 1.02, otherwise 1.

Triple = tuple[float, float, float]
TABLE_NAMES = ("quintic", "polar_express", "convergent", "dion", "radii", "svd")
TABLE_GRAMMAR = "an inline table is 'a,b,c;a,b,c;...', after 'safety=S;' with S >= 1 where inputs have norm 1/S"


def check_table(text: str) -> None:
    """Raise ValueError, naming the nearest right choice, where `text` is neither a table's name nor an inline table."""
    if "," in text or ";" in text:
        parse_table(text)
    elif text not in TABLE_NAMES:
        raise ValueError(f"unknown ns {text!r}{nearest(text, TABLE_NAMES)}; {TABLE_GRAMMAR}")


def parse_table(text: str) -> tuple[float, tuple[Triple, ...]]:
    """Safety factor and triples of an inline table. Raises ValueError, quoting the offending part."""
    head, _, rest = text.partition(";")
    given = head.strip().startswith("safety=")
    safety = _numbers(head.strip().removeprefix("safety="), 1, text)[0] if given else 1.0
    raise_if(safety < 1, f"safety must be at least 1, got {safety:g} in {text!r}")
    parts = (rest if given else text).split(";")
    return safety, tuple(_numbers(part, 3, text) for part in parts)


def _numbers(part: str, count: int, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in part.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"cannot read {part!r} in ns {text!r}: {TABLE_GRAMMAR}")
    return numbers
