"""Bands that healthy runs stay in: below, nothing is learned; above, it is not stable."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple


class Band(NamedTuple):
    """Where a measure should lie, and why; `low` falls as a group's lr does."""

    pattern: str
    low: float
    high: float
    why: str


BANDS = (
    # Kosson et al. 2023 (arXiv 2305.17212): in equilibrium weights turn by about sqrt(2 lr wd), a few hundredths; by much
    # more they are replaced at each step, by much less they stand still.
    Band("optim/matrix/angle", 1e-5, 0.5, "the matrices turn so much in a step"),
    Band("optim/head/angle", 1e-6, 0.7, "the head turns so much in a step"),
    Band("optim/*/weight_rms", 0.0, 1e3, "weights grow"),
    Band("diag/logits/rms", 0.0, 30.0, "the softmax is one-hot on most tokens, and its gradient gone"),
    Band("diag/logits/largest", 0.0, 200.0, "logits beyond a hundred leave bfloat16 no resolution"),
    Band("diag/block*/stream_rms", 1e-3, 1e3, "the stream vanishes or explodes"),
    Band("diag/*/spectral", 0.0, 1e3, "weights grow"),
    # Matrices that start at zero are all but of rank one after Adam's first step (1e11); in float32 more is a lost rank.
    Band("diag/*/condition", 0.0, 1e14, "the matrix has lost directions for good"),
)


def alarms(record: Mapping[str, object], shares: Mapping[str, float] | None = None) -> list[str]:
    """A sentence for every number of a record that is outside its band, or not finite. `shares`: by role, what the group's
    lr is of its peak, 0 where it rested in this step; 1 where nothing is said."""
    found = []
    for name, value in record.items():
        if not isinstance(value, int | float) or not name.startswith(("optim/", "diag/")):
            continue
        if not math.isfinite(value):
            found.append(f"{name} is {value}")
            continue
        share = (shares or {}).get(name.split("/")[1], 1.0)
        for band in (band for band in BANDS if fnmatchcase(name, band.pattern)):
            if not share * band.low <= value <= band.high:
                found.append(f"{name} is {value:.3g}, outside {share * band.low:.3g} to {band.high:g}: {band.why}")
    return found
