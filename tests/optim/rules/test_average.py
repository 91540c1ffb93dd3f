"""Several averages at once: a kernel of log-spaced exponentials."""

import math

import pytest
import torch

from configs.cli import parse_row
from configs.groups import Group
from optim.rules.average import Average, absorb_square
from tests.optim.rules.oracle import assert_moved_alike, gaussian, gradients, train


def coefficients(count: int, fast: float, slow: float) -> list[float]:
    """Ages 1 / (1 - mu) in a geometric sequence, the slowest first."""
    ages = [(1 / (1 - slow)) ** (1 - k / (count - 1)) * (1 / (1 - fast)) ** (k / (count - 1)) for k in range(count)]
    return [1 - 1 / age for age in ages]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_averages_are_the_mean_of_each(count, nesterov):
    """Unrolled: sum over s of w(t - s) g_s, with w(a) = mean over k of (1 - mu_k) mu_k^a; looking ahead mu_k^(a + 1), and
    the present gradient once more."""
    mus = coefficients(count, 0.3, 0.95)
    start, grads = gaussian(1, 5, 8, seed=9, scale=0.1), gradients(1, 5, 8, steps=20)
    wanted = start.double()
    for t in range(20):
        D = sum(sum((1 - mu) * mu ** (t - s + nesterov) for mu in mus) / count * grads[s].double() for s in range(t + 1))
        if nesterov:
            D = D + sum(1 - mu for mu in mus) / count * grads[t].double()
        wanted = wanted - 0.02 * D / D.norm()
    group = Group(rule="steepest", lr=0.02, norm="frobenius", averages=count, momentum=0.95, momentum_fast=0.3,
                  nesterov=nesterov)
    assert_moved_alike(train(group, start, grads), wanted, start, tolerance=3e-6)


def test_equal_ends_are_one_average():
    start, grads = gaussian(1, 5, 8, seed=9), gradients(1, 5, 8, steps=10)
    several, one = (Group(rule="steepest", lr=0.02, norm="frobenius", averages=n, momentum=0.8, momentum_fast=0.8)
                    for n in (4, 1))
    assert_moved_alike(train(several, start, grads), train(one, start, grads), start, tolerance=1e-6)


def test_the_kernel_has_a_heavier_tail_than_its_mean_age():
    """An impulse is remembered longer than by one average of the same mean age."""
    average, impulse = Average("ema", nesterov=False, count=6, fast=0.5), torch.ones(1, 1, 1)
    state, response = average.init_state(impulse), []
    for t in range(1000):
        response.append(average.next(impulse if t == 0 else impulse * 0, state, torch.tensor(0.99)).item())
    assert sum(response) == pytest.approx(1, abs=1e-3)
    age = sum(t * r for t, r in enumerate(response))
    mu = age / (1 + age)
    assert response[300] > 10 * (1 - mu) * mu**300
    assert all(math.isfinite(r) and r >= 0 for r in response)


def test_several_averages_are_exponential_ones():
    with pytest.raises(ValueError, match="averages 3 belong to averaging ema, got heavy_ball"):
        Group(rule="steepest", averages=3, averaging="heavy_ball")


def test_the_fastest_acts_only_among_several():
    assert parse_row("bytes", ["--optim.matrix.averages", "3", "--optim.matrix.momentum_fast", "0.2"])
    with pytest.raises((ValueError, SystemExit)):
        parse_row("bytes", ["--optim.matrix.momentum_fast", "0.2"])


def test_squares_beyond_float32_are_finite_and_fade():
    memory = torch.zeros(3)
    absorb_square(memory, torch.tensor([1e30, 2.0, 0.0]), 0.5)
    assert memory.isfinite().all() and memory[1] == 2 and memory[2] == 0
    for _ in range(200):
        absorb_square(memory, torch.tensor([1.0, 2.0, 0.0]), 0.5)
    torch.testing.assert_close(memory, torch.tensor([1.0, 4.0, 0.0]))
