"""Whether a difference is chance: the tests that a table of runs rests on, as pure functions on lists of floats.

Values are final losses (or steps, or seconds) of independent seeds. What cannot be known from them is None.
"""

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

SIGMA = 0.0013  # nats: deviation of the speedrun's final loss between seeds
# nats: the speedrun's track 3 takes a method whose (3.28 - mean) * sqrt(n) reaches this; 3.08 SIGMA, p of about .001.
MARGIN = 0.004
RANK_RESAMPLES = 20_000  # with ties, 8 against 8 (12870 ways) and less are counted out; more are sampled
MOST_SEEDS = 10**9
MOST_EFFECT = 1e6  # standard deviations; beyond, the noncentral t has no digits, and the power is 1


class Summary(NamedTuple):
    """A sample: its size, mean, standard deviation (n - 1) and the mean's confidence interval."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """A difference of means, its confidence interval, and the two-sided p of its being 0."""

    difference: float
    low: float | None
    high: float | None
    p: float | None


class TargetTest(NamedTuple):
    """The speedrun's two rules for a mean final loss surely below a target; the second needs a known sigma."""

    label: str
    n: int
    target: float
    t_p: float | None
    z_margin: float | None
    margin_needed: float | None


def summarize(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """The sample's mean with Student's interval; sd, low and high are None for one value, or if any is infinite.

    Raises ValueError for no values.
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
    """mean(a) - mean(b) by Welch's test (1947), degrees of freedom by Welch-Satterthwaite.

    All but the difference is None where a side has one value or an infinite one. Without variance on both sides the
    interval is a point, and p is 1 for equal means, else 0.
    """
    one, two = summarize(a), summarize(b)
    difference = one.mean - two.mean
    if one.sd is None or two.sd is None:
        return Difference(difference, None, None, None)
    if one.sd == two.sd == 0:
        return Difference(difference, difference, difference, float(difference == 0))
    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(confidence)
    return Difference(difference, float(low), float(high), float(test.pvalue))


def rank_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney test, which needs only the order: infinity stands for "never"."""
    tied = len({*a, *b}) < len(a) + len(b) and min(len(a), len(b)) > 1
    resample = stats.PermutationMethod(n_resamples=RANK_RESAMPLES, rng=0)
    return float(stats.mannwhitneyu(a, b, method=resample if tied else "auto").pvalue)


def one_sided_p(values: Sequence[float], target: float) -> float | None:
    """p of Student's test against a mean of `target` or more: small when the mean is surely below. None for one value.

    The speedrun's rule: a record needs p < .01 at 3.28.
    """
    found = summarize(values)
    if found.sd is None:
        return None
    if found.sd == 0:
        return float(found.mean >= target)
    return float(stats.ttest_1samp(values, target, alternative="less").pvalue)


def z_margin(values: Sequence[float], target: float) -> float:
    """(target - mean) sqrt(n): under a known deviation sigma between seeds, this is sigma times the z statistic."""
    return (target - summarize(values).mean) * math.sqrt(len(values))


def against_target(label: str, values: Sequence[float], target: float, *, sigma: float | None,
                   margin: float | None) -> TargetTest:
    """Both rules on the final losses. A run that broke down fails them; without a sigma the second is left out.

    The margin needed is MARGIN for SIGMA, and in proportion for another sigma, unless it is given.
    """
    t_p = one_sided_p(values, target)
    if sigma is None:
        return TargetTest(label, len(values), target, t_p, None, None)
    needed = MARGIN / SIGMA * sigma if margin is None else margin
    return TargetTest(label, len(values), target, t_p, z_margin(values, target), needed)


def power_of_rule(delta: float, n: int, *, sigma: float = SIGMA, margin: float = MARGIN) -> float:
    """Probability that a method whose true mean is target - delta reaches `margin` with n seeds: z_margin is normal
    with mean delta sqrt(n) and deviation sigma."""
    return float(stats.norm.cdf((delta * math.sqrt(n) - margin) / sigma))


def power_of_t(effect: float, n: int, alpha: float = 0.05) -> float:
    """Power of the two-sided t-test with n seeds a side, for a difference of `effect` standard deviations."""
    freedom, shift = 2 * n - 2, min(abs(effect), MOST_EFFECT) * math.sqrt(n / 2)
    critical = stats.t.isf(alpha / 2, freedom)
    wrong_side = np.nan_to_num(stats.nct.cdf(-critical, freedom, shift))  # nan where it is too small to be computed
    return float(stats.nct.sf(critical, freedom, shift) + wrong_side)


def seeds_needed(difference: float, sd: float, *, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """The fewest seeds a side, at least 2, that show a true difference at p < alpha with this power; `sd` is that
    within a side. None where no finite number does: the difference is 0 (or over a billion seeds)."""
    if difference == 0:
        return None
    if sd == 0:
        return 2

    def reaches(n: int) -> bool:
        return power_of_t(difference / sd, n, alpha) >= power

    enough = 2
    while not reaches(enough):
        enough *= 2
        if enough > MOST_SEEDS:
            return None
    fewer = range(max(2, enough // 2), enough)
    return fewer.start + bisect_left(fewer, True, key=reaches)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's correction (1979) for testing all of these at once: the i-th smallest p times (m - i + 1), made monotone
    and cut at 1, in the given order. None, what was not tested, stays and does not count."""
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=ps.__getitem__)
    corrected: list[float | None] = [None] * len(ps)
    least = 0.0
    for rank, i in enumerate(order):
        least = corrected[i] = min(max(least, ps[i] * (len(order) - rank)), 1.0)
    return corrected
