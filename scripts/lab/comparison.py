"""Two sides of runs held against each other: what may be compared, by which measures, and the verdict in a sentence."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from scipy import stats

from configs.serialize import HASH_IGNORES
from scripts.lab.folders import RunFolder, by_experiment, differences
from scripts.lab.statistics import Difference, Summary, TargetTest, rank_p, seeds_needed, summarize, welch

Metric = Literal["val_loss_nats", "val_bits_per_byte"]
CURVES: dict[Metric, str] = {"val_loss_nats": "val/loss_nats", "val_bits_per_byte": "val/bits_per_byte"}
NEVER = math.inf  # the loss of a run that broke down, the steps of one that never reached the target

# What two runs must share for their losses to be of the same text. Nats per token need the same tokens in the same
# windows (data_hash covers the files, wherever they lie); bits per byte, under different tokenizers, the same text.
# An embedded text is that of the Python version.
SAME_TOKENS = ("data_hash", "data.val_bytes", "data.val_tokens", "data.val_sequence_tokens")
SAME_TEXT = ("data.source", "data.corpus", "data.train_files", "data.val_files", "data.val_bytes", "data.val_tokens",
             "env.python")
SAME_MACHINE = ("device", "world_size", "env.cpu", "env.gpus", "env.torch_threads")


@dataclass(frozen=True, slots=True)
class Side:
    """Runs that stand for one thing: seeds of one experiment, if all is well."""

    label: str
    runs: Sequence[RunFolder]


class Sample(NamedTuple):
    """One measure of one side's runs."""

    label: str
    values: list[float]
    """One a run, NEVER among them."""
    reached: Summary | None
    """Of those that are finite; None where there are none."""

    @property
    def never(self) -> int:
        """How many runs have no finite value."""
        return len(self.values) - (self.reached.n if self.reached else 0)


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
        return self.difference.p if self.difference else None


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


def make_side(label: str, runs: Sequence[RunFolder]) -> Side:
    """A side of runs, named by its experiment if it is one. Raises ValueError for a run that has not ended."""
    for run in runs:
        if run.summary is None:
            raise ValueError(f"{run.path} has no summary.json: that run has not ended; wait for it, continue it with "
                             "--run.resume, or leave it out")
    experiments = list(by_experiment(runs))
    return Side(experiments[0] if len(experiments) == 1 else label, runs)


def make_sides(a: Sequence[RunFolder], b: Sequence[RunFolder]) -> tuple[Side, Side]:
    """The two sides of a comparison, under different labels. Raises ValueError for a run on both sides."""
    if both := {run.path.resolve() for run in a} & {run.path.resolve() for run in b}:
        raise ValueError(f"{min(both)} is on both sides")
    one, two = make_side("A", a), make_side("B", b)
    if one.label == two.label:
        return Side(f"{one.label} (A)", a), Side(f"{two.label} (B)", b)
    return one, two


def refuse_incomparable(runs: Sequence[RunFolder], metric: Metric) -> None:
    """Raise ValueError naming what differs where the runs' losses were not measured on the same text or tokens."""
    for run in runs:
        if run.summary["val_loss_nats"] is not None and run.summary[metric] is None:
            raise ValueError(f"{run.path} has no {metric}: its data has no tokenizer; compare --metric val_loss_nats")
    tokenizers = differing(runs, ("data.tokenizer", "data.bpe_vocab_tokens"))
    by_text = metric == "val_bits_per_byte" and tokenizers
    others = differing(runs, SAME_TEXT if by_text else SAME_TOKENS)
    if others:
        named = "; ".join(f"{name}: {' and '.join(values)}" for name, values in others.items())
        hint = "; under different tokenizers compare --metric val_bits_per_byte" if tokenizers and not by_text else ""
        raise ValueError(f"these runs were not judged on the same {'text' if by_text else 'tokens'}: {named}{hint}")


def cautions(side: Side) -> list[str]:
    """What makes the runs of a side other than independent seeds of one experiment."""
    found = []
    if len({run.setting for run in side.runs}) > 1:
        changed = [name for name in differences(side.runs) if "env." not in name and not name.startswith("log.")
                   and name not in HASH_IGNORES | {"run.seed", "run.target_loss_nats"}]
        found.append(f"the runs of {side.label} are not one experiment: {', '.join(changed)} differ")
    if early := [run.name for run in side.runs if run.summary["steps"] < run.config["train.steps"]]:
        found.append(f"{', '.join(early)} ended before the last step: the final losses are not those of whole schedules")
    for one, two in combinations(side.runs, 2):
        if (one.setting, one.summary["seed"]) == (two.setting, two.summary["seed"]):
            found.append(f"{one.name} and {two.name} of {side.label} have the same seed and setting: not independent")
    return found


def same_setting(a: Side, b: Side) -> list[str]:
    """A note where the sides do not differ in any setting that the losses depend on."""
    equal = {run.setting for run in a.runs} & {run.setting for run in b.runs}
    note = f"{a.label} and {b.label} hold runs of the very same setting; only their seeds or code can differ"
    return [note] if equal else []


def final_loss(metric: Metric) -> Callable[[RunFolder], float]:
    """The last validation's loss of a run; NEVER where the run broke down."""
    return lambda run: NEVER if run.summary[metric] is None else run.summary[metric]


def to_target(axis: str, metric: Metric, target: float) -> Callable[[RunFolder], float]:
    """`axis` (step, train_seconds) at a run's first validation at or under the target, as the speedrun counts."""
    def measure(run: RunFolder) -> float:
        return next((x for x, loss in zip(*run.series(CURVES[metric], axis), strict=True) if loss <= target), NEVER)
    return measure


def sample(side: Side, measure: Callable[[RunFolder], float]) -> Sample:
    """A measure of all runs of a side."""
    values = [float(measure(run)) for run in side.runs]
    finite = [value for value in values if math.isfinite(value)]
    return Sample(side.label, values, summarize(finite) if finite else None)


def compare(name: str, a: Sample, b: Sample) -> Comparison:
    """The two samples held against each other."""
    finite = [[value for value in one.values if math.isfinite(value)] for one in (a, b)]
    return Comparison(name, a, b, welch(*finite) if all(finite) else None, rank_p(a.values, b.values))


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


def common_target(runs: Sequence[RunFolder]) -> float | None:
    """The target loss that all the runs were given; None where they had none, or different ones."""
    targets = {run.summary["target_loss_nats"] for run in runs}
    return targets.pop() if len(targets) == 1 else None


def doubtful_sigma(final: Sample, sigma: float | None) -> list[str]:
    """A note where the runs scatter more than the known sigma allows (chi-squared test, p < .01)."""
    sd = final.reached.sd if final.reached else None
    if sigma is None or sd is None or stats.chi2.sf((final.reached.n - 1) * (sd / sigma) ** 2, final.reached.n - 1) >= 0.01:
        return []
    return [f"{final.label} scatters by {sd:.2g}, more than a sigma of {sigma:g} allows: the rule that rests on it does "
            "not hold here; give --sigma"]


# ---- The verdict ----------------------------------------------------------------------------------------------------


UNITS: dict[Metric, str] = {"val_loss_nats": "nats", "val_bits_per_byte": "bits per byte"}
RECORD_P = 0.01  # the speedrun takes a record at a p below this


class Rules(Protocol):
    """What the sentences read of the command line."""

    metric: Metric
    alpha: float
    power: float
    sigma: float
    nats_per_step: float | None


def verdict(loss: Comparison, rules: Rules, loss_per_step: float | None) -> str:
    """Whether A's final loss differs from B's, by how much, what that is in steps, and how many seeds would tell."""
    if loss.difference is None:
        return (f"No means to compare: all runs of {(loss.b if loss.a.reached else loss.a).label} broke down; by ranks "
                f"p = {loss.rank_p:.2g}.")
    if loss.p is None:
        return f"{_size(loss, rules)}; of chance nothing can be said with one run on a side: run more seeds."
    p = f"p = {loss.p:.2g}" + (" by ranks" if loss.a.never + loss.b.never else "")
    if loss.p < rules.alpha:
        return f"{_size(loss, rules)}, {p}{_in_steps(loss, rules, loss_per_step)}. More seeds needed: none."
    return f"No difference shown: {_size(loss, rules)}, {p}. {more_seeds(loss, rules)}"


def _size(loss: Comparison, rules: Rules) -> str:
    """`A is better by 0.0123 nats (95 % interval 0.010 to 0.015)`, the interval turned to the same sign."""
    gain, low, high, _ = loss.difference
    sign = -1 if gain <= 0 else 1
    better = loss.a if gain <= 0 else loss.b
    within = "" if low is None else " (95 % interval {:.4f} to {:.4f})".format(*sorted((sign * low, sign * high)))
    whose = " among the runs that did not break down" if loss.a.never + loss.b.never else ""
    return f"{better.label} is better by {abs(gain):.4f} {UNITS[rules.metric]}{within}{whose}"


def _in_steps(loss: Comparison, rules: Rules, loss_per_step: float | None) -> str:
    """What the difference is worth in steps of the baseline, and by which rate."""
    if loss_per_step is None or loss_per_step <= 0:
        return f"; its worth in steps is unknown, as the loss of {loss.b.label} does not fall at the end"
    whence = "--nats_per_step" if rules.nats_per_step else f"the last quarter of {loss.b.label}'s validations"
    steps = abs(loss.difference.difference) / loss_per_step
    return f", worth {steps:.0f} steps at {loss_per_step:.3g} {UNITS[rules.metric]} a step ({whence})"


def more_seeds(loss: Comparison, rules: Rules) -> str:
    """How many seeds a side would show a difference of the present size, if it is real."""
    a, b = loss.a.reached, loss.b.reached
    if loss.difference.difference == 0:
        return "No finite number of seeds would show one: the difference is 0."
    if a.sd is None or b.sd is None:
        return "How many seeds would show one is unknown with one finite run on a side."
    needed = seeds_needed(loss.difference.difference, math.sqrt((a.sd**2 + b.sd**2) / 2), alpha=rules.alpha,
                          power=rules.power)
    if needed is None:
        return "No number of seeds within reason would show a difference of this size."
    more = [f"{max(0, needed - len(one.values))} more of {one.label}" for one in (loss.a, loss.b)]
    return (f"If it is real, {needed} seeds a side would show it (p < {rules.alpha:g} with probability "
            f"{rules.power:g}): {' and '.join(more)}.")


def target_sentence(test: TargetTest, rules: Rules) -> str:
    """What the speedrun's two rules say of one side's mean against the target."""
    p = "p unknown" if test.t_p is None else f"p = {test.t_p:.2g}"
    said = f"{test.label} below {test.target:g}: {_passes(test.t_p is not None and test.t_p < RECORD_P)} the t-test ({p}, "
    said += f"{RECORD_P:g} needed)"
    if test.z_margin is None:
        return said + "."
    return (f"{said} and {_passes(test.z_margin >= test.margin_needed)} the rule (target - mean) sqrt(n) >= "
            f"{test.margin_needed:.5f} at a known sigma of {rules.sigma:g} (it is {test.z_margin:.5f}).")


def _passes(passed: bool) -> str:
    return "passes" if passed else "fails"
