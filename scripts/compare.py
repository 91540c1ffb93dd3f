"""Compare training runs over seeds: final loss, and steps and seconds to a target loss.

    python -m scripts.compare runs/muon-seed* --vs runs/adamw-seed*
    python -m scripts.compare runs/speedrun-seed* --target 3.28
    python -m scripts.compare runs

With --vs, Welch's t-test and a rank test compare the first runs with the baseline. Without --vs, the table has one row
for each experiment and nothing is tested against a baseline. Runs are named by folders, by patterns, or by a folder of
run folders.
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

from configs.notation import raise_if
from configs.serialize import HASH_IGNORES
from data.run.folder import write_json
from data.run.metrics import VAL_BITS, VAL_LOSS
from scripts import command, format_value, print_table, print_wrapped
from scripts.lab import statistics
from scripts.lab.folders import UNITS, Metric, RunFolder, by_experiment, common_target, differences, find_runs
from scripts.lab.statistics import SIGMA, Difference, Summary, TargetTest


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """Runs to compare, and the settings of the tests."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Runs to compare: folders, patterns, or folders of run folders."""
    vs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN ...")] = ()
    """Runs of the baseline."""
    metric: Metric = "val_loss_nats"
    """Unit of the loss; val_bits_per_byte also compares runs with different tokenizers."""
    target: float | None = None
    """Validation loss to reach, in the unit of --metric; None: the target in nats that all runs were given, if any."""
    nats_per_step: float | None = None
    """Loss that one more step gains, in the unit of --metric; None: slope of the baseline's last quarter of validations."""
    alpha: float = 0.05
    """Significance level of the comparison with --vs; confidence intervals stay at 95 %, target tests at p < 0.01."""
    power: float = 0.8
    """Probability with which the number of seeds that is computed shows a difference of the observed size."""
    sigma: float = SIGMA
    """Known standard deviation of the final loss between seeds, in nats, for the rule (target - mean) sqrt(n) >= margin."""
    margin: float | None = None
    """Margin of that rule, in nats; None: 0.004 for a sigma of 0.0013, and in proportion for another sigma."""
    json: Path | None = None
    """Write all numbers to this JSON file."""


class Group(NamedTuple):
    """Runs whose values form one sample: normally the seeds of one experiment, the name that runs share in the log."""

    label: str
    runs: Sequence[RunFolder]


class Sample(NamedTuple):
    """Values of one measure, one per run of a group."""

    label: str
    values: list[float]
    """Infinity: the loss of a run that diverged, or the steps of a run that did not reach the target."""
    infinite_count: int
    summary: Summary | None
    """Mean, standard deviation and interval of the finite values; None if there are none."""


class Comparison(NamedTuple):
    """One measure of two groups, with Welch's test on the finite values and a rank test on all values."""

    name: str
    a: Sample
    b: Sample
    difference: Difference | None
    """Mean of a minus mean of b; None if a group has no finite value."""
    rank_p: float

    @property
    def has_infinite_values(self) -> bool:
        """True if Welch's test leaves out runs."""
        return self.a.infinite_count + self.b.infinite_count > 0

    @property
    def p(self) -> float | None:
        """p-value of Welch's test; that of the rank test, which leaves no run out, if there are infinite values."""
        return self.rank_p if self.has_infinite_values else self.difference.p


class Results(NamedTuple):
    """Numbers, notes and verdict of a comparison; the content of the --json file."""

    samples: dict[str, list[Sample]]
    """Measure to one sample per group."""
    comparisons: list[Comparison]
    """One per measure, the final loss first; empty without a baseline."""
    target: float | None
    target_tests: list[TargetTest]
    """One per group: the t-test and the rule of the known sigma against the target; empty without a target."""
    loss_per_step: float | None
    notes: list[str]
    verdict: str


def compare_runs(args: Compare) -> Results:
    """Measure the runs, test them and collect notes. Raises ValueError for bad arguments or runs that cannot be compared."""
    check_arguments(args)
    groups = make_groups(args)
    runs = [run for group in groups for run in group.runs]
    notes = [note for group in groups for note in independence_notes(group)] + comparability_notes(groups, args)
    # The measures; seconds only if all runs were on the same machine
    target, machines = args.target, differing_values(runs, SAME_MACHINE)
    if target is None and args.metric == "val_loss_nats":
        target = common_target(run.summary for run in runs)
    if target is not None and machines:
        notes.append(f"seconds are not compared, because the machines differ ({format_values(machines)})")
    samples = {name: [make_sample(group, measure) for group in groups]
               for name, measure in make_measures(args.metric, target, with_seconds=not machines).items()}
    notes += [note for name, row in samples.items() for note in infinite_value_notes(name, row)]
    # Tests against the target
    target_tests = []
    if target is not None:
        sigma = args.sigma if args.metric == "val_loss_nats" else None  # SIGMA is known in nats only
        target_tests = [statistics.against_target(sample.label, sample.values, target, sigma=sigma, margin=args.margin)
                        for sample in samples[FINAL_LOSS]]
        notes += [note for sample in samples[FINAL_LOSS] for note in sigma_notes(sample, sigma)]
    # Tests against the baseline
    verdicts, comparisons, rate = [], [], None
    if args.vs:
        comparisons = [compare_samples(name, a, b) for name, (a, b) in samples.items()]
        rate = args.nats_per_step or loss_per_step(groups[-1].runs, args.metric)
        verdicts.append(baseline_verdict(comparisons[0], args, rate))
    verdicts += [target_verdict(test, args) for test in target_tests]
    return Results(samples, comparisons, target, target_tests, rate, notes, "\n".join(verdicts))


# ---- The groups of runs ---------------------------------------------------------------------------------------------


def check_arguments(args: Compare) -> None:
    """Raise ValueError naming an argument that is missing or out of its range."""
    raise_if(not args.runs, "name the runs to compare: folders, patterns, or a folder of run folders such as runs/")
    for name in ("alpha", "power"):
        raise_if(not 0 < getattr(args, name) < 1, f"--{name} must lie between 0 and 1, got {getattr(args, name)}")
    for name in ("nats_per_step", "sigma", "margin", "target"):
        value = getattr(args, name)
        raise_if(value is not None and not 0 < value < math.inf, f"--{name} must be a finite number above 0, got {value}")


def make_groups(args: Compare) -> list[Group]:
    """Return the compared runs and the baseline, with different labels; without --vs, one group per experiment.

    Raises ValueError for a run that has not ended, and for a run that is in both groups.
    """
    a, b = find_runs(args.runs), find_runs(args.vs)
    for run in (*a, *b):
        if run.summary is None:
            raise ValueError(f"{run.path} has no summary.json: the run has not ended, or it diverged; wait for it, continue "
                             "it with --run.resume, or leave it out")
    if not args.vs:
        return [Group(label, runs) for label, runs in by_experiment(a).items()]
    if shared := {run.path.resolve() for run in a} & {run.path.resolve() for run in b}:
        raise ValueError(f"{min(shared)} is among the compared runs and among those of --vs")
    labels = [experiment_name(a) or "A", experiment_name(b) or "B"]
    if labels[0] == labels[1]:
        labels = [f"{labels[0]} (A)", f"{labels[1]} (B)"]
    return [Group(labels[0], a), Group(labels[1], b)]


def experiment_name(runs: Sequence[RunFolder]) -> str:
    """Return the experiment of the runs, or "" if they belong to several."""
    experiments = list(by_experiment(runs))
    return experiments[0] if len(experiments) == 1 else ""


# ---- The measures ---------------------------------------------------------------------------------------------------


FINAL_LOSS = "final loss"
CURVES: dict[Metric, str] = {"val_loss_nats": VAL_LOSS, "val_bits_per_byte": VAL_BITS}
Measure = Callable[[RunFolder], float]


def make_measures(metric: Metric, target: float | None, *, with_seconds: bool) -> dict[str, Measure]:
    """Return the measures by name: the final loss and, if there is a target, the steps and seconds to reach it."""

    def final_loss(run: RunFolder) -> float:
        return math.inf if run.summary[metric] is None else run.summary[metric]  # None: not finite

    def first_at_target(run: RunFolder, axis: str) -> float:
        # The first validation at the target counts, as in the speedrun; nothing is interpolated between validations.
        curve = zip(*run.series(CURVES[metric], axis), strict=True)
        return next((x for x, loss in curve if loss <= target), math.inf)

    measures = {FINAL_LOSS: final_loss}
    if target is not None:
        measures[f"steps to {target:g}"] = lambda run: first_at_target(run, "step")
        if with_seconds:
            measures[f"seconds to {target:g}"] = lambda run: first_at_target(run, "train_seconds")
    return measures


def make_sample(group: Group, measure: Measure) -> Sample:
    """Return a measure of all runs of a group."""
    values = [float(measure(run)) for run in group.runs]
    finite = finite_values(values)
    return Sample(group.label, values, len(values) - len(finite), statistics.summarize(finite) if finite else None)


def finite_values(values: Sequence[float]) -> list[float]:
    """Return the values without infinities."""
    return [value for value in values if math.isfinite(value)]


def compare_samples(name: str, a: Sample, b: Sample) -> Comparison:
    """Test two samples of one measure against each other."""
    finite_a, finite_b = finite_values(a.values), finite_values(b.values)
    difference = statistics.welch(finite_a, finite_b) if finite_a and finite_b else None
    return Comparison(name, a, b, difference, statistics.rank_p(a.values, b.values))


def loss_per_step(runs: Sequence[RunFolder], metric: Metric) -> float | None:
    """Return the fall of the loss per step near the end of training, in the metric's unit; None without two validations.

    It is the slope by least squares over the last quarter of each run's validations, averaged over the runs. There the
    cooldown of the learning rate makes the loss fall faster than a longer schedule would, so the steps that a difference
    is worth come out too few.
    """
    slopes = []
    for run in runs:
        steps, losses = run.series(CURVES[metric])
        last = max(2, math.ceil(len(steps) / 4))
        if len(set(steps[-last:])) > 1:
            slopes.append(np.polyfit(steps[-last:], losses[-last:], 1)[0])
    return -float(np.mean(slopes)) if slopes else None


# ---- The table ------------------------------------------------------------------------------------------------------


def results_table(results: Results, metric: Metric) -> Table:
    """Return, for each measure, one row per group, the difference of the means and the rank test; 80 columns wide."""
    table = Table("", "n", "mean", "standard\ndeviation", "95 % confidence\ninterval", "p-value", box=box.SIMPLE,
                  collapse_padding=True, pad_edge=False)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:  # only the labels are wrapped where the terminal is narrow
        column.justify, column.no_wrap = "right", True
    comparisons = {comparison.name: comparison for comparison in results.comparisons}
    for name, samples in results.samples.items():
        decimals = 5 if name == FINAL_LOSS else 2
        table.add_row(f"{name} ({UNITS[metric]})" if name == FINAL_LOSS else name, style="bold")
        for sample in samples:
            table.add_row(sample.label, *sample_cells(sample, decimals))
        if name in comparisons:
            table.add_row("difference (Welch)", *difference_cells(comparisons[name].difference, decimals))
            table.add_row("rank test", "", "", "", "", f"{comparisons[name].rank_p:.2g}")
        table.add_section()
    return table


def sample_cells(sample: Sample, decimals: int) -> list[str]:
    """Return n, mean, standard deviation and interval; n reads "3 of 4" if one of four values is infinite."""
    count = len(sample.values)
    n = f"{count - sample.infinite_count} of {count}" if sample.infinite_count else str(count)
    if sample.summary is None:
        return [n]
    return [n, f"{sample.summary.mean:.{decimals}f}", format_value(sample.summary.sd, f".{decimals}f"),
            format_interval(sample.summary, decimals)]


def difference_cells(difference: Difference | None, decimals: int) -> list[str]:
    """Return the cells of a difference in the same columns, and the p-value of Welch's test."""
    if difference is None:
        return []
    return ["", f"{difference.difference:+.{decimals}f}", "", format_interval(difference, decimals),
            format_value(difference.p, ".2g")]


def format_interval(estimate: Summary | Difference, decimals: int) -> str:
    """Return "LOW to HIGH", or "" if one value allows no interval."""
    return "" if estimate.low is None else f"{estimate.low:.{decimals}f} to {estimate.high:.{decimals}f}"


# ---- The notes ------------------------------------------------------------------------------------------------------


# Settings and files that two runs must share for their losses to be comparable. Nats per token need the same tokens in
# sequences of the same length; data_hash covers the data files wherever they lie. Bits per byte need the same text only,
# whatever the tokenizer. The Python version is among them because the embedded corpus is Python's own source code.
SAME_TOKENS = ("data_hash", "data.val_bytes", "data.val_tokens", "data.val_sequence_tokens")
SAME_TEXT = ("data.source", "data.corpus", "data.train_files", "data.val_files", "data.val_bytes", "data.val_tokens",
             "env.python")
SAME_MACHINE = ("device", "world_size", "env.cpu", "env.gpus", "env.torch_threads")


def look_up(run: RunFolder, name: str) -> Any:
    """Return a setting (dotted name), an environment entry (`env.NAME`) or a summary entry; None if it is not known."""
    if name == "data.val_sequence_tokens":  # None means the length of training; its schedule is not compared
        return run.config.get(name) or run.config.get("data.sequence_tokens")
    if name.startswith("env."):
        return run.environment.get(name.removeprefix("env."))
    return run.config.get(name) if "." in name else run.summary.get(name)


def differing_values(runs: Sequence[RunFolder], names: Sequence[str]) -> dict[str, list[str]]:
    """Return the names (see `look_up`) in which the runs differ, each with its distinct values as JSON."""
    distinct = {name: list(dict.fromkeys(json.dumps(look_up(run, name)) for run in runs)) for name in names}
    return {name: values for name, values in distinct.items() if len(values) > 1}


def format_values(values_by_name: dict[str, list[str]]) -> str:
    """Return "NAME: VALUE and VALUE; ..."."""
    return "; ".join(f"{name}: {' and '.join(values)}" for name, values in values_by_name.items())


def check_comparable(runs: Sequence[RunFolder], metric: Metric) -> None:
    """Raise ValueError naming the settings that differ if the runs' losses are not of the same text or tokens."""
    for run in runs:
        raise_if(run.summary["val_loss_nats"] is not None and run.summary[metric] is None,
                 f"{run.path} has no {metric}: its data has no tokenizer; compare --metric val_loss_nats")
    tokenizers = differing_values(runs, ("data.tokenizer", "data.bpe_vocab_tokens"))
    by_text = metric == "val_bits_per_byte" and tokenizers  # under one tokenizer, the same text is the same tokens
    if values := differing_values(runs, SAME_TEXT if by_text else SAME_TOKENS):
        hint = "; for different tokenizers compare --metric val_bits_per_byte" if tokenizers and not by_text else ""
        raise ValueError(f"these runs were not validated on the same {'text' if by_text else 'tokens'}: "
                         f"{format_values(values)}{hint}")


def comparability_notes(groups: Sequence[Group], args: Compare) -> list[str]:
    """Return notes on differences of data and code between the groups.

    Raises ValueError for losses of different texts inside one group, or between the groups if --vs compares them.
    """
    runs, notes = [run for group in groups for run in group.runs], []
    for compared in [runs] if args.vs else [group.runs for group in groups]:
        check_comparable(compared, args.metric)
    try:
        check_comparable(runs, args.metric)
    except ValueError as error:
        notes.append(f"do not compare the experiments with each other: {error}")
    if code := differing_values(runs, ("code_hash",)):
        notes.append(f"the runs used {len(code['code_hash'])} versions of the code (code_hash)")
    if args.vs and {run.setting for run in groups[0].runs} & {run.setting for run in groups[1].runs}:
        notes.append(f"{groups[0].label} and {groups[1].label} share runs of equal settings; only seeds or code can differ")
    return notes


def independence_notes(group: Group) -> list[str]:
    """Return notes on runs that are not independent, complete seeds of one experiment."""
    notes = []
    if len({run.setting for run in group.runs}) > 1:
        changed = [name for name in differences(group.runs) if "env." not in name and not name.startswith("log.")
                   and name not in HASH_IGNORES | {"run.seed", "run.target_loss_nats"}]
        notes.append(f"runs of {group.label} differ in more than their seed: {', '.join(changed)}")
    if early := [run.name for run in group.runs if run.summary["steps"] < run.config["train.steps"]]:
        notes.append(f"ended before the last step, so the final loss is not that of the whole schedule: {', '.join(early)}")
    for first, second in combinations(group.runs, 2):
        if (first.setting, first.summary["seed"]) == (second.setting, second.summary["seed"]):
            notes.append(f"{first.name} and {second.name} of {group.label} are not independent: same seed and settings")
    return notes


def infinite_value_notes(name: str, samples: Sequence[Sample]) -> list[str]:
    """Return a note for each sample with infinite values: Welch's test leaves them out, the rank test does not."""
    failure = "diverged" if name == FINAL_LOSS else "did not reach the target"
    return [f"{name}: {sample.infinite_count} of {len(sample.values)} runs of {sample.label} {failure}; the mean and "
            "Welch's test leave them out, which favours this group; the rank test ranks them last"
            for sample in samples if sample.infinite_count]


def sigma_notes(sample: Sample, sigma: float | None) -> list[str]:
    """Return a note if the sample's standard deviation is too large for the known sigma (chi-squared test, p < 0.01)."""
    sd = sample.summary.sd if sample.summary else None
    if sigma is None or sd is None:
        return []
    freedom = sample.summary.n - 1
    if stats.chi2.sf(freedom * (sd / sigma) ** 2, freedom) >= 0.01:
        return []
    return [f"the standard deviation of {sample.label}, {sd:.2g}, is too large for a known sigma of {sigma:g}: the rule "
            "that uses sigma is not valid here; give another --sigma"]


# ---- The verdict ----------------------------------------------------------------------------------------------------


RECORD_P = 0.01  # a record of the speedrun needs a p-value below this


def baseline_verdict(loss: Comparison, args: Compare, rate: float | None) -> str:
    """Return sentences on the difference of the final losses: size, significance, worth in steps, seeds needed.

    rate: loss per step, see `loss_per_step`.
    """
    if loss.difference is None:
        diverged = loss.b if loss.a.summary else loss.a
        return f"The means cannot be compared: all runs of {diverged.label} diverged (rank test p = {loss.rank_p:.2g})."
    if loss.p is None:
        return f"No test, because a group has one run only: {difference_clause(loss, args)}. Run more seeds."
    p = f"{'rank test' if loss.has_infinite_values else 'Welch'} p = {loss.p:.2g}"
    if loss.p < args.alpha:
        return (f"Significant difference ({p} < {args.alpha:g}): {difference_clause(loss, args)}. "
                f"{steps_sentence(loss, args, rate)} No more seeds are needed.")
    return f"No significant difference ({p}): {difference_clause(loss, args)}. {seeds_sentence(loss, args)}"


def difference_clause(loss: Comparison, args: Compare) -> str:
    """Return "the mean final loss of A is lower than that of B by 0.0123 nats (95 % confidence interval ...)"."""
    difference, low, high, _ = loss.difference
    lower, higher, sign = (loss.a, loss.b, -1) if difference <= 0 else (loss.b, loss.a, 1)
    interval = ""
    if low is not None:  # with the sign turned, the bounds change places
        interval = " (95 % confidence interval {:.4f} to {:.4f})".format(*sorted((sign * low, sign * high)))
    finite = " among the runs that did not diverge" if loss.has_infinite_values else ""
    return (f"the mean final loss of {lower.label} is lower than that of {higher.label} by {abs(difference):.4f} "
            f"{UNITS[args.metric]}{interval}{finite}")


def steps_sentence(loss: Comparison, args: Compare, rate: float | None) -> str:
    """Say how many steps of the baseline would lower the loss as much, and by which loss per step."""
    if rate is None:
        return f"Its worth in steps is unknown: runs of {loss.b.label} have too few validations; give --nats_per_step."
    if rate <= 0:
        return f"Its worth in steps is unknown, because the loss of {loss.b.label} does not fall at the end."
    source = "--nats_per_step" if args.nats_per_step else f"the last quarter of {loss.b.label}'s validations"
    steps = abs(loss.difference.difference) / rate
    return f"It is worth {steps:.0f} steps at {rate:.3g} {UNITS[args.metric]} per step ({source})."


def seeds_sentence(loss: Comparison, args: Compare) -> str:
    """Say how many seeds would make a true difference of the observed size significant."""
    a, b = loss.a.summary, loss.b.summary
    if loss.difference.difference == 0:
        return "The observed difference is 0, so no number of seeds can be computed."
    if a.sd is None or b.sd is None:
        return "The number of seeds needed is unknown, because a group has only one finite value."
    sd = math.sqrt((a.sd**2 + b.sd**2) / 2)
    needed = statistics.seeds_needed(loss.difference.difference, sd, alpha=args.alpha, power=args.power)
    if needed is None:
        return "The observed difference is too small for any practical number of seeds."
    more = [f"{max(0, needed - len(sample.values))} more of {sample.label}" for sample in (loss.a, loss.b)]
    return (f"If the true difference is this large, {needed} seeds per group show it (p < {args.alpha:g}) with probability "
            f"{args.power:g}: run {' and '.join(more)}.")


def target_verdict(test: TargetTest, args: Compare) -> str:
    """Return a sentence on the speedrun's two rules for a mean final loss below the target."""
    p = "p unknown" if test.t_p is None else f"p = {test.t_p:.2g}"
    t_test = passes_or_fails(test.t_p is not None and test.t_p < RECORD_P)
    sentence = (f"Mean final loss of {test.label} below {test.target:g} {UNITS[args.metric]}: {t_test} the one-sided "
                f"t-test ({p}, needed: below {RECORD_P:g})")
    if test.z_margin is None:
        return f"{sentence}."
    return (f"{sentence}; {passes_or_fails(test.z_margin >= test.margin_needed)} the rule (target - mean) sqrt(n) >= "
            f"{test.margin_needed:.5f} for a known sigma of {args.sigma:g} (left side: {test.z_margin:.5f}).")


def passes_or_fails(passed: bool) -> str:
    """Return the verb of a test's outcome."""
    return "passes" if passed else "fails"


# ---- The command line -----------------------------------------------------------------------------------------------


def main(args: Compare) -> None:
    """Print the table, the notes and the verdict; write the numbers to --json."""
    results = compare_runs(args)
    if args.json:
        write_json(args.json, results)
    print_table(results_table(results, args.metric))
    print_wrapped([*(f"note: {note}" for note in results.notes), *results.verdict.splitlines()])


if __name__ == "__main__":
    command(main, Compare, __doc__)
