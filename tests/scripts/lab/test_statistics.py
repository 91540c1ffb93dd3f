"""Statistics of runs, against published numbers, scipy's own tests and simulation; invariance to scale and shift."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scripts.lab.statistics import (
    MARGIN,
    SIGMA,
    holm,
    one_sided_p,
    power_of_rule,
    power_of_t,
    rank_p,
    seeds_needed,
    summarize,
    welch,
    z_margin,
)

RECORD = [3.2791, 3.2778, 3.2787, 3.2784]  # a record's log: p = .006
TRACK3 = [3.27543, 3.27615, 3.27651, 3.27726, 3.27770, 3.27775, 3.27787, 3.27794]
A, B = [3.2791, 3.2778, 3.2787, 3.2784], [3.2772, 3.2756, 3.2784, 3.2783, 3.2760]

samples = st.lists(st.integers(0, 1000).map(lambda i: i / 1000), min_size=3, max_size=8).filter(lambda v: len(set(v)) > 1)


def test_published_mean_and_deviation():
    summary = summarize([3.2772, 3.2756, 3.2784, 3.2783])
    assert (summary.n, round(summary.mean, 4), round(summary.sd, 4)) == (4, 3.2774, 0.0013)


def test_published_p_of_a_record():
    assert round(one_sided_p(RECORD, 3.28), 3) == 0.006


def test_published_margin_of_track_3():
    assert round(summarize(TRACK3).mean, 5) == 3.27708
    assert round(z_margin(TRACK3, 3.28), 5) == 0.00827


def test_the_margin_is_p_of_a_thousandth():
    assert round(stats.norm.sf(MARGIN / SIGMA), 3) == 0.001


def test_the_interval_is_students():
    low, high = stats.ttest_1samp(A, 0).confidence_interval(0.9)
    assert summarize(A, 0.9)[3:] == pytest.approx((low, high))


def test_welch_is_scipys():
    expected = stats.ttest_ind(A, B, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    assert welch(A, B) == pytest.approx((np.mean(A) - np.mean(B), low, high, expected.pvalue))


def test_the_one_sided_p_is_scipys():
    assert one_sided_p(B, 3.279) == pytest.approx(stats.ttest_1samp(B, 3.279, alternative="less").pvalue)


def test_one_value_has_no_scatter():
    assert summarize([3.0]) == (1, 3.0, None, None, None)
    assert welch([3.0], [2.5, 2.0]) == (0.75, None, None, None)
    assert one_sided_p([3.0], 3.28) is None
    with pytest.raises(ValueError, match="no values"):
        summarize([])


def test_infinite_losses_have_no_scatter():
    assert summarize([1.0, math.inf]) == (2, math.inf, None, None, None)
    assert welch([1.0, math.inf], [1.0, 2.0]) == (math.inf, None, None, None)


def test_no_variance():
    assert welch([0.1] * 3, [0.1] * 3) == (0.0, 0.0, 0.0, 1.0)
    assert welch([3.0] * 2, [2.0] * 3) == (1.0, 1.0, 1.0, 0.0)
    assert (one_sided_p([3.0, 3.0], 3.28), one_sided_p([3.28, 3.28], 3.28)) == (0.0, 1.0)
    result = welch([3.0, 3.0], [1.0, 2.0])  # only one side has variance: Student's test on that side
    assert result.p == pytest.approx(stats.ttest_1samp([1.0, 2.0], 3.0).pvalue)


@given(samples, samples, st.integers(-5, 5), st.sampled_from([0.5, 2.0, 100.0]))
@settings(max_examples=40, deadline=None)
def test_welch_does_not_depend_on_unit_or_order(a, b, shift, scale):
    plain, scaled = welch(a, b), welch([scale * v + shift for v in a], [scale * v + shift for v in b])
    assert scaled[:3] == pytest.approx([scale * v for v in plain[:3]], abs=1e-9 * scale)
    assert scaled.p == pytest.approx(plain.p, rel=1e-6)
    assert welch(b, a) == pytest.approx((-plain.difference, -plain.high, -plain.low, plain.p))


@given(samples, samples)
@settings(max_examples=40, deadline=None)
def test_the_interval_holds_0_where_p_is_large(a, b):
    result = welch(a, b)
    assert (result.low <= 0 <= result.high) == (result.p >= 0.05)


def test_ranks_without_ties_are_counted_out():
    assert rank_p([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)  # the two most extreme of C(6, 3) orders


def test_ranks_with_never():
    never = math.inf
    assert rank_p([1, 2, 3], [never] * 3) == pytest.approx(2 / 20)
    assert rank_p([1, 2, 3, 4], [5, 6, never, never]) == pytest.approx(2 / 70)
    assert rank_p([never] * 3, [never] * 3) == rank_p([never], [never]) == 1
    assert rank_p([1, 2, never], [1, 2, never]) == 1


def test_ranks_with_ties_by_counting():
    """Enumerate all C(8, 4) ways to divide the values: p is twice the share with a rank sum as small, or as large."""
    a, b = [2.50, 2.51, 2.52, 2.50], [2.4, math.inf, math.inf, math.inf]
    ranks = stats.rankdata([*a, *b])
    sums = np.array([sum(four) for four in combinations(ranks, 4)])
    tails = [np.mean(sums <= sum(ranks[:4])), np.mean(sums >= sum(ranks[:4]))]
    assert rank_p(a, b) == pytest.approx(2 * min(tails))


def test_power_of_the_rule_by_simulation():
    rng = np.random.default_rng(0)
    means = 3.28 - 0.002 + SIGMA * rng.standard_normal((20_000, 4)).mean(axis=1)
    passed = np.mean((3.28 - means) * 2 >= MARGIN)
    assert power_of_rule(0.002, 4) == pytest.approx(passed, abs=0.01)
    assert power_of_rule(0.004, 4, sigma=0.004, margin=0.006) == pytest.approx(stats.norm.cdf(0.5))


def test_power_of_the_t_test_by_simulation():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 20_000))
    passed = np.mean(stats.ttest_ind(a + 1.5, b).pvalue < 0.05)
    assert power_of_t(1.5, 5) == pytest.approx(passed, abs=0.01)
    assert power_of_t(0.0, 5, alpha=0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 394), (0.5, 64), (0.8, 26), (1.0, 17)])
def test_seeds_needed_are_the_known_ones(effect, seeds):
    """Numbers that every power table prints for p < .05 two-sided at 80 % power."""
    assert seeds_needed(-effect * 0.01, 0.01) == seeds


@given(st.floats(0.05, 50), st.sampled_from([0.01, 0.05]), st.sampled_from([0.5, 0.8, 0.95]))
@settings(max_examples=40, deadline=None)
def test_seeds_needed_are_the_fewest(effect, alpha, power):
    n = seeds_needed(effect, 1.0, alpha=alpha, power=power)
    assert n >= 2 and power_of_t(effect, n, alpha) >= power
    assert n == 2 or power_of_t(effect, n - 1, alpha) < power


def test_seeds_needed_at_the_limits():
    assert seeds_needed(0.0, 1.0) is None
    assert seeds_needed(1e-9, 1.0) is None
    assert seeds_needed(0.1, 0.0) == seeds_needed(1e6, 1e-6) == 2


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_lies_between_none_and_bonferroni(ps):
    for p, corrected in zip(ps, holm(ps), strict=True):
        assert p <= corrected <= min(1.0, p * len(ps)) + 1e-12
    assert min(holm(ps)) == pytest.approx(min(1.0, min(ps) * len(ps)))
