"""A comparison in one sentence, as one would say it to a colleague."""

import math
from typing import Protocol

from scripts.lab.comparison import Comparison, Metric, TargetTest
from scripts.lab.statistics import seeds_needed

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
