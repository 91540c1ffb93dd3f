"""What the rows of an ablation did: differences from the baseline over seeds, tested and named."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from scripts.lab.folders import RunFolder
from scripts.lab.statistics import Difference, holm, summarize, welch
from scripts.lab.sweep import Outcome

ALPHA = 0.05
Metric = Literal["val_bits_per_byte", "val_loss_nats"]
UNITS: dict[str, str] = {"val_bits_per_byte": "bits per byte", "val_loss_nats": "nats"}


class Effect(NamedTuple):
    """A row of the table: the sample's size, mean and deviation, and its difference from the baseline."""

    name: str
    base: str | None
    flags: tuple[str, ...]
    n: int
    mean: float | None
    sd: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    seconds_difference: float | None
    verdict: str


def choose_metric(outcomes: Sequence[Outcome]) -> Metric:
    """Bits per byte, unless a run has none: then nats per token."""
    runs = [outcome.run for outcome in outcomes if outcome.run]
    known = all(run.summary.get("val_bits_per_byte") is not None for run in runs)
    return "val_bits_per_byte" if runs and known else "val_loss_nats"


def effects(outcomes: Sequence[Outcome], bases: Mapping[str, str | None], metric: Metric) -> list[Effect]:
    """An effect for each experiment of `bases`, which names the experiment that it is held against, or None.

    p_holm is corrected for all rows that were tested.
    """
    rows = [_effect(name, base, outcomes, metric) for name, base in bases.items()]
    tested = [row.name for row in rows if row.p is not None]
    corrected = dict(zip(tested, holm([row.p for row in rows if row.p is not None]), strict=True))
    return [_judged(row._replace(p_holm=corrected.get(row.name)), outcomes) for row in rows]


def _effect(name: str, base: str | None, outcomes: Sequence[Outcome], metric: Metric) -> Effect:
    values, seconds = _sample(outcomes, name, metric), _sample(outcomes, name, "train_seconds")
    others, other_seconds = _sample(outcomes, base, metric), _sample(outcomes, base, "train_seconds")
    mean = summarize(values) if values else None
    against = welch(values, others) if values and others else Difference(None, None, None, None)
    slower = statistics.fmean(seconds) - statistics.fmean(other_seconds) if seconds and other_seconds else None
    flags = next(outcome.trial.flags for outcome in outcomes if outcome.trial.experiment == name)
    return Effect(name, base, flags, len(values), mean and mean.mean, mean and mean.sd, *against, None, slower, "")


def _sample(outcomes: Sequence[Outcome], experiment: str | None, key: str) -> list[float]:
    """What the experiment's finished runs say of `key`, where they know it."""
    runs: list[RunFolder] = [one.run for one in outcomes if one.trial.experiment == experiment and one.run]
    return [run.summary[key] for run in runs if run.summary.get(key) is not None]


def _judged(row: Effect, outcomes: Sequence[Outcome]) -> Effect:
    """With the verdict on what the row changes: `helps` where its loss is lower, by Holm's p; `perhaps` where only its own p
    says so, as one row in twenty without effect would."""
    errors = [one.error for one in outcomes if one.trial.experiment == row.name and one.status == "failed"]
    if row.n == 0:
        return row._replace(verdict=f"failed: {errors[0] if errors else 'no loss was measured'}")
    if row.base is None:
        word = ""
    elif row.p_holm is None:
        word = "too few runs to tell"
    else:
        word = "helps" if row.difference < 0 else "hurts"
        word = "no difference seen" if row.p >= ALPHA else word if row.p_holm < ALPHA else f"perhaps {word}"
    failed = f"{len(errors)} failed: {errors[0]}" if errors else ""
    return row._replace(verdict="; ".join(filter(None, [word, failed])))


def effects_json(rows: Sequence[Effect], metric: Metric, base: str) -> dict[str, Any]:
    """Every number of the table, by name."""
    return {"base": base, "metric": metric, "rows": [row._asdict() for row in rows]}


def effects_table(rows: Sequence[Effect], metric: Metric) -> Any:
    """The rich table of differences from the baseline."""
    from rich import box
    from rich.table import Table

    found = Table("technique", f"Δ {UNITS[metric]}", "95 % interval", "p (Welch)", "p (Holm)", "Δ seconds", "n",
                  "verdict", box=box.SIMPLE)
    for row in rows:
        interval = "" if row.low is None else f"{row.low:+.4f} to {row.high:+.4f}"
        found.add_row(row.name, _spelled(row.difference, "+.4f"), interval, _spelled(row.p, ".2g"),
                      _spelled(row.p_holm, ".2g"), _spelled(row.seconds_difference, "+.1f"), str(row.n), row.verdict)
    return found


def settings_table(rows: Sequence[Effect], settings: Mapping[str, Mapping[str, object]], metric: Metric) -> Any:
    """The rich table of a space: a column a setting, the lowest mean loss first."""
    from rich import box
    from rich.table import Table

    columns = list(next(iter(settings.values())))
    found = Table(*columns, UNITS[metric], "sd", "n", "", box=box.SIMPLE)
    for row in best_first(rows):
        found.add_row(*(str(value) for value in settings[row.name].values()), _spelled(row.mean, ".5f"),
                      _spelled(row.sd, ".5f"), str(row.n), row.verdict)
    return found


def best_first(rows: Sequence[Effect]) -> list[Effect]:
    """By mean loss; what has none comes last."""
    return sorted(rows, key=lambda row: (row.mean is None, row.mean))


def _spelled(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
