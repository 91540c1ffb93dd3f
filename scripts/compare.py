"""Is the difference real? Runs held against each other over seeds: losses, steps and seconds to a target.

    python -m scripts.compare runs/muon-seed* --vs runs/adamw-seed*
    python -m scripts.compare runs/speedrun-seed* --target 3.28
    python -m scripts.compare runs

Runs are folders, patterns, or folders of runs. Without --vs, every experiment stands in the table on its own.
"""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from data.run.folder import write_json
from scripts import command
from scripts.lab import comparison
from scripts.lab.comparison import Comparison, Metric, Sample, Side
from scripts.lab.folders import RunFolder, by_experiment, find_runs
from scripts.lab.statistics import SIGMA, TargetTest, against_target

WIDTH = 120  # of a table that goes into a file or a pipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """What to compare, and by which rule."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The runs of side A."""
    vs: tuple[str, ...] = ()
    """The runs of side B, the baseline."""
    metric: Metric = "val_loss_nats"
    """val_bits_per_byte compares across tokenizers too."""
    target: float | None = None
    """Validation loss to be reached, in the metric's unit; None: the target in nats that all the runs were given."""
    nats_per_step: float | None = None
    """Fall of the loss, in the metric's unit, that one more step is worth; None: that of the baseline's last quarter of
    validations, where the cooldown makes it steeper than what a longer schedule gains."""
    alpha: float = 0.05
    """A difference counts from p below this."""
    power: float = 0.8
    """Probability with which the seeds that are asked for would show a difference of the present size."""
    sigma: float = SIGMA
    """Known deviation of the final loss between seeds, in nats, for the rule (target - mean) sqrt(n) >= margin."""
    margin: float | None = None
    """That rule's margin in nats; None: 0.004 for a sigma of 0.0013, and in proportion."""
    json: Path | None = None
    """Write all numbers to this file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that was found."""

    samples: dict[str, list[Sample]]
    """Measure to one sample a side."""
    comparisons: list[Comparison]
    """The final loss first; none without a second side."""
    target: float | None
    target_tests: list[TargetTest]
    """Per side: the one-sided t-test and the rule of the known sigma against the target."""
    loss_per_step: float | None
    notes: list[str]
    verdict: str


def refuse_senseless(args: Compare) -> None:
    """Raise ValueError naming an argument out of its range."""
    if not args.runs:
        raise ValueError("name the runs to compare: folders, patterns, or folders of runs such as runs/")
    for name in ("alpha", "power"):
        if not 0 < getattr(args, name) < 1:
            raise ValueError(f"--{name} must lie between 0 and 1, got {getattr(args, name)}")
    for name in ("nats_per_step", "sigma", "margin", "target"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be a number above 0, got {value}")


def examine(args: Compare) -> Report:
    """Everything about the runs that the arguments name. Raises ValueError for runs that cannot be compared."""
    refuse_senseless(args)
    ours = find_runs(args.runs)
    sides = list(comparison.make_sides(ours, find_runs(args.vs))) if args.vs else [
        comparison.make_side(label, group) for label, group in by_experiment(ours).items()]
    runs = [run for side in sides for run in side.runs]
    notes = [note for side in sides for note in comparison.cautions(side)] + judged_alike(sides, args)
    notes += comparison.same_setting(*sides) if args.vs else []
    target = args.target
    if target is None and args.metric == "val_loss_nats":
        target = comparison.common_target(runs)
    samples = {name: [comparison.sample(side, measure) for side in sides]
               for name, measure in measures(args, target, runs, notes).items()}
    comparisons = [comparison.compare(name, *pair) for name, pair in samples.items()] if args.vs else []
    notes += [note for pair in samples.items() for note in unreached(*pair)]
    tests = [against_target(one.label, one.values, target, sigma=known_sigma(args), margin=args.margin)
             for one in samples["final loss"]] if target is not None else []
    notes += [note for one in samples["final loss"] if tests for note in comparison.doubtful_sigma(one, known_sigma(args))]
    rate = (args.nats_per_step or comparison.loss_per_step(sides[-1].runs, args.metric)) if args.vs else None
    sentences = [comparison.verdict(comparisons[0], args, rate)] if args.vs else []
    sentences += [comparison.target_sentence(test, args) for test in tests]
    return Report(samples=samples, comparisons=comparisons, target=target, target_tests=tests, loss_per_step=rate,
                  notes=notes, verdict="\n".join(sentences))


def known_sigma(args: Compare) -> float | None:
    """The deviation of final losses between seeds; none is known in bits per byte."""
    return args.sigma if args.metric == "val_loss_nats" else None


def judged_alike(sides: list[Side], args: Compare) -> list[str]:
    """Refuse losses of different texts within a comparison; between lines of a mere table, and for code, a note."""
    runs, notes = [run for side in sides for run in side.runs], []
    for group in [runs] if args.vs else [side.runs for side in sides]:
        comparison.refuse_incomparable(group, args.metric)
    try:
        comparison.refuse_incomparable(runs, args.metric)
    except ValueError as error:
        notes.append(f"the experiments are not to be held against each other: {error}")
    if code := comparison.differing(runs, ("code_hash",)):
        notes.append(f"the runs were made by {len(code['code_hash'])} versions of the code (code_hash)")
    return notes


def measures(args: Compare, target: float | None, runs: list[RunFolder], notes: list[str]) -> dict[str, Any]:
    """Name to function of a run; seconds only where all the runs had the same machine, else a note says why."""
    found = {"final loss": comparison.final_loss(args.metric)}
    if target is None:
        return found
    found[f"steps to {target:g}"] = comparison.to_target("step", args.metric, target)
    if machines := comparison.differing(runs, comparison.SAME_MACHINE):
        named = "; ".join(f"{name}: {' and '.join(values)}" for name, values in machines.items())
        notes.append(f"seconds are not compared: the machines differ ({named})")
    else:
        found[f"seconds to {target:g}"] = comparison.to_target("train_seconds", args.metric, target)
    return found


def unreached(name: str, samples: list[Sample]) -> list[str]:
    """Which samples hold runs that never got there, and what that does to their means."""
    return [f"{name}: {one.never} of {len(one.values)} runs of {one.label} never got there; mean and Welch's p leave "
            "them out and flatter that side, the rank test counts them as last" for one in samples if one.never]


def table(report: Report) -> Any:
    """The report as a rich table: for each measure a row a side, and the difference."""
    from rich import box
    from rich.table import Table

    found = Table("measure", "runs", *HEADINGS, box=box.SIMPLE)
    for column in found.columns[2:]:
        column.justify = "right"
    compared = {one.name: one for one in report.comparisons}
    for name, samples in report.samples.items():
        for one in samples:
            found.add_row(name, one.label, *sample_cells(one))
        if name in compared:
            found.add_row(name, "difference", *difference_cells(compared[name]), style="bold")
        found.add_section()
    return found


HEADINGS = ("n", "mean", "sd", "95 % interval", "p (Welch)", "p (ranks)")


def sample_cells(one: Sample) -> list[str]:
    """A sample under HEADINGS; n is "reached of all" where some never got there."""
    n = f"{len(one.values) - one.never} of {len(one.values)}" if one.never else str(len(one.values))
    if one.reached is None:
        return [n, "never", "", "", "", ""]
    return [n, digits(one.reached.mean), digits(one.reached.sd), interval(one.reached), "", ""]


def difference_cells(one: Comparison) -> list[str]:
    """A difference under HEADINGS."""
    if one.difference is None:
        return ["", "", "", "", "", f"{one.rank_p:.2g}"]
    p = "" if one.difference.p is None else f"{one.difference.p:.2g}"
    return ["", digits(one.difference.difference), "", interval(one.difference), p, f"{one.rank_p:.2g}"]


def digits(value: float | None) -> str:
    """Losses to five decimals, larger numbers to one."""
    return "" if value is None else f"{value:.5f}" if abs(value) < 20 else f"{value:.1f}"


def interval(of: Any) -> str:
    """`low to high`; nothing where it is not known."""
    return "" if of.low is None else f"{digits(of.low)} to {digits(of.high)}"


def main(args: Compare) -> None:
    """Print the table, the notes and the verdict; write the numbers if asked."""
    from rich.console import Console

    report = examine(args)
    if args.json:
        write_json(args.json, as_json(report))
    Console(width=None if sys.stdout.isatty() else WIDTH, markup=False).print(table(report))
    print("\n".join([*(f"note: {note}" for note in report.notes), *filter(None, [report.verdict])]))


def as_json(report: Report) -> dict[str, Any]:
    """The report with names for all its numbers; what never happened is null."""
    named = asdict(report)
    named["samples"] = {name: [sample_json(one) for one in samples] for name, samples in report.samples.items()}
    named["comparisons"] = [{"name": one.name, "difference": one.difference and one.difference._asdict(),
                             "rank_p": one.rank_p} for one in report.comparisons]
    named["target_tests"] = [test._asdict() for test in report.target_tests]
    return named


def sample_json(one: Sample) -> dict[str, Any]:
    """A sample with names for its numbers."""
    return {"label": one.label, "values": one.values, "never": one.never, "reached": one.reached and one.reached._asdict()}


if __name__ == "__main__":
    command(main, Compare, __doc__)
