"""Measure what each technique contributes: train ablation rows or points of a search space over several seeds.

    python -m scripts.ablate no_smear no_bigram
    python -m scripts.ablate --each-off tiny --seeds 5
    python -m scripts.ablate --base bytes --grid optim.matrix.lr=0.01,0.02,0.04
    python -m scripts.ablate --random 20 --range optim.matrix.lr=0.003:0.1:log

The rows are in configs/ablations.py. Flags after `--` apply to every run. To continue a sweep that was interrupted, give
the same command again.
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
from configs.notation import nearest, raise_if
from configs.presets import PRESETS
from data.run.folder import write_json
from scripts import command, format_value, print_table, print_wrapped
from scripts.lab.folders import UNITS, Metric
from scripts.lab.statistics import Difference, holm, summarize, welch
from scripts.lab.sweep import Trial, TrialResult, run_sweep
from scripts.lab.tuning import draw, flags_of, parse_grid, parse_range


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablate:
    """Settings to vary, seeds, and the folder of the runs."""

    rows: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ROW ...")] = ()
    """Rows of configs/ablations.py; each is compared with its base preset."""
    each_off: str = ""
    """Preset for a leave-one-out ablation: one experiment without each of its techniques."""
    grid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE,VALUE,...: train every combination of these values, starting from --base."""
    random: int = 0
    """Number of points to draw from the ranges, starting from --base."""
    range: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=LOW:HIGH:SCALE, with a SCALE of linear, log or one_minus (logarithmic in 1 - value)."""
    quasi: bool = False
    """Draw by a scrambled Halton sequence, which covers the ranges more evenly than independent draws."""
    base: str = "tiny"
    """Preset that --grid and --random vary."""
    sweep_seed: int = 1
    """Random seed of the draws."""
    seeds: int = 3
    """Number of runs of each experiment, with different seeds."""
    first_seed: int = 1
    """Seed of the first run; the next runs have first_seed + 1, first_seed + 2, ..."""
    jobs: int = 1
    """Number of runs at the same time."""
    nproc: int = 1
    """Processes of one run, which is one per GPU."""
    dir: Path | None = None
    """Folder of the runs; None: runs/ablate-... with a name for what is varied."""
    retry_failed: bool = False
    """Train runs that failed before once more."""


class Experiment(NamedTuple):
    """One row of the table: its runs, and its baseline."""

    name: str
    preset: str
    flags: tuple[str, ...]
    base: str | None
    """Name of the experiment that is its baseline; None: not compared."""
    settings: dict[str, object]
    """Point of the search space by dotted names; empty for ablation rows."""


def make_experiments(args: Ablate, run_flags: Sequence[str]) -> list[Experiment]:
    """Return the experiments that the arguments name, baselines first.

    Raises ValueError if the arguments name no experiment, two kinds at once, or an unknown preset.
    """
    kinds = {"ROW": args.rows, "--each-off": args.each_off, "--grid": args.grid, "--random": args.random}
    given = [name for name, value in kinds.items() if value]
    raise_if(len(given) != 1, f"choose exactly one of {', '.join(kinds)}; got {' and '.join(given) or 'none'}")
    raise_if(bool(args.range) and not args.random, "--range needs --random N, the number of points to draw from it")
    raise_if(args.seeds < 1, f"--seeds must be at least 1, got {args.seeds}")
    for preset in filter(None, [args.each_off, args.base]):
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}{nearest(preset, list(PRESETS))}")
    return search_experiments(args, run_flags) if args.grid or args.random else row_experiments(args, run_flags)


def row_experiments(args: Ablate, run_flags: Sequence[str]) -> list[Experiment]:
    """Return the ablation rows, preceded by their base presets, each of which appears once."""
    if args.each_off:
        rows = leave_one_out_rows(parse_row(args.each_off, run_flags))
    else:
        rows = [find_row(name) for name in dict.fromkeys(args.rows)]
    bases = [Experiment(base, base, tuple(run_flags), None, {}) for base in dict.fromkeys(row.base for row in rows)]
    return bases + [Experiment(row.name, row.base, (*run_flags, *row.flags.split()), row.base, {}) for row in rows]


def search_experiments(args: Ablate, run_flags: Sequence[str]) -> list[Experiment]:
    """Return one experiment per point: the combinations of the grids, or the draws from the ranges."""
    if args.grid:
        axes = dict(parse_grid(text) for text in args.grid)
        points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        names = [point_name(point) for point in points]
    else:
        ranges = [parse_range(text) for text in args.range]
        raise_if(not ranges, "--random needs --range NAME=LOW:HIGH:SCALE, once for every setting to draw")
        points = draw(ranges, args.random, seed=args.sweep_seed, quasi=args.quasi)
        names = [f"draw{number:03}" for number in range(1, args.random + 1)]
    return [Experiment(name, args.base, (*run_flags, *flags_of(point)), None, point)
            for name, point in zip(names, points, strict=True)]


def point_name(settings: dict[str, str]) -> str:
    """Return a name for a point that can name a folder: `matrix.lr=0.02_head.lr=0.01`."""
    text = "_".join(f"{name.partition('.')[2] or name}={value}" for name, value in settings.items())
    return re.sub(r"[^\w.=+-]+", "_", text)


def make_trials(experiments: Sequence[Experiment], *, first_seed: int, seeds: int) -> list[Trial]:
    """Return the runs of all experiments, ordered by seed."""
    # Seeds in the outer loop: if the machine is slow for an hour, all experiments are slowed alike.
    return [Trial(f"{experiment.name}-seed{seed}", experiment.name, experiment.preset, experiment.flags, seed)
            for seed in range(first_seed, first_seed + seeds) for experiment in experiments]


def default_dir(args: Ablate) -> Path:
    """Return runs/ablate-rows, runs/ablate-PRESET, runs/ablate-PRESET-grid or runs/ablate-PRESET-random."""
    if args.grid or args.random:
        return Path("runs") / f"ablate-{args.base}-{'grid' if args.grid else 'random'}"
    return Path("runs") / f"ablate-{args.each_off or 'rows'}"


# ---- The effects ----------------------------------------------------------------------------------------------------


ALPHA = 0.05


class Effect(NamedTuple):
    """One row of the table and of ablation.json: final losses over seeds, and their difference from the baseline's."""

    name: str
    base: str | None
    flags: tuple[str, ...]
    n: int
    """Number of runs with a final loss."""
    mean: float | None
    sd: float | None
    difference: float | None
    """Mean minus the baseline's mean; below 0: the row has the lower loss."""
    low: float | None
    """Lower bound of the difference's 95 % confidence interval."""
    high: float | None
    p: float | None
    """p-value of Welch's t-test."""
    p_holm: float | None
    """The same p-value after Holm's correction for all rows that were tested."""
    seconds_difference: float | None
    """Mean training time minus the baseline's."""
    verdict: str


def choose_metric(outcomes: Sequence[TrialResult]) -> Metric:
    """Return bits per byte if all finished runs have it, else nats per token."""
    runs = [outcome.run for outcome in outcomes if outcome.run]
    known = all(run.summary.get("val_bits_per_byte") is not None for run in runs)
    return "val_bits_per_byte" if runs and known else "val_loss_nats"


def measure_effects(outcomes: Sequence[TrialResult], baselines: Mapping[str, str | None], metric: Metric) -> list[Effect]:
    """Return an effect for each key of `baselines`, which maps an experiment to its baseline or None."""
    rows = [measure_effect(name, base, outcomes, metric) for name, base in baselines.items()]
    corrected = holm([row.p for row in rows])
    return [row._replace(p_holm=p, verdict=effect_verdict(row, p, outcomes)) for row, p in zip(rows, corrected, strict=True)]


def measure_effect(name: str, base: str | None, outcomes: Sequence[TrialResult], metric: Metric) -> Effect:
    """Return the effect of one experiment, without Holm's correction and verdict, which need all rows."""
    losses, base_losses = final_values(outcomes, name, metric), final_values(outcomes, base, metric)
    summary = summarize(losses) if losses else None
    test = welch(losses, base_losses) if losses and base_losses else Difference(None, None, None, None)
    seconds, base_seconds = final_values(outcomes, name, "train_seconds"), final_values(outcomes, base, "train_seconds")
    slower = statistics.fmean(seconds) - statistics.fmean(base_seconds) if seconds and base_seconds else None
    flags = next(outcome.trial.flags for outcome in outcomes if outcome.trial.experiment == name)
    return Effect(name, base, flags, len(losses), summary and summary.mean, summary and summary.sd, *test, None, slower, "")


def final_values(outcomes: Sequence[TrialResult], experiment: str | None, key: str) -> list[float]:
    """Return the summary entry `key` of the experiment's finished runs that have it."""
    runs = [outcome.run for outcome in outcomes if outcome.trial.experiment == experiment and outcome.run]
    return [run.summary[key] for run in runs if run.summary.get(key) is not None]


def effect_verdict(row: Effect, p_holm: float | None, outcomes: Sequence[TrialResult]) -> str:
    """Return the verdict of a row, with the errors of its failed runs, which mean and test leave out.

    `helps` or `hurts`: the corrected p-value is below ALPHA. `perhaps helps` or `perhaps hurts`: the uncorrected one only,
    as in one of twenty rows without effect. Keep these words: the report's page colours rows by them.
    """
    errors = [outcome.error for outcome in outcomes
              if outcome.trial.experiment == row.name and outcome.status == "failed"]
    if row.n == 0:
        return f"failed: {errors[0] if errors else 'no loss was measured'}"
    if row.base is None:
        verdict = ""
    elif p_holm is None:
        verdict = "too few runs to test"
    elif row.p >= ALPHA:
        verdict = "no difference seen"
    else:
        verdict = ("" if p_holm < ALPHA else "perhaps ") + ("helps" if row.difference < 0 else "hurts")
    failed = f"{len(errors)} failed: {errors[0]}" if errors else ""
    return "; ".join(filter(None, [verdict, failed]))


# ---- The table ------------------------------------------------------------------------------------------------------


def effects_table(rows: Sequence[Effect]) -> Table:
    """Return a table of differences from the baseline, one row per experiment. `effects_legend` explains the columns."""
    # Without padding, so that eight columns fit in 80.
    table = Table("experiment", "Δ mean\nloss", "± 95 %\ninterval", "p-value\n(Welch)", "p-value\n(Holm)", "Δ time\n(s)",
                  "n", "verdict", box=box.SIMPLE, padding=0, pad_edge=False)
    table.columns[0].overflow, table.columns[-1].min_width = "fold", len("no difference seen")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for row in rows:
        half_width = None if row.low is None else (row.high - row.low) / 2
        table.add_row(row.name, format_value(row.difference, "+.4f"), format_value(half_width, ".4f"),
                      format_value(row.p, ".2g"), format_value(row.p_holm, ".2g"),
                      format_value(row.seconds_difference, "+.1f"), str(row.n), row.verdict)
    return table


def effects_legend(rows: Sequence[Effect], metric: Metric) -> list[str]:
    """Return sentences on the columns of `effects_table`."""
    tests = sum(row.p is not None for row in rows)
    return [f"Δ mean loss: mean final loss in {UNITS[metric]} minus the baseline's (below 0 is better), with half the width "
            "of its 95 % confidence interval. Δ time: mean training time minus the baseline's. n: runs.",
            f"p-values: Welch's t-test, before and after Holm's correction (rows tested: {tests}). helps, hurts: p (Holm) "
            f"below {ALPHA:g}; perhaps: only p (Welch) below {ALPHA:g}."]


def settings_table(rows: Sequence[Effect], points: Mapping[str, Mapping[str, object]], metric: Metric) -> Table:
    """Return a table of the points of a search space, one column per setting, the lowest mean loss first."""
    table = Table(*next(iter(points.values())), f"mean loss\n({UNITS[metric]})", "standard\ndeviation", "n", "",
                  box=box.SIMPLE)
    for row in sorted(rows, key=lambda row: (row.mean is None, row.mean)):  # points without a mean come last
        table.add_row(*(str(value) for value in points[row.name].values()), format_value(row.mean, ".5f"),
                      format_value(row.sd, ".5f"), str(row.n), row.verdict)
    return table


# ---- The command line -----------------------------------------------------------------------------------------------


def main(args: Ablate, run_flags: Sequence[str]) -> None:
    """Run the sweep, print its table and write ablation.json. Raises ValueError for experiments that cannot be run."""
    experiments, dir = make_experiments(args, run_flags), args.dir or default_dir(args)
    outcomes = run_sweep(make_trials(experiments, first_seed=args.first_seed, seeds=args.seeds), dir=dir, jobs=args.jobs,
                         nproc=args.nproc, retry_failed=args.retry_failed)
    metric = choose_metric(outcomes)
    points = {experiment.name: experiment.settings for experiment in experiments if experiment.settings}
    # The baselines of ablation rows get no row of their own; points of a search space have no baseline.
    rows = measure_effects(outcomes, {experiment.name: experiment.base for experiment in experiments
                                      if experiment.base or experiment.settings}, metric)
    print_table(settings_table(rows, points, metric) if points else effects_table(rows))
    print_wrapped([] if points else effects_legend(rows, metric))
    presets = ", ".join(dict.fromkeys(experiment.preset for experiment in experiments))
    write_json(dir / "ablation.json", {"base": presets, "metric": metric, "rows": rows})
    print(f"all numbers: {dir / 'ablation.json'}")


if __name__ == "__main__":
    command(main, Ablate, __doc__, flags=True)
