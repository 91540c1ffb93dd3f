"""Bands that healthy runs stay in: below, nothing is learned; above, it is not stable."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple


class Band(NamedTuple):
    """Where a measure should lie, and why."""

    pattern: str
    low: float
    high: float
    why: str


BANDS = (
    # Kosson et al. 2023 (arXiv 2305.17212): in equilibrium weights turn by sqrt(2 lr wd), a few hundredths; by much more
    # they are replaced at each step, by much less they stand still.
    Band("optim/matrix/angle", 1e-5, 0.5, "the matrices turn so much in a step"),
    Band("optim/head/angle", 1e-6, 0.7, "the head turns so much in a step"),
    Band("optim/*/weight_rms", 0.0, 1e3, "weights grow"),
    Band("diag/logits/largest", 0.0, 200.0, "logits beyond a hundred leave bfloat16 no resolution"),
    Band("diag/block*/stream_rms", 1e-3, 1e3, "the stream vanishes or explodes"),
    Band("diag/*/spectral", 0.0, 1e3, "weights grow"),
)


def alarms(record: Mapping[str, object]) -> list[str]:
    """A sentence for every number of a record that is outside its band, or not finite."""
    found = []
    for name, value in record.items():
        if not isinstance(value, int | float) or not name.startswith(("optim/", "diag/")):
            continue
        if not math.isfinite(value):
            found.append(f"{name} is {value}")
        found += [f"{name} is {value:.3g}, outside {band.low:g} to {band.high:g}: {band.why}" for band in BANDS
                  if fnmatchcase(name, band.pattern) and math.isfinite(value) and not band.low <= value <= band.high]
    return found
