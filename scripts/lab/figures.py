"""Data of a report's figures, as plain JSON values: losses, diagnostics, schedules and tuning curves."""

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
MAX_POINTS = 400  # of a curve: more than a screen has columns for
MAX_RUNS = 24  # with more runs, only the means of experiments are drawn
Curve = dict[str, list[float]]
"""Columns of equal length by name: x axes (of AXES) and y, for means also low and high."""
FlopsLookup = Callable[[RunFolder], list[float] | None]
"""Function from a run to its operations spent before step 0, 1, ...; None if they cannot be computed."""


def subsample(values: Sequence[Any], limit: int = MAX_POINTS) -> list[Any]:
    """Return at most `limit` of the values, evenly spaced, with the first and the last."""
    if len(values) <= limit:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, limit).round().astype(int)]


def rounded(value: float) -> float:
    """Round a float to six significant digits; return any other value unchanged."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def run_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """Return the run's metrics; an empty list if it has not written any yet."""
    return run.metrics if (run.path / "metrics.jsonl").is_file() else []


def flops_of_runs() -> FlopsLookup:
    """Return a lookup of the FLOPs of runs. It caches them by setting, since seeds of one experiment share them."""
    cache: dict[tuple[str, int | None], list[float] | None] = {}

    def flops(run: RunFolder) -> list[float] | None:
        key = (run.setting, (run.summary or {}).get("parameters"))
        if key not in cache:
            try:
                cache[key] = flops_by_step(config_from_dict(read_json(run.path / "config.json")), parameters=key[1])
            except ValueError:  # a config of another version
                cache[key] = None
        return cache[key]

    return flops


def curve(run: RunFolder, key: str, flops: Sequence[float] | None) -> Curve:
    """Return the metric `key` as y, with a column for each x axis. `flops`: operations before each step, or None."""
    records = [record for record in run_metrics(run) if record.get(key) is not None]
    columns = {axis: [record[axis] for record in records] for axis in AXES[:3]} | {"y": [record[key] for record in records]}
    if flops and all(record["step"] < len(flops) for record in records):
        columns["flops"] = [flops[record["step"]] for record in records]
    return columns


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return mean, minimum (low) and maximum (high) of y, and the means of the x axes, at each step that all curves have.

    Every point is a mean of the same runs, so the mean ends where the shortest run ends.
    """
    indexes = [{step: i for i, step in enumerate(run_curve["step"])} for run_curve in curves]
    steps = [step for step in indexes[0] if all(step in index for index in indexes)]

    def values_by_step(axis: str) -> list[list[float]]:
        return [[run_curve[axis][index[step]] for run_curve, index in zip(curves, indexes, strict=True)] for step in steps]

    axes = [axis for axis in curves[0] if all(axis in run_curve for run_curve in curves)]
    means = {axis: [fmean(values) for values in values_by_step(axis)] for axis in axes if axis != "step"}
    ys = values_by_step("y")
    return {"step": steps, **means, "low": [min(values) for values in ys], "high": [max(values) for values in ys]}


def compact_curve(columns: Mapping[str, Sequence[float]]) -> Curve:
    """Subsample and round a curve, to keep the report's page small."""
    return {name: [rounded(value) for value in subsample(values)] for name, values in columns.items()}


def loss_lines(runs: Sequence[RunFolder], flops: FlopsLookup) -> list[dict[str, Any]]:
    """Return one line per run, and one mean per experiment with several seeds.

    A line is {name, experiment (its number), mean (True for a mean), val, bits, train}. With more than MAX_RUNS runs, a
    run whose experiment has a mean is left out.
    """
    lines = []
    for number, (name, group) in enumerate(by_experiment(runs).items()):
        started = [(run, {loss: curve(run, key, flops(run)) for loss, key in LOSSES.items()}) for run in group]
        started = [(run, curves) for run, curves in started if any(columns["y"] for columns in curves.values())]
        if len(runs) <= MAX_RUNS or len(started) == 1:
            lines += [_line(run.name, number, curves, mean=False) for run, curves in started]
        if len(started) > 1:
            # A mean ends with its shortest run, so a run that has just begun would cut it off.
            finished = [(run, curves) for run, curves in started if run.summary is not None]
            averaged = finished if len(finished) > 1 else started
            means = {loss: mean_curve([curves[loss] for _, curves in averaged]) for loss in LOSSES}
            lines.append(_line(f"{name}, mean of {len(averaged)}", number, means, mean=True))
    return lines


def _line(name: str, experiment: int, curves: Mapping[str, Curve], *, mean: bool) -> dict[str, Any]:
    return {"name": name, "experiment": experiment, "mean": mean,
            **{loss: compact_curve(columns) for loss, columns in curves.items() if columns["y"]}}


def known_axes(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the x axes that at least one curve has."""
    return [axis for axis in AXES if any(axis in line[loss] for line in lines for loss in LOSSES if loss in line)]


# ---- Diagnostics ----------------------------------------------------------------------------------------------------


DIAGNOSTIC = re.compile(r"(?P<kind>optim|diag)/(?:(?P<row>.+)/)?(?P<measure>[^/]+)")
MAX_STEPS = 120  # columns of a heat map


def diagnostics(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Return {name, maps} of every run that has diagnostics; with more than MAX_RUNS runs, of each experiment's first."""
    selected = runs if len(runs) <= MAX_RUNS else [group[0] for group in by_experiment(runs).values()]
    entries = [{"name": run.name, "maps": heat_maps(run_metrics(run))} for run in selected]
    return [entry for entry in entries if entry["maps"]]


def heat_maps(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a map {name, rows, steps, z} for each measure among the keys `optim/ROW/MEASURE` and `diag/ROW/MEASURE`.

    z[row][step] is None if nothing was measured there. Rows are ordered by their first record.
    """
    keys = dict.fromkeys(key for record in records for key, value in record.items()
                         if DIAGNOSTIC.fullmatch(key) and isinstance(value, int | float))
    maps: dict[str, dict[str, str]] = {}
    for key in keys:
        kind, row, measure = DIAGNOSTIC.fullmatch(key).group("kind", "row", "measure")
        maps.setdefault(measure if kind == "optim" else f"{kind} {measure}", {})[row or measure] = key
    return [_heat_map(name, rows, records) for name, rows in maps.items()]


def _heat_map(name: str, rows: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one map; `rows`: from the name of a row to its key in the records."""
    columns = subsample([r for r in records if any(r.get(key) is not None for key in rows.values())], MAX_STEPS)
    z = [[None if record.get(key) is None else rounded(record[key]) for record in columns] for key in rows.values()]
    return {"name": name, "rows": list(rows), "steps": [record["step"] for record in columns], "z": z}


# ---- Schedules ------------------------------------------------------------------------------------------------------


SCHEDULE_POINTS = 200


def schedules(runs: Sequence[RunFolder]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the different schedules of the runs, and one message for each config that cannot be read.

    A schedule is {experiments (numbers), step, lr, weight_decay, ...}. A quantity that it leaves alone is None at all steps.
    """
    by_columns: dict[str, dict[str, Any]] = {}
    problems = []
    for number, group in enumerate(by_experiment(runs).values()):
        try:
            columns = schedule_columns(group[0])
        except ValueError as error:
            problems.append(f"{group[0].name}: {error}")
            continue
        by_columns.setdefault(json.dumps(columns), columns | {"experiments": []})["experiments"].append(number)
    return list(by_columns.values()), problems


def schedule_columns(run: RunFolder) -> dict[str, list[float | None]]:
    """Evaluate the run's schedule at evenly spaced steps. Raise ValueError if this version does not know its settings."""
    schedule = Schedule(config_from_dict(read_json(run.path / "config.json")))
    count = min(schedule.total_steps, SCHEDULE_POINTS)
    steps = np.linspace(0, schedule.total_steps - 1, count).round().astype(int).tolist()
    values = [schedule.values(step) for step in steps]
    return {"step": steps} | {name: [rounded(getattr(step_values, name)) for step_values in values]
                              for name in Values._fields}


# ---- Tuning ---------------------------------------------------------------------------------------------------------


MIN_CURVE_VALUES, MIN_CLOUD_VALUES = 3, 4  # different values of a setting that are worth a figure
LOG_RATIO = 3.0  # ratio of the largest to the smallest value from which on an axis is logarithmic


def tuning(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Return a figure {setting, log, joined, lines} of the final loss over each numeric setting in which the runs differ.

    joined True: one line {label, x, y, low, high, n} for each choice of all the other settings, as in a grid search.
    joined False: one cloud of points, because the other settings vary too, as in a random search.
    """
    points = _points(runs)
    settings = [settings for settings, _ in points]
    names = dict.fromkeys(name for point_settings in settings for name in point_settings)
    numeric = [name for name in names if len({values[name] for values in settings if is_number(values.get(name))}) > 1]
    return [figure for name in numeric if (figure := _tuning_figure(name, points))]


def _points(runs: Sequence[RunFolder]) -> list[tuple[dict[str, Any], list[float]]]:
    """Return (settings, final losses of the seeds) of each experiment, from its finished runs."""
    groups: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for run in runs:
        loss = (run.summary or {}).get("val_loss_nats")
        if loss is not None:
            groups.setdefault(run.setting, (run.settings, []))[1].append(loss)
    return list(groups.values())


def _tuning_figure(name: str, points: Sequence[tuple[dict[str, Any], list[float]]]) -> dict[str, Any] | None:
    """Return the figure of one setting; None if it has too few different values."""
    # Points that agree in all other settings form one line.
    groups: dict[str, list[tuple[float, list[float]]]] = {}
    for settings, losses in points:
        if is_number(settings.get(name)):
            other_settings = json.dumps({other: value for other, value in settings.items() if other != name})
            groups.setdefault(other_settings, []).append((settings[name], losses))
    curves = {other_settings: group for other_settings, group in groups.items() if len(group) >= MIN_CURVE_VALUES}
    cloud = [point for group in groups.values() for point in group]
    xs = [x for x, _ in cloud]
    if not curves and len(set(xs)) < MIN_CLOUD_VALUES:
        return None
    labels = setting_labels([json.loads(other_settings) for other_settings in curves])
    lines = [_tuning_line(label, group) for label, group in zip(labels, curves.values(), strict=True)]
    return {"setting": name, "log": min(xs) > 0 and max(xs) / min(xs) >= LOG_RATIO, "joined": bool(curves),
            "lines": lines or [_tuning_line("", cloud)]}


def _tuning_line(label: str, group: Sequence[tuple[float, list[float]]]) -> dict[str, Any]:
    """Return mean, minimum and maximum of the losses at each x; `group`: (x, losses of the seeds)."""
    group = sorted(group, key=lambda point: point[0])
    columns = {"x": [x for x, _ in group], "y": [fmean(losses) for _, losses in group],
               "low": [min(losses) for _, losses in group], "high": [max(losses) for _, losses in group],
               "n": [len(losses) for _, losses in group]}
    return {"label": label, **compact_curve(columns)}


def setting_labels(choices: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a label `NAME=VALUE, ...` for each choice of settings, of the settings in which the choices differ."""
    names = dict.fromkeys(name for choice in choices for name in choice)
    differing = [name for name in names if any(choice.get(name) != choices[0].get(name) for choice in choices)]
    return [", ".join(f"{name}={choice.get(name)}" for name in differing) for choice in choices]
