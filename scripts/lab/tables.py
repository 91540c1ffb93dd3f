"""The tables of a report, as plain JSON values: {columns: [{label, kind}], rows}. A kind says how a page spells a value."""

import json
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scripts.lab.curves import records_of, short
from scripts.lab.folders import RunFolder, by_experiment, differences

UNTOLD = ("log.experiment", "run.seed")  # the table of runs tells them


class Column(NamedTuple):
    """A column: its head, the kind of its values (text, number, count, si, seconds, bytes), and where a value comes from."""

    label: str
    kind: str
    value: Callable[[Any], Any]


def _from_summary(key: str) -> Callable[[RunFolder], Any]:
    return lambda run: (run.summary or {}).get(key)


def state(run: RunFolder) -> str:
    """`finished`, or how far the run came."""
    if run.summary is not None:
        return "finished"
    records = records_of(run)
    return f"at step {records[-1]['step']:,}" if records else "no metrics"


def speed(run: RunFolder) -> float | None:
    """Training tokens a second, over the whole run."""
    tokens, seconds = _from_summary("tokens")(run), _from_summary("train_seconds")(run)
    return tokens / seconds if tokens and seconds else None


RUN_COLUMNS = (
    Column("run", "text", lambda run: run.name),
    Column("experiment", "text", lambda run: run.experiment),
    Column("seed", "count", lambda run: run.config.get("run.seed")),
    Column("validation loss (nats)", "number", _from_summary("val_loss_nats")),
    Column("bits per byte", "number", _from_summary("val_bits_per_byte")),
    Column("best loss (nats)", "number", _from_summary("best_val_loss_nats")),
    Column("steps", "count", _from_summary("steps")),
    Column("tokens", "si", _from_summary("tokens")),
    Column("training time", "seconds", _from_summary("train_seconds")),
    Column("tokens/s", "si", speed),
    Column("target (nats)", "number", _from_summary("target_loss_nats")),
    Column("step at target", "count", _from_summary("target_step")),
    Column("time to target", "seconds", _from_summary("target_seconds")),
    Column("peak memory", "bytes", _from_summary("peak_memory_bytes")),
    Column("parameters", "si", _from_summary("parameters")),
    Column("device", "text", _from_summary("device")),
    Column("devices", "count", _from_summary("world_size")),
    Column("state", "text", state),
)


def _over_seeds(key: str, measure: Callable[[list[float]], float], least: int = 1) -> Callable[[Any], float | None]:
    """The measure of a summary value over the runs that know it; None for fewer than `least`."""
    def value(group: tuple[str, Sequence[RunFolder]]) -> float | None:
        known = [run.summary[key] for run in group[1] if run.summary and run.summary.get(key) is not None]
        return measure(known) if len(known) >= least else None
    return value


EXPERIMENT_COLUMNS = (
    Column("experiment", "text", lambda group: group[0]),
    Column("runs", "count", lambda group: len(group[1])),
    Column("finished", "count", lambda group: sum(run.summary is not None for run in group[1])),
    Column("mean loss (nats)", "number", _over_seeds("val_loss_nats", fmean)),
    Column("sd", "number", _over_seeds("val_loss_nats", stdev, least=2)),
    Column("least", "number", _over_seeds("val_loss_nats", min)),
    Column("greatest", "number", _over_seeds("val_loss_nats", max)),
    Column("bits per byte", "number", _over_seeds("val_bits_per_byte", fmean)),
    Column("steps", "count", _over_seeds("steps", max)),
    Column("tokens", "si", _over_seeds("tokens", fmean)),
    Column("training time", "seconds", _over_seeds("train_seconds", fmean)),
    Column("time to target", "seconds", _over_seeds("target_seconds", fmean)),
)


def table(columns: Sequence[Column], things: Sequence[Any]) -> dict[str, Any]:
    """One row a thing; columns that know nothing of any are left out."""
    cells = [[column.value(thing) for thing in things] for column in columns]
    known = [i for i, values in enumerate(cells) if any(value is not None for value in values)]
    return {"columns": [{"label": columns[i].label, "kind": columns[i].kind} for i in known],
            "rows": [[short(cells[i][row]) for i in known] for row in range(len(things))]}


def run_table(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """What each run came to."""
    return table(RUN_COLUMNS, runs)


def experiment_table(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """What the seeds of each experiment came to."""
    return table(EXPERIMENT_COLUMNS, list(by_experiment(runs).items()))


def difference_table(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """The settings, and entries of the environment, in which the runs differ."""
    found = {name: values for name, values in differences(runs).items() if name not in UNTOLD}
    columns = [Column(name, "text", lambda i, values=values: _spelled(values[i])) for name, values in found.items()]
    return table([Column("run", "text", lambda i: runs[i].name), *columns], range(len(runs)))


def _spelled(value: Any) -> Any:
    """Text and numbers as they are, all else as JSON; an absent setting is a dash."""
    if value is None or isinstance(value, str | int | float) and not isinstance(value, bool):
        return "–" if value is None else value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | Mapping) else str(value)
