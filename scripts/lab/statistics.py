"""Statistical tests for comparing runs, as pure functions on lists of floats.

Values are final losses (or steps, or seconds) of independent seeds. A result that they do not determine is None.
"""

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

# nats: standard deviation of the speedrun's final loss over seeds, as track 3 fixes it. Recent logs show 0.0010 to 0.0015;
# a fixed value makes a z-test possible, so that even one run can be tested.
SIGMA = 0.0013
# nats: track 3 of the speedrun accepts a method if (3.28 - mean) sqrt(n) reaches this. It is 3.08 SIGMA, a p of about .001.
MARGIN = 0.004
RANK_RESAMPLES = 20_000  # with ties, up to 8 against 8 (12870 ways) are enumerated exactly; above, ways are sampled
MAX_SEEDS = 10**9
MAX_EFFECT = 1e6  # standard deviations; above, scipy's noncentral t loses all its digits, and the power is 1


class Summary(NamedTuple):
    """Mean of a sample, its standard deviation (n - 1) and the confidence interval of the mean, from low to high."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """Difference of two means, its confidence interval from low to high, and the two-sided p of no difference."""

    difference: float
    low: float | None
    high: float | None
    p: float | None


class TargetTest(NamedTuple):
    """Test of a mean final loss against a target, by the two rules of the speedrun."""

    label: str
    n: int
    target: float
    t_p: float | None
    """One-sided p of the t-test."""
    z_margin: float | None
    """(target - mean) sqrt(n); None if no sigma is known."""
    margin_needed: float | None
    """Least z_margin that passes; None if no sigma is known."""


def summarize(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """Return the sample's mean, with Student's t interval. sd, low and high are None for one value or an infinite one.

    Raise ValueError for no values.
    """
    if not values:
        raise ValueError("no values to summarize")
    n, mean = len(values), statistics.fmean(values)
    if n < 2 or not math.isfinite(mean):
        return Summary(n, mean, None, None, None)
    sd = statistics.stdev(values)
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - reach, mean + reach)


def welch(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Difference:
    """Test mean(a) - mean(b) with Welch's t-test (1947), which allows the two sides different variances and sizes.

    Degrees of freedom are by Welch-Satterthwaite. Interval and p are None if a side has one value or an infinite one.
    Without variance on both sides the interval is a point, and p is 1 for equal means, else 0.
    """
    summary_a, summary_b = summarize(a), summarize(b)
    difference = summary_a.mean - summary_b.mean
    if summary_a.sd is None or summary_b.sd is None:
        return Difference(difference, None, None, None)
    if summary_a.sd == summary_b.sd == 0:  # scipy warns that its result is unreliable here
        return Difference(difference, difference, difference, float(difference == 0))
    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(confidence)
    return Difference(difference, float(low), float(high), float(test.pvalue))


def rank_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the two-sided p of the Mann-Whitney test.

    Only the order of the values counts, so infinity may stand for a run that never reached the target.
    """
    # scipy's exact method does not allow ties, and its normal approximation is poor for few seeds: permute instead.
    tied = len({*a, *b}) < len(a) + len(b) and min(len(a), len(b)) > 1
    resample = stats.PermutationMethod(n_resamples=RANK_RESAMPLES, rng=0)
    return float(stats.mannwhitneyu(a, b, method=resample if tied else "auto").pvalue)


def one_sided_p(values: Sequence[float], target: float) -> float | None:
    """Return the p of Student's t-test of "the mean is `target` or more"; None for one value.

    A small p means that the true mean is below the target. A record of the speedrun needs p < .01 at 3.28.
    """
    summary = summarize(values)
    if summary.sd is None:
        return None
    if summary.sd == 0:
        return float(summary.mean >= target)
    return float(stats.ttest_1samp(values, target, alternative="less").pvalue)


def z_margin(values: Sequence[float], target: float) -> float:
    """(target - mean) sqrt(n): sigma times the z statistic, for a known standard deviation sigma over seeds."""
    return (target - summarize(values).mean) * math.sqrt(len(values))


def against_target(label: str, values: Sequence[float], target: float, *, sigma: float | None,
                   margin: float | None) -> TargetTest:
    """Apply both rules to the final losses. An infinite loss, of a run that failed, fails both.

    sigma: standard deviation over seeds; None leaves the second rule out.
    margin: least z_margin that passes; None: MARGIN, scaled by sigma / SIGMA.
    """
    t_p = one_sided_p(values, target)
    if sigma is None:
        return TargetTest(label, len(values), target, t_p, None, None)
    needed = MARGIN / SIGMA * sigma if margin is None else margin
    return TargetTest(label, len(values), target, t_p, z_margin(values, target), needed)


def power_of_rule(delta: float, n: int, *, sigma: float = SIGMA, margin: float = MARGIN) -> float:
    """Return the probability that n seeds of a method reach `margin`, if its true mean is target - delta.

    z_margin is normal with mean delta sqrt(n) and standard deviation sigma.
    """
    return float(stats.norm.cdf((delta * math.sqrt(n) - margin) / sigma))


def power_of_t(effect: float, n: int, alpha: float = 0.05) -> float:
    """Return the power of the two-sided t-test with n seeds per side, for a difference of `effect` standard deviations."""
    freedom, shift = 2 * n - 2, min(abs(effect), MAX_EFFECT) * math.sqrt(n / 2)
    critical = stats.t.isf(alpha / 2, freedom)
    # Rejections with the wrong sign; scipy returns nan if their probability is too small to compute.
    wrong_side = np.nan_to_num(stats.nct.cdf(-critical, freedom, shift))
    return float(stats.nct.sf(critical, freedom, shift) + wrong_side)


def seeds_needed(difference: float, sd: float, *, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Return the fewest seeds per side, at least 2, that show a true difference at p < alpha with this power.

    sd: standard deviation over seeds within a side. None: no number up to MAX_SEEDS is enough, as for a difference of 0.
    """
    if difference == 0:
        return None
    if sd == 0:
        return 2

    def reaches(n: int) -> bool:
        return power_of_t(difference / sd, n, alpha) >= power

    # The power grows with n: double n until it is enough, then bisect the last interval.
    enough = 2
    while not reaches(enough):
        enough *= 2
        if enough > MAX_SEEDS:
            return None
    fewer = range(max(2, enough // 2), enough)
    return fewer.start + bisect_left(fewer, True, key=reaches)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Return p values corrected for m simultaneous tests (Holm 1979), in the given order.

    The i-th smallest p is multiplied by m - i + 1, made monotone and cut at 1. An entry that was not tested is None; it
    stays None and does not count in m. Holm bounds the chance of one false discovery in a whole table, like Bonferroni,
    but rejects more; and it needs no independence, which tests against one common baseline do not have.
    """
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=ps.__getitem__)
    corrected: list[float | None] = [None] * len(ps)
    least = 0.0
    for rank, i in enumerate(order):
        least = corrected[i] = min(max(least, ps[i] * (len(order) - rank)), 1.0)
    return corrected
