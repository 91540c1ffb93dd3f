"""What a report draws, as plain JSON values: losses, diagnostics, schedules and tuning curves."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from configs.serialize import config_from_dict
from data.run.metrics import TRAIN_LOSS, VAL_BITS, VAL_LOSS
from optim.schedule import Schedule, Values
from scripts.lab.folders import RunFolder, by_experiment, is_number, read_json
from scripts.lab.models import flops_by_step

# ---- Losses ---------------------------------------------------------------------------------------------------------


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


DIAGNOSTIC = re.compile(r"(?P<kind>optim|diag)/(?:(?P<row>.+)/)?(?P<measure>[^/]+)")
MOST_STEPS = 120  # columns of a heat map
SCHEDULE_POINTS = 200
LEAST_ON_A_CURVE, LEAST_IN_A_CLOUD = 3, 4  # different values of a setting that are worth a figure
LOG_RATIO = 3.0  # greatest to least value from which an axis is logarithmic


# ---- Diagnostics ----------------------------------------------------------------------------------------------------


def diagnostics(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """{name, maps} of every run that measured something; of more than MOST_RUNS runs each experiment's first."""
    shown = runs if len(runs) <= MOST_RUNS else [group[0] for group in by_experiment(runs).values()]
    found = [{"name": run.name, "maps": heat_maps(records_of(run))} for run in shown]
    return [one for one in found if one["maps"]]


def heat_maps(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A map {name, rows, steps, z} for each measure among keys `optim/ROW/MEASURE` and `diag/ROW/MEASURE`.

    z[row][step] is None where nothing was measured. Rows stand in the order of their first record.
    """
    keys = dict.fromkeys(key for record in records for key, value in record.items()
                         if DIAGNOSTIC.fullmatch(key) and isinstance(value, int | float))
    maps: dict[str, dict[str, str]] = {}
    for key in keys:
        kind, row, measure = DIAGNOSTIC.fullmatch(key).group("kind", "row", "measure")
        maps.setdefault(measure if kind == "optim" else f"{kind} {measure}", {})[row or measure] = key
    return [_heat_map(name, rows, records) for name, rows in maps.items()]


def _heat_map(name: str, rows: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = thin([record for record in records if any(record.get(key) is not None for key in rows.values())], MOST_STEPS)
    z = [[None if record.get(key) is None else short(record[key]) for record in found] for key in rows.values()]
    return {"name": name, "rows": list(rows), "steps": [record["step"] for record in found], "z": z}


# ---- Schedules ------------------------------------------------------------------------------------------------------


def schedules(runs: Sequence[RunFolder]) -> tuple[list[dict[str, Any]], list[str]]:
    """The different schedules {experiments (numbers), step, lr, weight_decay, ...}, and what could not be read.

    A quantity that a schedule leaves alone is None at all its steps.
    """
    found: dict[str, dict[str, Any]] = {}
    problems = []
    for number, group in enumerate(by_experiment(runs).values()):
        try:
            columns = schedule_columns(group[0])
        except ValueError as error:
            problems.append(f"{group[0].name}: {error}")
            continue
        found.setdefault(json.dumps(columns), columns | {"experiments": []})["experiments"].append(number)
    return list(found.values()), problems


def schedule_columns(run: RunFolder) -> dict[str, list[float | None]]:
    """Values of the schedule at evenly spaced steps. Raises ValueError for settings that this version does not know."""
    schedule = Schedule(config_from_dict(read_json(run.path / "config.json")))
    count = min(schedule.total_steps, SCHEDULE_POINTS)
    steps = np.linspace(0, schedule.total_steps - 1, count).round().astype(int).tolist()
    values = [schedule.values(step) for step in steps]
    return {"step": steps} | {name: [None if getattr(now, name) is None else short(getattr(now, name)) for now in values]
                              for name in Values._fields}


# ---- Tuning ---------------------------------------------------------------------------------------------------------


def tuning(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """A figure {setting, log, joined, lines} for each numeric setting that runs differ in, over their final loss.

    Joined: one line {label, x, y, low, high, n} for each choice of all other settings under which it was varied.
    Otherwise, where other settings vary with it as in a random search, one cloud of points.
    """
    points = _points(runs)
    settings = [settings for settings, _ in points]
    names = dict.fromkeys(name for one in settings for name in one)
    numeric = [name for name in names if len({one[name] for one in settings if is_number(one.get(name))}) > 1]
    return [figure for name in numeric if (figure := _tuning_figure(name, points))]


def _points(runs: Sequence[RunFolder]) -> list[tuple[dict[str, Any], list[float]]]:
    """Each setting of the finished runs, with the final losses of its seeds."""
    groups: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for run in runs:
        loss = (run.summary or {}).get("val_loss_nats")
        if loss is not None:
            groups.setdefault(run.setting, (run.settings, []))[1].append(loss)
    return list(groups.values())


def _tuning_figure(name: str, points: Sequence[tuple[dict[str, Any], list[float]]]) -> dict[str, Any] | None:
    groups: dict[str, list[tuple[float, list[float]]]] = {}
    for settings, losses in points:
        if is_number(settings.get(name)):
            rest = json.dumps({other: value for other, value in settings.items() if other != name})
            groups.setdefault(rest, []).append((settings[name], losses))
    curves = {rest: group for rest, group in groups.items() if len(group) >= LEAST_ON_A_CURVE}
    cloud = [point for group in groups.values() for point in group]
    xs = [x for x, _ in cloud]
    if not curves and len(set(xs)) < LEAST_IN_A_CLOUD:
        return None
    labels = rest_labels([json.loads(rest) for rest in curves])
    lines = [_tuning_line(label, group) for label, group in zip(labels, curves.values(), strict=True)]
    return {"setting": name, "log": min(xs) > 0 and max(xs) / min(xs) >= LOG_RATIO, "joined": bool(curves),
            "lines": lines or [_tuning_line("", cloud)]}


def _tuning_line(label: str, group: Sequence[tuple[float, list[float]]]) -> dict[str, Any]:
    group = sorted(group, key=lambda point: point[0])
    columns = {"x": [x for x, _ in group], "y": [fmean(losses) for _, losses in group],
               "low": [min(losses) for _, losses in group], "high": [max(losses) for _, losses in group],
               "n": [len(losses) for _, losses in group]}
    return {"label": label, **compact(columns)}


def rest_labels(rests: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells choices of settings apart: `NAME=VALUE, ...` of those in which they differ."""
    names = dict.fromkeys(name for rest in rests for name in rest)
    differing = [name for name in names if any(rest.get(name) != rests[0].get(name) for rest in rests)]
    return [", ".join(f"{name}={rest.get(name)}" for name in differing) for rest in rests]
