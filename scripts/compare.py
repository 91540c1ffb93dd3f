"""Is the difference real? Runs held against each other over seeds: losses, steps and seconds to a target.

    python -m scripts.compare runs/muon-seed* --vs runs/adamw-seed*
    python -m scripts.compare runs/speedrun-seed* --target 3.28
    python -m scripts.compare runs

Runs are folders, patterns, or folders of runs. Without --vs, every experiment stands in the table on its own.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from rich import box
from rich.table import Table
from scipy import stats

from configs.serialize import HASH_IGNORES
from data.run.folder import write_json
from data.run.metrics import VAL_BITS, VAL_LOSS
from scripts import command, print_table
from scripts.lab import statistics
from scripts.lab.folders import UNITS, Metric, RunFolder, by_experiment, common_target, differences, find_runs
from scripts.lab.statistics import SIGMA, Difference, Summary, TargetTest

CURVES: dict[Metric, str] = {"val_loss_nats": VAL_LOSS, "val_bits_per_byte": VAL_BITS}
NEVER = math.inf  # the loss of a run that broke down, the steps of one that never reached the target
RECORD_P = 0.01  # the speedrun takes a record at a p below this

# What two runs must share for their losses to be of the same text. Nats per token need the same tokens in the same
# windows (data_hash covers the files, wherever they lie); bits per byte, under different tokenizers, the same text.
# An embedded text is that of the Python version.
SAME_TOKENS = ("data_hash", "data.val_bytes", "data.val_tokens", "data.val_sequence_tokens")
SAME_TEXT = ("data.source", "data.corpus", "data.train_files", "data.val_files", "data.val_bytes", "data.val_tokens",
             "env.python")
SAME_MACHINE = ("device", "world_size", "env.cpu", "env.gpus", "env.torch_threads")


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


class Side(NamedTuple):
    """Runs that stand for one thing: seeds of one experiment, if all is well."""

    label: str
    runs: Sequence[RunFolder]


class Sample(NamedTuple):
    """One measure of one side's runs."""

    label: str
    values: list[float]
    """One a run, NEVER among them."""
    never: int
    """How many runs have no finite value."""
    reached: Summary | None
    """Of those that are finite; None where there are none."""


class Comparison(NamedTuple):
    """One measure of both sides: Welch's test on the finite values, and a rank test on all, NEVER being the largest."""

    name: str
    a: Sample
    b: Sample
    difference: Difference | None
    """Mean of A minus mean of B; None where a side has no finite value."""
    rank_p: float

    @property
    def p(self) -> float | None:
        """Welch's p; where a run never got there, the rank test's, which leaves none out."""
        if self.a.never + self.b.never:
            return self.rank_p
        return self.difference.p


class Report(NamedTuple):
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


def examine(args: Compare) -> Report:
    """Everything about the runs that the arguments name. Raises ValueError for runs that cannot be compared."""
    check_arguments(args)
    sides = make_sides(args)
    runs = [run for side in sides for run in side.runs]
    notes = [note for side in sides for note in cautions(side)] + judged_alike(sides, args)
    target = args.target
    if target is None and args.metric == "val_loss_nats":
        target = common_target(run.summary for run in runs)
    samples = {name: [sample(side, measure) for side in sides]
               for name, measure in measures(args, target, runs, notes).items()}
    notes += [note for pair in samples.items() for note in unreached(*pair)]
    tests = []
    if target is not None:
        finals = samples["final loss"]
        sigma = args.sigma if args.metric == "val_loss_nats" else None  # none is known in bits per byte
        tests = [statistics.against_target(one.label, one.values, target, sigma=sigma, margin=args.margin) for one in finals]
        notes += [note for one in finals for note in doubtful_sigma(one, sigma)]
    sentences, comparisons, rate = [], [], None
    if args.vs:
        comparisons = [compare(name, *pair) for name, pair in samples.items()]
        rate = args.nats_per_step or loss_per_step(sides[-1].runs, args.metric)
        sentences.append(verdict(comparisons[0], args, rate))
    sentences += [target_sentence(test, args) for test in tests]
    return Report(samples, comparisons, target, tests, rate, notes, "\n".join(sentences))


# ---- What may be compared -------------------------------------------------------------------------------------------


def check_arguments(args: Compare) -> None:
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


def make_sides(args: Compare) -> list[Side]:
    """A and B under different labels, or without --vs a side an experiment. Raises ValueError for a run that has not ended,
    and for one on both sides."""
    a, b = find_runs(args.runs), find_runs(args.vs)
    for run in (*a, *b):
        if run.summary is None:
            raise ValueError(f"{run.path} has no summary.json: that run has not ended; wait for it, continue it with "
                             "--run.resume, or leave it out")
    if not args.vs:
        return [Side(label, group) for label, group in by_experiment(a).items()]
    if both := {run.path.resolve() for run in a} & {run.path.resolve() for run in b}:
        raise ValueError(f"{min(both)} is on both sides")
    labels = [name_of(a) or "A", name_of(b) or "B"]
    if labels[0] == labels[1]:
        labels = [f"{labels[0]} (A)", f"{labels[1]} (B)"]
    return [Side(labels[0], a), Side(labels[1], b)]


def name_of(runs: Sequence[RunFolder]) -> str:
    """The runs' experiment; empty where they are of several."""
    experiments = list(by_experiment(runs))
    return experiments[0] if len(experiments) == 1 else ""


def fact(run: RunFolder, name: str) -> Any:
    """A setting (dotted), an environment entry (`env.NAME`) or an entry of the summary; None where it is not known."""
    if name == "data.val_sequence_tokens":  # None: as in training
        return run.config.get(name) or run.config.get("data.sequence_tokens")
    if name.startswith("env."):
        return run.environment.get(name.removeprefix("env."))
    return run.config.get(name) if "." in name else run.summary.get(name)


def differing(runs: Sequence[RunFolder], names: Sequence[str]) -> dict[str, list[str]]:
    """The facts in which the runs differ: name to the different values, as JSON."""
    found = {name: list(dict.fromkeys(json.dumps(fact(run, name)) for run in runs)) for name in names}
    return {name: values for name, values in found.items() if len(values) > 1}


def spell(facts: dict[str, list[str]]) -> str:
    """`name: value and value; ...`."""
    return "; ".join(f"{name}: {' and '.join(values)}" for name, values in facts.items())


def check_comparable(runs: Sequence[RunFolder], metric: Metric) -> None:
    """Raise ValueError naming what differs where the runs' losses were not measured on the same text or tokens."""
    for run in runs:
        if run.summary["val_loss_nats"] is not None and run.summary[metric] is None:
            raise ValueError(f"{run.path} has no {metric}: its data has no tokenizer; compare --metric val_loss_nats")
    tokenizers = differing(runs, ("data.tokenizer", "data.bpe_vocab_tokens"))
    by_text = metric == "val_bits_per_byte" and tokenizers
    if others := differing(runs, SAME_TEXT if by_text else SAME_TOKENS):
        hint = "; under different tokenizers compare --metric val_bits_per_byte" if tokenizers and not by_text else ""
        raise ValueError(f"these runs were not judged on the same {'text' if by_text else 'tokens'}: {spell(others)}{hint}")


def judged_alike(sides: Sequence[Side], args: Compare) -> list[str]:
    """Refuse losses of different texts within a comparison; between lines of a mere table, and for code, a note."""
    runs, notes = [run for side in sides for run in side.runs], []
    for group in [runs] if args.vs else [side.runs for side in sides]:
        check_comparable(group, args.metric)
    try:
        check_comparable(runs, args.metric)
    except ValueError as error:
        notes.append(f"the experiments are not to be held against each other: {error}")
    if code := differing(runs, ("code_hash",)):
        notes.append(f"the runs were made by {len(code['code_hash'])} versions of the code (code_hash)")
    if args.vs and {run.setting for run in sides[0].runs} & {run.setting for run in sides[1].runs}:
        notes.append(f"{sides[0].label} and {sides[1].label} hold runs of the very same setting; only their seeds or code "
                     "can differ")
    return notes


def cautions(side: Side) -> list[str]:
    """What makes the runs of a side other than independent seeds of one experiment."""
    notes = []
    if len({run.setting for run in side.runs}) > 1:
        changed = [name for name in differences(side.runs) if "env." not in name and not name.startswith("log.")
                   and name not in HASH_IGNORES | {"run.seed", "run.target_loss_nats"}]
        notes.append(f"the runs of {side.label} are not one experiment: {', '.join(changed)} differ")
    if early := [run.name for run in side.runs if run.summary["steps"] < run.config["train.steps"]]:
        notes.append(f"{', '.join(early)} ended before the last step: the final losses are not those of whole schedules")
    for one, two in combinations(side.runs, 2):
        if (one.setting, one.summary["seed"]) == (two.setting, two.summary["seed"]):
            notes.append(f"{one.name} and {two.name} of {side.label} have the same seed and setting: not independent")
    return notes


def unreached(name: str, samples: Sequence[Sample]) -> list[str]:
    """Which samples hold runs that never got there, and what that does to their means."""
    return [f"{name}: {one.never} of {len(one.values)} runs of {one.label} never got there; mean and Welch's p leave "
            "them out and flatter that side, the rank test counts them as last" for one in samples if one.never]


def doubtful_sigma(final: Sample, sigma: float | None) -> list[str]:
    """A note where the runs scatter more than the known sigma allows (chi-squared test, p < .01)."""
    sd = final.reached.sd if final.reached else None
    if sigma is None or sd is None or stats.chi2.sf((final.reached.n - 1) * (sd / sigma) ** 2, final.reached.n - 1) >= 0.01:
        return []
    return [f"{final.label} scatters by {sd:.2g}, more than a sigma of {sigma:g} allows: the rule that rests on it does "
            "not hold here; give --sigma"]


# ---- By which measures ----------------------------------------------------------------------------------------------


def measures(args: Compare, target: float | None, runs: Sequence[RunFolder],
             notes: list[str]) -> dict[str, Callable[[RunFolder], float]]:
    """Name to function of a run; seconds only where all the runs had the same machine, else a note says why."""

    def final_loss(run: RunFolder) -> float:
        return NEVER if run.summary[args.metric] is None else run.summary[args.metric]

    def to_target(run: RunFolder, axis: str) -> float:  # at the first validation there, as the speedrun counts
        curve = zip(*run.series(CURVES[args.metric], axis), strict=True)
        return next((x for x, loss in curve if loss <= target), NEVER)

    found = {"final loss": final_loss}
    if target is None:
        return found
    found[f"steps to {target:g}"] = lambda run: to_target(run, "step")
    if machines := differing(runs, SAME_MACHINE):
        notes.append(f"seconds are not compared: the machines differ ({spell(machines)})")
    else:
        found[f"seconds to {target:g}"] = lambda run: to_target(run, "train_seconds")
    return found


def sample(side: Side, measure: Callable[[RunFolder], float]) -> Sample:
    """A measure of all runs of a side."""
    values = [float(measure(run)) for run in side.runs]
    finite = [value for value in values if math.isfinite(value)]
    return Sample(side.label, values, len(values) - len(finite), statistics.summarize(finite) if finite else None)


def compare(name: str, a: Sample, b: Sample) -> Comparison:
    """The two samples held against each other."""
    finite = [[value for value in one.values if math.isfinite(value)] for one in (a, b)]
    return Comparison(name, a, b, statistics.welch(*finite) if all(finite) else None, statistics.rank_p(a.values, b.values))


def loss_per_step(runs: Sequence[RunFolder], metric: Metric) -> float | None:
    """How much the loss falls a step near the end: least squares over the last quarter of each run's validations (at
    least 2), averaged over the runs. None where no run has 2 validations.

    Within one schedule this is the fall of the cooldown, steeper than what a longer schedule would gain.
    """
    slopes = []
    for run in runs:
        steps, losses = run.series(CURVES[metric])
        last = max(2, math.ceil(len(steps) / 4))
        if len(set(steps[-last:])) > 1:
            slopes.append(np.polyfit(steps[-last:], losses[-last:], 1)[0])
    return -float(np.mean(slopes)) if slopes else None


# ---- The verdict ----------------------------------------------------------------------------------------------------


def verdict(loss: Comparison, args: Compare, rate: float | None) -> str:
    """Whether A's final loss differs from B's, by how much, what that is in steps, and how many seeds would tell."""
    if loss.difference is None:
        return (f"No means to compare: all runs of {(loss.b if loss.a.reached else loss.a).label} broke down; by ranks "
                f"p = {loss.rank_p:.2g}.")
    if loss.p is None:
        return f"{_size(loss, args)}; of chance nothing can be said with one run on a side: run more seeds."
    p = f"p = {loss.p:.2g}" + (" by ranks" if loss.a.never + loss.b.never else "")
    if loss.p < args.alpha:
        return f"{_size(loss, args)}, {p}{_in_steps(loss, args, rate)}. More seeds needed: none."
    return f"No difference shown: {_size(loss, args)}, {p}. {more_seeds(loss, args)}"


def _size(loss: Comparison, args: Compare) -> str:
    """`A is better by 0.0123 nats (95 % interval 0.010 to 0.015)`, the interval turned to the same sign."""
    gain, low, high, _ = loss.difference
    sign = -1 if gain <= 0 else 1
    better = loss.a if gain <= 0 else loss.b
    within = "" if low is None else " (95 % interval {:.4f} to {:.4f})".format(*sorted((sign * low, sign * high)))
    whose = " among the runs that did not break down" if loss.a.never + loss.b.never else ""
    return f"{better.label} is better by {abs(gain):.4f} {UNITS[args.metric]}{within}{whose}"


def _in_steps(loss: Comparison, args: Compare, rate: float | None) -> str:
    """What the difference is worth in steps of the baseline, and by which rate."""
    if rate is None or rate <= 0:
        return f"; its worth in steps is unknown, as the loss of {loss.b.label} does not fall at the end"
    whence = "--nats_per_step" if args.nats_per_step else f"the last quarter of {loss.b.label}'s validations"
    steps = abs(loss.difference.difference) / rate
    return f", worth {steps:.0f} steps at {rate:.3g} {UNITS[args.metric]} a step ({whence})"


def more_seeds(loss: Comparison, args: Compare) -> str:
    """How many seeds a side would show a difference of the present size, if it is real."""
    a, b = loss.a.reached, loss.b.reached
    if loss.difference.difference == 0:
        return "No finite number of seeds would show one: the difference is 0."
    if a.sd is None or b.sd is None:
        return "How many seeds would show one is unknown with one finite run on a side."
    sd = math.sqrt((a.sd**2 + b.sd**2) / 2)
    needed = statistics.seeds_needed(loss.difference.difference, sd, alpha=args.alpha, power=args.power)
    if needed is None:
        return "No number of seeds within reason would show a difference of this size."
    more = [f"{max(0, needed - len(one.values))} more of {one.label}" for one in (loss.a, loss.b)]
    return (f"If it is real, {needed} seeds a side would show it (p < {args.alpha:g} with probability "
            f"{args.power:g}): {' and '.join(more)}.")


def target_sentence(test: TargetTest, args: Compare) -> str:
    """What the speedrun's two rules say of one side's mean against the target."""
    p = "p unknown" if test.t_p is None else f"p = {test.t_p:.2g}"
    surely = _passes(test.t_p is not None and test.t_p < RECORD_P)
    t_test = f"{test.label} below {test.target:g}: {surely} the t-test ({p}, {RECORD_P:g} needed)"
    if test.z_margin is None:
        return f"{t_test}."
    return (f"{t_test} and {_passes(test.z_margin >= test.margin_needed)} the rule (target - mean) sqrt(n) >= "
            f"{test.margin_needed:.5f} at a known sigma of {args.sigma:g} (it is {test.z_margin:.5f}).")


def _passes(passed: bool) -> str:
    return "passes" if passed else "fails"


# ---- The table ------------------------------------------------------------------------------------------------------


def table(report: Report) -> Table:
    """For each measure a row a side, and the difference."""
    found = Table("measure", "runs", "n", "mean", "sd", "95 % interval", "p (Welch)", "p (ranks)", box=box.SIMPLE)
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


def sample_cells(one: Sample) -> list[str]:
    """n, mean, sd and interval of a sample; n is "reached of all" where some never got there."""
    n = f"{len(one.values) - one.never} of {len(one.values)}" if one.never else str(len(one.values))
    if one.reached is None:
        return [n, "never"]
    return [n, digits(one.reached.mean), digits(one.reached.sd), interval(one.reached)]


def difference_cells(one: Comparison) -> list[str]:
    """A difference, in the same columns, and both tests' p."""
    if one.difference is None:
        return ["", "", "", "", "", f"{one.rank_p:.2g}"]
    p = "" if one.difference.p is None else f"{one.difference.p:.2g}"
    return ["", digits(one.difference.difference), "", interval(one.difference), p, f"{one.rank_p:.2g}"]


def digits(value: float | None) -> str:
    """Losses to five decimals, larger numbers to one."""
    return "" if value is None else f"{value:.5f}" if abs(value) < 20 else f"{value:.1f}"


def interval(of: Summary | Difference) -> str:
    """`low to high`; nothing where it is not known."""
    return "" if of.low is None else f"{digits(of.low)} to {digits(of.high)}"


def named(value: Any) -> Any:
    """The value with every tuple's fields by their names, as JSON objects."""
    if hasattr(value, "_asdict"):
        return named(value._asdict())
    if isinstance(value, dict):
        return {key: named(part) for key, part in value.items()}
    return [named(part) for part in value] if isinstance(value, list) else value


def main(args: Compare) -> None:
    """Print the table, the notes and the verdict; write the numbers if asked."""
    report = examine(args)
    if args.json:
        write_json(args.json, named(report))
    print_table(table(report))
    print("\n".join([*(f"note: {note}" for note in report.notes), *filter(None, [report.verdict])]))


if __name__ == "__main__":
    command(main, Compare, __doc__)
