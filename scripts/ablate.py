"""What does each technique give? Rows of an ablation table, or points of a space, over seeds, in one sweep.

    python -m scripts.ablate no_smear no_bigram
    python -m scripts.ablate --each-off tiny --seeds 5
    python -m scripts.ablate --base bytes --grid optim.matrix.lr=0.01,0.02,0.04 --seeds 2
    python -m scripts.ablate --base bytes --random 20 --range optim.matrix.lr=0.003:0.1:log -- --train.steps 120

Rows stand in configs/ablations.py; flags after `--` go to every run. A sweep that was cut continues when the same command
is given again.
"""

import itertools
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from rich import box
from rich.table import Table

from configs.ablations import find_row, leave_one_out_rows
from configs.cli import parse_row
from configs.notation import nearest
from configs.presets import PRESETS
from data.run.folder import write_json
from scripts import command, print_table
from scripts.lab.folders import UNITS, Metric
from scripts.lab.statistics import Difference, holm, summarize, welch
from scripts.lab.sweep import Trial, TrialResult, run_sweep
from scripts.lab.tuning import draw, flags_of, parse_grid, parse_range


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablate:
    """What to vary, over how many seeds, and where."""

    rows: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Rows of configs/ablations.py, each held against its base preset."""
    each_off: str = ""
    """A preset: leave out each of its techniques in turn."""
    grid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=V,V,...: every combination of these, on --base."""
    random: int = 0
    """So many points drawn from the ranges, on --base."""
    range: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=LOW:HIGH:SCALE, SCALE linear, log or one_minus."""
    quasi: bool = False
    """Draw by a scrambled Halton sequence, more even than chance."""
    base: str = "tiny"
    """The preset that grids and draws vary."""
    sweep_seed: int = 1
    """Seed of the draws."""
    seeds: int = 3
    """Runs of each experiment."""
    first_seed: int = 1
    """Seeds first_seed, first_seed + 1, ..."""
    jobs: int = 1
    """Runs at once."""
    nproc: int = 1
    """Processes (GPUs) of a run."""
    dir: Path | None = None
    """Where the runs go; None: runs/ablate-..., named after what is varied."""
    retry_failed: bool = False
    """Run again what failed before."""


class Experiment(NamedTuple):
    """What one row of the table runs, and the experiment that it is held against (None: none)."""

    name: str
    preset: str
    flags: tuple[str, ...]
    base: str | None
    settings: dict[str, object]


def experiments(args: Ablate, common: Sequence[str]) -> list[Experiment]:
    """All experiments that the arguments name, baselines first. Raises ValueError for none, or for two kinds at once."""
    kinds = {"ROW": args.rows, "--each-off": args.each_off, "--grid": args.grid, "--random": args.random}
    given = [name for name, value in kinds.items() if value]
    if len(given) != 1:
        raise ValueError(f"say what to vary by one of {', '.join(kinds)}; got {' and '.join(given) or 'none'}")
    if args.range and not args.random:
        raise ValueError("--range needs --random N, the number of points to draw from it")
    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
    for preset in filter(None, [args.each_off, args.base]):
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}{nearest(preset, list(PRESETS))}")
    return points(args, common) if args.grid or args.random else leave_outs(args, common)


def leave_outs(args: Ablate, common: Sequence[str]) -> list[Experiment]:
    """The rows, with their base presets before them, each base once."""
    if args.each_off:
        rows = leave_one_out_rows(parse_row(args.each_off, common))
    else:
        rows = [find_row(name) for name in dict.fromkeys(args.rows)]
    bases = [Experiment(base, base, tuple(common), None, {}) for base in dict.fromkeys(row.base for row in rows)]
    return bases + [Experiment(row.name, row.base, (*common, *row.flags.split()), row.base, {}) for row in rows]


def points(args: Ablate, common: Sequence[str]) -> list[Experiment]:
    """The combinations of the grids, or the draws from the ranges."""
    if args.grid:
        axes = dict(parse_grid(text) for text in args.grid)
        settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        names = [point_name(one) for one in settings]
    else:
        ranges = [parse_range(text) for text in args.range]
        if not ranges:
            raise ValueError("--random needs --range NAME=LOW:HIGH:SCALE, once for every setting to draw")
        settings = draw(ranges, args.random, seed=args.sweep_seed, quasi=args.quasi)
        names = [f"draw{number:03}" for number in range(1, args.random + 1)]
    return [Experiment(name, args.base, (*common, *flags_of(one)), None, one)
            for name, one in zip(names, settings, strict=True)]


def point_name(settings: dict[str, str]) -> str:
    """A folder's name for a point: `matrix.lr=0.02_head.lr=0.01`."""
    text = "_".join(f"{name.partition('.')[2] or name}={value}" for name, value in settings.items())
    return re.sub(r"[^\w.=+-]+", "_", text)


def trials(found: Sequence[Experiment], *, first_seed: int, seeds: int) -> list[Trial]:
    """Seed by seed over all experiments, so that a slow spell of the machine hits all alike."""
    return [Trial(f"{one.name}-seed{seed}", one.name, one.preset, one.flags, seed)
            for seed in range(first_seed, first_seed + seeds) for one in found]


def default_dir(args: Ablate) -> Path:
    """runs/ablate-rows, runs/ablate-PRESET, runs/ablate-PRESET-grid or runs/ablate-PRESET-random."""
    if args.grid or args.random:
        return Path("runs") / f"ablate-{args.base}-{'grid' if args.grid else 'random'}"
    return Path("runs") / f"ablate-{args.each_off or 'rows'}"


def main(args: Ablate, common: Sequence[str]) -> None:
    """Run the sweep, print its table and write ablation.json. Raises ValueError for what cannot be run."""
    found, dir = experiments(args, common), args.dir or default_dir(args)
    outcomes = run_sweep(trials(found, first_seed=args.first_seed, seeds=args.seeds), dir=dir, jobs=args.jobs,
                         nproc=args.nproc, retry_failed=args.retry_failed)
    metric = choose_metric(outcomes)
    settings = {one.name: one.settings for one in found if one.settings}
    bases = {one.name: one.base for one in found if one.base or one.settings}
    rows = effects(outcomes, bases, metric)
    table = settings_table(rows, settings, metric) if settings else effects_table(rows, metric)
    print_table(table)
    base = ", ".join(dict.fromkeys(one.preset for one in found))
    write_json(dir / "ablation.json", {"base": base, "metric": metric, "rows": [row._asdict() for row in rows]})
    print(f"numbers: {dir / 'ablation.json'}")


# ---- What the rows did ----------------------------------------------------------------------------------------------


ALPHA = 0.05


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


def choose_metric(outcomes: Sequence[TrialResult]) -> Metric:
    """Bits per byte, unless a run has none: then nats per token."""
    runs = [outcome.run for outcome in outcomes if outcome.run]
    known = all(run.summary.get("val_bits_per_byte") is not None for run in runs)
    return "val_bits_per_byte" if runs and known else "val_loss_nats"


def effects(outcomes: Sequence[TrialResult], bases: Mapping[str, str | None], metric: Metric) -> list[Effect]:
    """An effect for each experiment of `bases`, which names the experiment that it is held against, or None.

    p_holm is corrected for all rows that were tested.
    """
    rows = [_effect(name, base, outcomes, metric) for name, base in bases.items()]
    corrected = holm([row.p for row in rows])
    return [_judged(row._replace(p_holm=p), outcomes) for row, p in zip(rows, corrected, strict=True)]


def _effect(name: str, base: str | None, outcomes: Sequence[TrialResult], metric: Metric) -> Effect:
    values, seconds = _sample(outcomes, name, metric), _sample(outcomes, name, "train_seconds")
    others, other_seconds = _sample(outcomes, base, metric), _sample(outcomes, base, "train_seconds")
    mean = summarize(values) if values else None
    against = welch(values, others) if values and others else Difference(None, None, None, None)
    slower = statistics.fmean(seconds) - statistics.fmean(other_seconds) if seconds and other_seconds else None
    flags = next(outcome.trial.flags for outcome in outcomes if outcome.trial.experiment == name)
    return Effect(name, base, flags, len(values), mean and mean.mean, mean and mean.sd, *against, None, slower, "")


def _sample(outcomes: Sequence[TrialResult], experiment: str | None, key: str) -> list[float]:
    """What the experiment's finished runs say of `key`, where they know it."""
    runs = [one.run for one in outcomes if one.trial.experiment == experiment and one.run]
    return [run.summary[key] for run in runs if run.summary.get(key) is not None]


def _judged(row: Effect, outcomes: Sequence[TrialResult]) -> Effect:
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


def effects_table(rows: Sequence[Effect], metric: Metric) -> Table:
    """The table of differences from the baseline."""
    found = Table("technique", f"Δ {UNITS[metric]}", "95 % interval", "p (Welch)", "p (Holm)", "Δ seconds", "n",
                  "verdict", box=box.SIMPLE)
    for row in rows:
        interval = "" if row.low is None else f"{row.low:+.4f} to {row.high:+.4f}"
        found.add_row(row.name, _spelled(row.difference, "+.4f"), interval, _spelled(row.p, ".2g"),
                      _spelled(row.p_holm, ".2g"), _spelled(row.seconds_difference, "+.1f"), str(row.n), row.verdict)
    return found


def settings_table(rows: Sequence[Effect], settings: Mapping[str, Mapping[str, object]], metric: Metric) -> Table:
    """The table of a space: a column a setting, the lowest mean loss first."""
    found = Table(*next(iter(settings.values())), UNITS[metric], "sd", "n", "", box=box.SIMPLE)
    for row in sorted(rows, key=lambda row: (row.mean is None, row.mean)):  # what has no mean comes last
        found.add_row(*(str(value) for value in settings[row.name].values()), _spelled(row.mean, ".5f"),
                      _spelled(row.sd, ".5f"), str(row.n), row.verdict)
    return found


def _spelled(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


if __name__ == "__main__":
    command(main, Ablate, __doc__, flags=True)
