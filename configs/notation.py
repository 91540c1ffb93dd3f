"""Parsers and checks of settings: value ranges, techniques, curves, numbers by tensor name, skips and Newton-Schulz tables.

Each notation is a short string, so that a setting fits on the command line and in config.json. Standard library only.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple


def raise_if(condition: bool, message: str) -> None:
    """Raise ValueError(message) if `condition` holds."""
    if condition:
        raise ValueError(message)


def check_ranges(config: object, ranges: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError for a field of `config` outside its interval; a field that is None or missing passes.

    `ranges` maps intervals, written as in mathematics, to field names: {"[0, 1)": ["momentum"]} excludes 1.
    """
    for interval, names in ranges.items():
        low, high = (float(end) for end in interval.strip("[]()").split(","))
        for name in names:
            value = getattr(config, name, None)
            if high < math.inf or value == math.inf:
                requirement = f"lie in {interval}"
            else:
                requirement = f"be at least {low:g}" if interval[0] == "[" else "be positive"
            inside = value is None or (low <= value <= high and (value > low or interval[0] == "[")  # False for nan
                                       and (value < high or interval[-1] == "]"))
            raise_if(not inside, f"{name} must {requirement}, got {value}")


def check_field_names(known: Iterable[str], names: Iterable[str], owner: str) -> None:
    """Raise ValueError for the first of `names` that is not a known field of `owner`, and name the nearest one."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"{owner} has no field {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))


def nearest(word: str, choices: Sequence[str]) -> str:
    """Return the end of an error message: `; did you mean X?` with the choice closest to `word`, or all choices."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; choices: {', '.join(choices)}"


# ---- Techniques: fields that can be switched off alone --------------------------------------------------------------------


class Technique(NamedTuple):
    """Declaration of a technique: how its field is switched off, and what it needs. Ablations, tests and help use it."""

    name: str | None
    """Name of its leave-one-out row, without `no_`. None: the field's name. Empty: no row, as it only refines others."""
    off: Any
    """Value that switches it off."""
    on: Any
    """Value that switches it on in tests, small so that they are fast."""
    needs: Mapping[str, Any]
    """Settings, by dotted name, without which it has no effect, each with a small value for tests. An ablation that switches
    one of them off also switches off this technique."""
    only: tuple
    """Values that count as the technique. Empty: all but `off`."""


def technique(default: Any, *, off: Any, on: Any = None, name: str | None = None, needs: Mapping[str, Any] | None = None,
              only: tuple = ()) -> Any:
    """Return a dataclass field that is a technique; the arguments are the fields of Technique."""
    return field(default=default, metadata={"technique": Technique(name, off, on, needs or {}, only)})


def techniques_of(config: type) -> dict[str, Technique]:
    """Return the techniques among a dataclass's fields, by field name."""
    return {f.name: f.metadata["technique"] for f in fields(config) if "technique" in f.metadata}


def check_needs(config: Any, section: str) -> None:
    """Raise ValueError for a technique that is on while another one that it needs is off.

    `section` is the name of `config` in a run, such as model. Needs in other sections are not checked.
    """
    declared = techniques_of(type(config))
    active = [name for name, entry in declared.items() if getattr(config, name) != entry.off]
    for name in active:
        for need in declared[name].needs:
            needed_field = need.removeprefix(f"{section}.")  # a need in another section keeps its dot
            is_off = "." not in needed_field and getattr(config, needed_field) == declared[needed_field].off
            raise_if(is_off, f"{name} has no effect without --{need}")


# ---- Curves: a number that changes over a run, written as one short string ------------------------------------------------
# A curve is a list of knots `POSITION=VALUE` with straight lines between them: `0=1 40%=1 100%=0.1` is 1 for the first 40 %
# of the steps and then falls to 0.1. A position is a step (`250`), a share of the run (`40%`) or a distance from its end
# (`-50`). A word before a knot changes the line that leads to it: `cos` is half a cosine, `hold` keeps the last value and
# jumps at the knot. `0=0 250=1 cos 100%=0.1` is nanoGPT's linear warm-up and cosine decay. A plain number is a constant.

Approach = Literal["line", "cos", "hold"]
GRAMMAR = "knots are POSITION=VALUE, a space between them; POSITION is a step, N% or -steps: '0=1 40%=1 cos 100%=0.1'"


@dataclass(frozen=True, slots=True)
class Knot:
    """One point of a curve, at `percent` of the run plus `steps`."""

    percent: float
    """Share of the run, 0 to 100."""
    steps: float
    """Number of steps after that share; negative for positions from the end."""
    value: float
    """Value of the curve at the knot."""
    approach: Approach
    """Form of the curve between the previous knot and this one."""

    def step(self, total_steps: int) -> float:
        """Return the knot's position in steps, for a run of `total_steps`."""
        # percent * total first: (percent / 100) * total would put 29 % of 100 steps at 28.999...
        return self.percent * total_steps / 100 + self.steps


def parse_curve(text: str) -> tuple[Knot, ...]:
    """Parse a curve. Raises ValueError, quoting the offending word."""
    knots: list[Knot] = []
    approach: Approach = "line"
    words = text.split()
    if len(words) == 1 and "=" not in text:  # a plain number
        words = [f"0={text}"]
    for word in words:
        if word in ("cos", "hold"):
            approach = word
            continue
        knots.append(_parse_knot(word, approach, text))
        approach = "line"
    raise_if(not knots or approach != "line", f"curve {text!r} must end with a knot; {GRAMMAR}")
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
    """Return the curve's value at `step` of `total_steps`; it is constant before the first and after the last knot.

    In a short run knots can be out of order: 250 may lie after 30%. Then the first segment that ends after `step` decides.
    """
    if step <= knots[0].step(total_steps):
        return knots[0].value
    for left, right in zip(knots, knots[1:], strict=False):
        start, end = left.step(total_steps), right.step(total_steps)
        if step < end:  # so end > start: no division by zero
            return _between(left.value, right, (step - start) / (end - start))
    return knots[-1].value


def _between(value: float, right: Knot, share: float) -> float:
    if right.approach == "hold":
        return value
    if right.approach == "cos":
        share = (1 - math.cos(math.pi * share)) / 2
    return value + (right.value - value) * share


# ---- NAME=NUMBER: a number for the tensors whose dotted name contains NAME as whole words, such as mlp.down=4 -------------
# A name that fits no tensor is an error. `smear.gate?=0.01`, with a question mark, may fit none: that technique may be off.


def parse_by_name(words: tuple[str, ...]) -> dict[str, float]:
    """Parse NAME=NUMBER words to {name: number}. Raises ValueError, quoting the offending word."""
    numbers = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        raise_if(not name or not 0 < number < math.inf,
                 f"expected NAME=NUMBER with a positive number, such as mlp.down=4, got {word!r}")
        numbers[name] = number
    return numbers


def parse_kernel(words: tuple[str, ...]) -> dict[float, float]:
    """Parse MOMENTUM=WEIGHT words to {momentum: weight}. Raises ValueError, quoting the offending word."""
    kernel = {}
    for name, weight in parse_by_name(words).items():
        try:
            kernel[float(name)] = weight
        except ValueError:
            raise ValueError("expected MOMENTUM=WEIGHT with two numbers, such as 0.85=0.44, got "
                             f"'{name}={weight:g}'") from None
    return kernel


def is_named(key: str, name: str) -> bool:
    """True if a dotted name contains `key`, without a final ?, as whole words: mlp.down in blocks.0.mlp.down.weight."""
    return f".{key.removesuffix('?')}." in f".{name}."


def number_of(name: str, numbers: dict[str, float], default: float) -> float:
    """Return the number of the tensor `name`: that of the last key that it contains, else `default`."""
    return next((numbers[key] for key in reversed(numbers) if is_named(key, name)), default)


def unmatched_keys(numbers: Mapping[str, float], names: Iterable[str]) -> list[str]:
    """Return the keys, without those that end with ?, that are part of no tensor's name."""
    all_names = list(names)  # `names` may be an iterator, and is read once for each key
    return [key for key in numbers if not key.endswith("?") and not any(is_named(key, name) for name in all_names)]


# ---- SOURCE>TARGET: a skip connection from the output of one layer to the input of a later one ----------------------------


def parse_skips(words: tuple[str, ...], layers: int) -> tuple[tuple[int, int], ...]:
    """Parse SOURCE>TARGET words to (source, target) layers. Raises ValueError, quoting the offending word."""
    pairs: list[tuple[int, int]] = []
    for word in words:
        source, _, target = word.partition(">")
        raise_if(not (source.isdigit() and target.isdigit()), f"expected a skip SOURCE>TARGET, such as 3>6, got {word!r}")
        raise_if(not int(source) < int(target) < layers,
                 f"a skip goes from a layer to a later one of {layers} (numbered from 0), got {word!r}")
        pairs.append((int(source), int(target)))
    return tuple(pairs)


class DenseSkip(NamedTuple):
    """A stream that is added to a layer's input."""

    source: str
    """in: the stream before the first block; a layer's number: its output; ve0, ve1, ...: a value embedding."""
    target: int
    """Layer, or the number of layers for the head."""
    start: float
    """Initial coefficient."""


def parse_dense_skips(words: tuple[str, ...], layers: int) -> tuple[DenseSkip, ...]:
    """Parse SOURCE>TARGET or SOURCE>TARGET=START words. Raises ValueError, quoting the offending word."""
    skips = []
    for word in words:
        arrow, _, start = word.partition("=")
        source, _, target = arrow.partition(">")
        valid = (source == "in" or source.removeprefix("ve").isdigit()) and target.isdigit() and _is_number(start or "0")
        raise_if(not valid, f"expected SOURCE>TARGET or SOURCE>TARGET=START, with SOURCE in, a layer or ve0, got {word!r}")
        earliest = int(source) + 1 if source.isdigit() else 0
        raise_if(not earliest <= int(target) <= layers,
                 f"{word!r} must end at a layer after its source, or at {layers}, which is the head")
        skips.append(DenseSkip(source, int(target), float(start or 0)))
    return tuple(skips)


def _is_number(text: str) -> bool:
    """True if `text` is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ---- a,b,c;a,b,c;...: a table of odd quintics p(x) = a x + b x^3 + c x^5, one a Newton-Schulz step; the last repeats ------
# It may begin with `safety=1.02;`: the input is then scaled to Frobenius norm 1 / 1.02 in place of 1, a margin that keeps
# singular values, with the rounding of bfloat16, below the largest for which a table is made.

Triple = tuple[float, float, float]
TABLE_NAMES = ("quintic", "polar_express", "convergent", "dion", "radii", "anvil", "svd")
TABLE_GRAMMAR = "an inline table is 'a,b,c;a,b,c;...' or 'safety=S;a,b,c;...' with S at least 1"


def check_table(text: str) -> None:
    """Raise ValueError, with the nearest right choice, if `text` is neither a table's name nor an inline table."""
    if "," in text or ";" in text:
        parse_table(text)
    elif text not in TABLE_NAMES:
        raise ValueError(f"unknown ns {text!r}{nearest(text, TABLE_NAMES)}; {TABLE_GRAMMAR}")


def parse_table(text: str) -> tuple[float, tuple[Triple, ...]]:
    """Parse an inline table to its safety factor and its (a, b, c). Raises ValueError, quoting the offending part."""
    safety, rows = 1.0, text
    first, _, others = text.partition(";")
    if first.strip().startswith("safety="):
        (safety,), rows = _parse_numbers(first.strip().removeprefix("safety="), 1, text), others
    raise_if(safety < 1, f"safety must be at least 1, got {safety:g} in {text!r}")
    return safety, tuple(_parse_numbers(row, 3, text) for row in rows.split(";"))


def _parse_numbers(part: str, count: int, text: str) -> tuple[float, ...]:
    """Parse `count` finite numbers with commas between them; `text` is the whole table, for the message."""
    try:
        numbers = tuple(float(word) for word in part.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"cannot read {part!r} in ns {text!r}: {TABLE_GRAMMAR}")
    return numbers
