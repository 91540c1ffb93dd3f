"""What a report draws beside the losses, as plain JSON values: diagnostics, schedules and tuning curves."""

import json
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from configs.serialize import config_from_dict
from optim.schedule import Schedule, Values
from scripts.lab.curves import MOST_RUNS, compact, records_of, short, thin
from scripts.lab.folders import RunFolder, by_experiment, read_json

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
    numeric = [name for name in names if len({one[name] for one in settings if _is_number(one.get(name))}) > 1]
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
        if _is_number(settings.get(name)):
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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
