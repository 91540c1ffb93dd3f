"""Spaces of settings: ranges to draw from, grids to walk, and the flags that a point in them stands for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, Literal, get_args

import numpy as np

from configs.cli import nearest
from configs.optim import RULES, Optim
from configs.schema import Run
from configs.serialize import config_to_dict, flatten

Scale = Literal["linear", "log", "one_minus"]
DIGITS = 4  # significant ones, so that flags stay short


@dataclass(frozen=True, slots=True)
class Range:
    """Where one setting may lie, and how evenly.

    `log` is uniform in the logarithm of x, `one_minus` in that of 1 - x: for averages, whose memory is 1 / (1 - x) steps.
    """

    name: str
    low: float
    high: float
    scale: Scale

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"range of {self.name} must rise from LOW to HIGH, got {self.low:g}:{self.high:g}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"range of {self.name}: scale log needs LOW above 0, got {self.low:g}")
        if self.scale == "one_minus" and self.high >= 1:
            raise ValueError(f"range of {self.name}: scale one_minus needs HIGH below 1, got {self.high:g}")

    def at(self, share: float) -> float:
        """The value `share` (0 to 1) of the way from low to high, rounded to DIGITS (of 1 - x, for one_minus)."""
        if self.scale == "linear":
            return _rounded(self.low + share * (self.high - self.low))
        if self.scale == "log":
            return _rounded(self.low * (self.high / self.low) ** share)
        left = (1 - self.low) * ((1 - self.high) / (1 - self.low)) ** share
        return float(f"{1 - _rounded(left):.12g}")


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def parse_range(text: str) -> Range:
    """`NAME=LOW:HIGH[:SCALE]`, linear if no scale is named. Raises ValueError quoting what is wrong."""
    name, values = _named(text, "NAME=LOW:HIGH:SCALE")
    low, high, scale, *rest = [*values.split(":"), "linear"] if values.count(":") == 1 else [*values.split(":"), "", ""]
    if values.count(":") not in (1, 2):
        raise ValueError(f"cannot read range {text!r}; write NAME=LOW:HIGH:SCALE, say optim.matrix.lr=0.001:0.1:log")
    if scale not in get_args(Scale):
        raise ValueError(f"unknown scale {scale!r} in {text!r}{nearest(scale, get_args(Scale))}")
    try:
        return Range(name, float(low), float(high), scale)
    except ValueError as error:
        raise ValueError(f"cannot read range {text!r}: {error}") from None


def parse_grid(text: str) -> tuple[str, tuple[str, ...]]:
    """`NAME=V,V,...` as the name and its values, as they stand. Raises ValueError quoting what is wrong."""
    name, values = _named(text, "NAME=V,V,...")
    words = tuple(word.strip() for word in values.split(","))
    if "" in words or len(set(words)) < len(words):
        raise ValueError(f"cannot read grid {text!r}: its values must be there, and each once")
    return name, words


def _named(text: str, form: str) -> tuple[str, str]:
    name, equals, values = text.partition("=")
    known = list(every_setting())
    if not equals or not values:
        raise ValueError(f"cannot read {text!r}; write {form}")
    if name not in known:
        raise ValueError(f"unknown setting {name!r}{nearest(name, known) if name else ''}")
    return name, values


@cache
def every_setting() -> dict[str, Any]:
    """Defaults by dotted name, whichever rule has them."""
    own = [flatten(asdict(rule())) for rule in RULES.values()]
    return flatten(config_to_dict(Run())) | {f"optim.{role.name}.{name}": value for role in fields(Optim)
                                             for settings in own for name, value in settings.items()}


def draw(ranges: Sequence[Range], count: int, *, seed: int, quasi: bool) -> list[dict[str, float]]:
    """`count` points of the box that the ranges span; the first k of them are the k that a smaller count draws.

    quasi: a scrambled Halton sequence (Owen 2017, arXiv 1706.02808), more even than chance; else uniform.
    """
    if count < 1:
        raise ValueError(f"the number of draws must be at least 1, got {count}")
    if quasi:
        from scipy.stats import qmc
        shares = qmc.Halton(len(ranges), scramble=True, rng=np.random.default_rng(seed)).random(count)
    else:
        shares = np.random.default_rng(seed).random((count, len(ranges)))
    return [{one.name: one.at(share) for one, share in zip(ranges, row, strict=True)} for row in shares.tolist()]


def flags_of(values: Mapping[str, object]) -> tuple[str, ...]:
    """The command line's flags for these settings: `--name value`, and `--name` or `--no_name` for switches."""
    return tuple(word for name, value in values.items() for word in _flag(name, value))


def _flag(name: str, value: object) -> tuple[str, ...]:
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    if isinstance(every_setting().get(name), bool) and text.lower() in ("true", "false"):
        group, _, field = name.rpartition(".")
        return (f"--{name}" if text.lower() == "true" else f"--{group}.no_{field}",)
    return f"--{name}", text
