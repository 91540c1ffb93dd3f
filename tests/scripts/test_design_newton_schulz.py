"""The designer: fixed points, invariant intervals, equioscillation, the published tuples; and its command line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.notation import parse_table
from optim.newton_schulz import TABLES
from scripts.design_newton_schulz import (
    Optimal,
    Radii,
    compose,
    format_table,
    largest_gammas,
    main,
    minimax_quintic,
    optimal_sequence,
    output_range,
    radii_quintic,
    radii_sequence,
)

INNER, OUTER = st.floats(0.02, 0.9), st.floats(0.02, 0.6)


def with_gamma(x: np.ndarray, inner: float, outer: float, gamma: float) -> np.ndarray:
    """Return the quintics of the family by their definition."""
    return x + gamma * x * (x**2 - (1 - inner) ** 2) * (x**2 - (1 + outer) ** 2)


# ---- Radii ----------------------------------------------------------------------------------------------------------


@given(INNER, OUTER)
def test_fixed_points_are_the_radii(inner, outer):
    points = np.array([-1 - outer, inner - 1, 0, 1 - inner, 1 + outer])
    np.testing.assert_allclose(compose([radii_quintic(inner, outer)], points), points, atol=1e-10)


@given(INNER, OUTER)
def test_iterates_never_leave_the_outer_radius(inner, outer):
    x = np.linspace(0, 1 + outer, 5001)
    y = compose([radii_quintic(inner, outer)], x)
    assert y.min() > -1e-9 and y.max() < 1 + outer + 1e-9


@given(INNER, OUTER)
def test_no_steeper_quintic_would_do(inner, outer):
    """A slope parameter one per cent greater lets the peak cross 1 + outer, or the trough 0."""
    x = np.linspace(0, 1 + outer, 20_001)
    y = with_gamma(x, inner, outer, 1.01 * min(largest_gammas(inner, outer)))
    assert y.min() < 0 or y.max() > 1 + outer


@pytest.mark.parametrize(("inner", "outer"), [(0.2, 0.2), (0.1725, 0.2), (0.125, 0.125), (0.3, 0.3), (0.6, 0.1)])
def test_the_closed_form_is_what_bisection_finds(inner, outer):
    x = np.linspace(0, 1 + outer, 20_001)[1:-1]
    low, high = 0.0, 100.0
    while high - low > 1e-9:
        gamma = (low + high) / 2
        y = with_gamma(x, inner, outer, gamma)
        low, high = (gamma, high) if y.min() >= 0 and y.max() <= 1 + outer else (low, gamma)
    assert min(largest_gammas(inner, outer)) == pytest.approx(low, rel=1e-5)


def test_the_named_table_is_designed():
    triples = radii_sequence((0.2925, 0.2907, 0.2832, 0.2503, 0.0977), 0.2, 5, safety=1.02)
    np.testing.assert_allclose(triples, TABLES["radii"].triples, atol=6e-7)


def test_safety_makes_room_beyond_the_outer_radius():
    """Without it an excess of a thousandth grows at each step: the slope at 1 + outer is about 13."""
    start = np.array([1.2 * 1.001])
    inners = (0.29, 0.29, 0.28)
    assert compose(radii_sequence(inners, 0.2, 3), start) > 2
    assert 0 < compose(radii_sequence(inners, 0.2, 3, safety=1.02), start) <= 1.2


@pytest.mark.parametrize(("inner", "outer"), [(0, 0.2), (1, 0.2), (0.2, 0), (float("nan"), 0.2), (0.2, float("inf"))])
def test_impossible_radii_are_refused(inner, outer):
    with pytest.raises(ValueError, match="radii must have"):
        radii_quintic(inner, outer)


@pytest.mark.parametrize("wrong", [dict(inners=()), dict(steps=0), dict(safety=0.9)])
def test_impossible_sequences_are_refused(wrong):
    with pytest.raises(ValueError, match="radii needs"):
        radii_sequence(**{"inners": (0.2,), "outer": 0.2, "steps": 5} | wrong)


# ---- Optimal --------------------------------------------------------------------------------------------------------


@given(st.floats(1e-4, 0.99), st.floats(0.5, 2))
def test_the_error_equioscillates(share, upper):
    """Chebyshev: +E, -E, +E, -E at four points of [lower, upper], and nowhere more, is what makes it the best."""
    lower = share * upper
    a, b, c = minimax_quintic(lower, upper)
    q, r = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a])))  # where p' = 0
    assert lower < q < r < upper
    E, *others = 1 - compose([(a, b, c)], np.array([lower, q, r, upper]))
    assert E > 0
    np.testing.assert_allclose(others, [-E, E, -E], rtol=1e-6, atol=1e-12)
    error = 1 - compose([(a, b, c)], np.linspace(lower, upper, 40_001))
    assert abs(error).max() <= E * (1 + 1e-6) + 1e-12


def test_no_neighbour_is_better():
    x = np.linspace(0.1, 1, 4001)
    best = np.array(minimax_quintic(0.1, 1))
    worst = abs(1 - compose([best], x)).max()
    for nudge in np.vstack([np.eye(3), -np.eye(3), np.random.default_rng(0).normal(size=(50, 3))]):
        assert abs(1 - compose([best + 0.01 * nudge], x)).max() > worst


def test_on_a_point_it_is_the_taylor_polynomial_of_the_sign():
    """15/8, -10/8, 3/8: p(1) = 1 and p'(1) = p''(1) = 0; the exchange arrives there."""
    assert minimax_quintic(1, 1) == (1.875, -1.25, 0.375)
    np.testing.assert_allclose(minimax_quintic(0.999, 1), (1.875, -1.25, 0.375), atol=0.01)


def test_the_published_tuples():
    """The speedrun's five: lower bound 1e-3, cushion .02, safety 1.02. The paper's first: cushion .02407, safety 1.01."""
    triples = optimal_sequence(1e-3, 5, cushion=0.02, safety=1.02)
    np.testing.assert_allclose(triples, TABLES["polar_express"].triples, atol=1e-6)
    paper = np.array(optimal_sequence(1e-3, 8, cushion=0.02407327424182761, safety=1.01)) * 1.01 ** np.array([1, 3, 5])
    np.testing.assert_allclose(paper[0], (8.28721201814563, -23.595886519098837, 17.300387312530933), rtol=1e-9)


def test_the_composition_ends_in_its_promised_band():
    triples = optimal_sequence(1e-3, 5)
    low, high = output_range(triples, 1e-3)
    assert low == pytest.approx(0.88655, abs=1e-5) and high == pytest.approx(2 - low, abs=1e-4)


@pytest.mark.parametrize("wrong", [dict(lower=0), dict(lower=1.1), dict(steps=0), dict(cushion=-0.1), dict(cushion=1.1),
                                   dict(safety=0.9), dict(lower=float("nan"))])
def test_impossible_bounds_are_refused(wrong):
    with pytest.raises(ValueError, match="optimal needs"):
        optimal_sequence(**{"lower": 0.1, "steps": 2} | wrong)


@pytest.mark.parametrize(("lower", "upper"), [(0, 1), (1, 0.5), (float("nan"), 1)])
def test_impossible_intervals_are_refused(lower, upper):
    with pytest.raises(ValueError, match="an interval has"):
        minimax_quintic(lower, upper)


def test_inline_notation():
    plain = "2.000000,-1.500000,0.500000"
    assert format_table([(2, -1.5, 0.5)]) == plain
    assert format_table([(2, -1.5, 0.5), (1, 0, 0)], 1.02) == f"safety=1.02;{plain};1.000000,0.000000,0.000000"


# ---- The command line -----------------------------------------------------------------------------------------------


ROOT = Path(__file__).resolve().parents[2]


def test_optimal_prints_the_speedrun_table(capsys):
    main(Optimal(cushion=0.02))
    printed = capsys.readouterr().out
    safety, triples = parse_table(printed.split('"')[1])
    assert safety == 1.02 and printed.splitlines()[0].endswith("--optim.matrix.ns_steps 5")
    np.testing.assert_allclose(triples, TABLES["polar_express"].triples, atol=1e-6)
    designed, named = (next(line.split()[-3:] for line in printed.splitlines() if name in line)
                   for name in ("this table", "polar_express"))
    assert designed == named == ["0.847", "1.141", "970"]


def test_radii_repeat_the_last(capsys):
    main(Radii(inner=(0.3, 0.2), steps=4))
    safety, triples = parse_table(capsys.readouterr().out.split('"')[1])
    assert safety == 1 and len(triples) == 4 and triples[1] == triples[2] == triples[3] != triples[0]


def test_mistakes_are_one_line():
    done = subprocess.run([sys.executable, "-m", "scripts.design_newton_schulz", "radii", "--inner", "1.5"], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: radii must have 0 < inner < 1 and outer > 0, got 1.5 and 0.2\n")


@pytest.mark.parametrize("lower", [0, -1, 2, float("nan")])
def test_a_lower_bound_outside_its_range_is_refused(lower):
    with pytest.raises(ValueError, match="lower must lie in"):
        main(Radii(lower=lower))
