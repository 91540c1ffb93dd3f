"""The curves that a report draws, as plain JSON values: losses of runs, and their means over seeds."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from configs.serialize import config_from_dict
from data.run.metrics import TRAIN_LOSS, VAL_BITS, VAL_LOSS
from scripts.lab.flops import flops_by_step
from scripts.lab.folders import RunFolder, by_experiment, read_json

LOSSES = {"val": VAL_LOSS, "bits": VAL_BITS, "train": TRAIN_LOSS}
AXES = ("step", "tokens", "train_seconds", "flops")
MOST_POINTS = 400  # of a curve: more than a screen has columns for
MOST_RUNS = 24  # beyond, only experiments' means are drawn
Curve = dict[str, list[float]]
Flops = Callable[[RunFolder], list[float] | None]


def thin(values: Sequence[Any], most: int = MOST_POINTS) -> list[Any]:
    """At most so many of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, most).round().astype(int)]


def short(value: float) -> float:
    """Six significant digits of a float; whole numbers as they are."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def records_of(run: RunFolder) -> list[dict[str, Any]]:
    """The run's metrics; none where it has not written any yet."""
    return run.metrics if (run.path / "metrics.jsonl").is_file() else []


def flops_of_runs() -> Flops:
    """A function from a run to its FLOPs by step (None: not known), which remembers them by setting."""
    known: dict[tuple[str, int | None], list[float] | None] = {}

    def flops(run: RunFolder) -> list[float] | None:
        key = (run.setting, (run.summary or {}).get("parameters"))
        if key not in known:
            try:
                known[key] = flops_by_step(config_from_dict(read_json(run.path / "config.json")), parameters=key[1])
            except ValueError:  # settings that this version does not know
                known[key] = None
        return known[key]

    return flops


def curve(run: RunFolder, key: str, flops: Sequence[float] | None) -> Curve:
    """The metric `key` as y against every axis; without flops where these are not known."""
    found = [record for record in records_of(run) if record.get(key) is not None]
    columns = {axis: [record[axis] for record in found] for axis in AXES[:3]} | {"y": [record[key] for record in found]}
    if flops and all(record["step"] < len(flops) for record in found):
        columns["flops"] = [flops[record["step"]] for record in found]
    return columns


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean of y, and its least and greatest value (low, high), at each step that all the curves hold; the other axes
    are means too. So every point is of the same runs, and the mean ends where the first of them does."""
    at = [{step: i for i, step in enumerate(one["step"])} for one in curves]
    steps = [step for step in at[0] if all(step in where for where in at)]

    def gather(axis: str) -> list[list[float]]:
        return [[one[axis][where[step]] for one, where in zip(curves, at, strict=True)] for step in steps]

    axes = [axis for axis in curves[0] if all(axis in one for one in curves)]
    means = {axis: [fmean(values) for values in gather(axis)] for axis in axes if axis != "step"}
    bounds = {"low": [min(values) for values in gather("y")], "high": [max(values) for values in gather("y")]}
    return {"step": steps, **means, **bounds}


def compact(columns: Mapping[str, Sequence[float]]) -> Curve:
    """Thinned and shortened, for the page."""
    return {name: [short(value) for value in thin(values)] for name, values in columns.items()}


def loss_lines(runs: Sequence[RunFolder], flops: Flops) -> list[dict[str, Any]]:
    """One line a run, and one a mean over several seeds: {name, experiment (its number), mean, val, bits, train}.

    Of more than MOST_RUNS runs those that have a mean are left out.
    """
    lines = []
    for number, (name, group) in enumerate(by_experiment(runs).items()):
        drawn = [(run, {loss: curve(run, key, flops(run)) for loss, key in LOSSES.items()}) for run in group]
        drawn = [(run, curves) for run, curves in drawn if any(one["y"] for one in curves.values())]
        if len(runs) <= MOST_RUNS or len(drawn) == 1:
            lines += [_line(run.name, number, curves, mean=False) for run, curves in drawn]
        if len(drawn) > 1:
            finished = [one for one in drawn if one[0].summary is not None]
            settled = finished if len(finished) > 1 else drawn  # a run that has just begun would cut the mean short
            means = {loss: mean_curve([curves[loss] for _, curves in settled]) for loss in LOSSES}
            lines.append(_line(f"{name}, mean of {len(settled)}", number, means, mean=True))
    return lines


def _line(name: str, experiment: int, curves: Mapping[str, Curve], *, mean: bool) -> dict[str, Any]:
    return {"name": name, "experiment": experiment, "mean": mean,
            **{loss: compact(columns) for loss, columns in curves.items() if columns["y"]}}


def known_axes(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The axes that any curve knows."""
    return [axis for axis in AXES if any(axis in line[loss] for line in lines for loss in LOSSES if loss in line)]
