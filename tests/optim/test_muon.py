"""Muon against its formula and PyTorch's; averages of the gradient, one or several; equilibrated rows."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from configs.optim import Muon, Muon2, NorMuon, Steepest
from optim.muon import average_gradient, init_average
from tests.optim.oracle import (
    SHAPES,
    assert_moved_alike,
    directions,
    gaussian,
    gradients,
    hyper,
    nesterov_means,
    polar,
    train,
)

QUINTIC = (3.4445, -4.7750, 2.0315)


def muon_twin(start: Tensor, grads: list[Tensor], *, lr: float, wd: float, mu: float = 0.95) -> Tensor:
    """Run Jordan's Muon in float64: EMA momentum, Nesterov, five quintic steps, max(1, m/n)^.5."""
    W, momentum = start.double()[0], torch.zeros(start.shape[1:], dtype=torch.float64)
    a, b, c = QUINTIC
    for grad in grads:
        momentum = mu * momentum + (1 - mu) * grad.double()[0]
        X = (1 - mu) * grad.double()[0] + mu * momentum
        X = X / X.norm()
        for _ in range(5):
            X = a * X + b * X @ X.T @ X + c * X @ X.T @ X @ X.T @ X
        W = (1 - lr * wd) * W - lr * max(1, X.size(0) / X.size(1)) ** 0.5 * X
    return W[None]


def muon(**changes: object) -> Muon:
    return Muon(**dict(lr=0.02, weight_decay=0.1, unit="at_least_one", ns="quintic") | changes)


@pytest.mark.parametrize("shape", [(1, 24, 40), (1, 40, 24), (1, 32, 32)])
def test_muon_is_its_formula(shape):
    start, grads = gaussian(*shape, seed=99, scale=0.1), gradients(*shape, steps=20)
    expected = muon_twin(start, grads, lr=0.02, wd=0.1)
    assert_moved_alike(train(muon(), start, grads), expected, start, tolerance=2e-6)


@pytest.mark.parametrize(("unit", "name"), [("at_least_one", "original"), ("match_adam", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(1, 24, 40), (1, 40, 24)])
def test_muon_is_pytorchs_muon(unit, name, nesterov, shape):
    """PyTorch orthogonalises in bfloat16, so the two agree within a few percent."""
    start, grads = gaussian(*shape, seed=99), gradients(*shape, steps=20)
    param = torch.nn.Parameter(start[0].clone())
    optimizer = torch.optim.Muon([param], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=name)
    for grad in grads:
        param.grad = grad[0].clone()
        optimizer.step()
    actual = train(muon(unit=unit, nesterov=nesterov), start, grads)
    assert_moved_alike(actual[0], param.detach(), start[0], tolerance=0.03)


# ---- One average --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
def test_both_averages_step_alike_at_constant_momentum(nesterov):
    start, grads = gaussian(1, 12, 16, seed=99), gradients(1, 12, 16, steps=20)
    ema, ball = (train(muon(averaging=kind, nesterov=nesterov), start, grads) for kind in ("ema", "heavy_ball"))
    assert_moved_alike(ema, ball, start, tolerance=1e-5)


def test_averages_differ_where_momentum_is_scheduled():
    start, grads = gaussian(1, 12, 16, seed=99), gradients(1, 12, 16, steps=20)
    ema, ball = (train(muon(averaging=kind), start, grads, momentum=lambda step: 0.5 + 0.02 * step)
                 for kind in ("ema", "heavy_ball"))
    assert (ema - ball).norm() > 1e-2 * (ball - start).norm()


def test_nesterov_matters():
    start, grads = gaussian(1, 12, 16, seed=99), gradients(1, 12, 16, steps=5)
    with_it, without = (train(muon(nesterov=kind, momentum=0.8), start, grads) for kind in (True, False))
    assert (with_it - without).norm() > 0.05 * (with_it - start).norm()


# ---- Several averages ---------------------------------------------------------------------------------------------------


def coefficients(count: int, fast: float, slow: float) -> list[float]:
    """Return the mu_k whose time scales 1 / (1 - mu_k) are a geometric sequence, the slowest first."""
    ages = [(1 / (1 - slow)) ** (1 - k / (count - 1)) * (1 / (1 - fast)) ** (k / (count - 1)) for k in range(count)]
    return [1 - 1 / age for age in ages]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_averages_are_the_mean_of_each(count, nesterov):
    """The average is sum over s of w(t - s) g_s, with w(a) = mean over k of (1 - mu_k) mu_k^a; with Nesterov mu_k^(a + 1),
    and the current gradient once more."""
    mus = coefficients(count, 0.3, 0.95)
    start, grads = gaussian(1, 5, 8, seed=9, scale=0.1), gradients(1, 5, 8, steps=20)
    expected = start.double()
    for t in range(20):
        D = sum(sum((1 - mu) * mu ** (t - s + nesterov) for mu in mus) / count * grads[s].double() for s in range(t + 1))
        if nesterov:
            D = D + sum(1 - mu for mu in mus) / count * grads[t].double()
        expected = expected - 0.02 * D / D.norm()
    config = Steepest(lr=0.02, norm="frobenius", averages=count, momentum=0.95, momentum_fast=0.3, nesterov=nesterov)
    assert_moved_alike(train(config, start, grads), expected, start, tolerance=3e-6)


def test_equal_ends_are_one_average():
    start, grads = gaussian(1, 5, 8, seed=9), gradients(1, 5, 8, steps=10)
    several, single = (Steepest(lr=0.02, norm="frobenius", averages=n, momentum=0.8, momentum_fast=0.8) for n in (4, 1))
    assert_moved_alike(train(several, start, grads), train(single, start, grads), start, tolerance=1e-6)


def test_the_kernel_has_a_heavier_tail_than_its_mean_age():
    """The response to an impulse fades more slowly than that of one average of the same mean age."""
    config, impulse = Muon(nesterov=False, averages=6, momentum_fast=0.5), torch.ones(1, 1, 1)
    state, response = init_average(impulse, config), []
    for t in range(1000):
        response.append(average_gradient(impulse * (t == 0), state, config, hyper(0.02, momentum=0.99)).item())
    assert sum(response) == pytest.approx(1, abs=1e-3)
    age = sum(t * r for t, r in enumerate(response))
    mu = age / (1 + age)
    assert response[300] > 10 * (1 - mu) * mu**300
    assert all(math.isfinite(r) and r >= 0 for r in response)


# ---- A kernel of fixed averages, and its switch -------------------------------------------------------------------------

KERNEL = ("0.85=0.4385", "0.98=0.5615")


def bi_maxwell_twin(grads: list[Tensor], mu: list[float], switch: int) -> list[Tensor]:
    """Return the step's average after each gradient, in float64: g + mu (m - g) with m the average of momentum mu, and after
    `switch` updates .4385 fast + .5615 slow, both of which were m until then."""
    fast = slow = m = torch.zeros_like(grads[0], dtype=torch.float64)
    means = []
    for t, grad in enumerate(grads):
        g = grad.double()
        if t < switch:
            m = mu[t] * m + (1 - mu[t]) * g
            fast = slow = m
        else:
            fast, slow = 0.85 * fast + 0.15 * g, 0.98 * slow + 0.02 * g
            m = 0.4385 * fast + 0.5615 * slow
        means.append(mu[t] * m + (1 - mu[t]) * g)
    return means


@pytest.mark.parametrize("switch", [0, 4, 30])
def test_the_kernel_is_its_formula(switch):
    start, grads = gaussian(1, 5, 8, seed=9, scale=0.1), gradients(1, 5, 8, steps=12)
    mu = [0.8 + 0.01 * t for t in range(12)]
    expected = start.double()
    for mean in bi_maxwell_twin(grads, mu, switch):
        expected = expected - 0.02 * mean / mean.norm()
    config = Steepest(lr=0.02, norm="frobenius", kernel=KERNEL, kernel_from=switch)
    assert_moved_alike(train(config, start, grads, momentum=lambda t: mu[t]), expected, start, tolerance=3e-6)


@pytest.mark.parametrize("several", [{"kernel": KERNEL}, {"averages": 4, "momentum_fast": 0.3}])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_up_to_the_switch_it_is_one_average_to_the_bit(several, nesterov, dtype):
    """The update at which it is switched on is still the old one: from the next on the averages have their own memory."""
    grads = [grad.to(dtype) for grad in gradients(1, 5, 8, steps=9)]
    single, switched = (Steepest(norm="frobenius", nesterov=nesterov, **options)
                        for options in ({}, several | {"kernel_from": 5}))
    pairs = list(zip(directions(single, grads), directions(switched, grads), strict=True))
    assert [torch.equal(a, b) for a, b in pairs] == [True] * 5 + [False] * 4


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_kernel_of_one_average_is_that_average(nesterov):
    grads = gradients(1, 5, 8, steps=6)
    kernel, single = (Steepest(norm="frobenius", nesterov=nesterov, momentum=0.7, **options)
                      for options in ({"kernel": ("0.7=3",)}, {}))
    for a, b in zip(directions(kernel, grads), directions(single, grads), strict=True):
        torch.testing.assert_close(a, b)


def test_its_mean_age_is_that_of_its_source():
    """.4385 x .85 / .15 + .5615 x .98 / .02 = 30 updates (pull request 339)."""
    config, impulse = Muon(nesterov=False, kernel=KERNEL), torch.ones(1, 1, 1)
    state = init_average(impulse, config)
    response = [average_gradient(impulse * (t == 0), state, config, hyper(0.02)).item() for t in range(1500)]
    assert sum(response) == pytest.approx(1, abs=1e-4)
    assert sum(t * r for t, r in enumerate(response)) == pytest.approx(0.4385 * 0.85 / 0.15 + 0.5615 * 49, rel=1e-3)


def test_the_switch_compiles_no_second_graph():
    config, counter = Muon(kernel=KERNEL, kernel_from=2), CompileCounter()
    average = torch.compile(average_gradient, backend=counter, fullgraph=True, dynamic=False)
    compiled, eager = ({key: x.clone() for key, x in init_average(torch.zeros(1, 4, 6), config).items()} for _ in range(2))
    for t, grad in enumerate(gradients(1, 4, 6, steps=5), 1):
        numbers = hyper(0.02, momentum=0.9 + t / 100, count=t)
        torch.testing.assert_close(average(grad, compiled, config, numbers), average_gradient(grad, eager, config, numbers))
    assert counter.frame_count == 1


# ---- Equilibration -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", [Muon(ns="svd"), NorMuon(ns="svd"), Muon2(ns="svd", eps=1e6)],
                         ids=lambda config: config.rule)
def test_equilibrated_rules_do_not_see_the_length_of_rows(config, shape):
    """Scaling rows by positive numbers changes no step; eps is huge for muon2, to switch off its second moment."""
    equilibrated = replace(config, equilibrate=True)
    grads = gradients(*shape, steps=6)
    scales = gaussian(shape[0], shape[1], 1, seed=5).exp()
    scaled = [grad * scales for grad in grads]
    for a, b in zip(directions(equilibrated, grads), directions(equilibrated, scaled), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert (directions(config, scaled)[-1] - b).norm() > 0.05 * b.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_equilibration_is_its_formula(shape):
    start, grads = gaussian(*shape, seed=99, scale=0.1), gradients(*shape, steps=20)
    expected = start.double()
    for average in nesterov_means(grads, 0.8):
        expected = expected - 0.02 * polar(average / average.norm(dim=-1, keepdim=True))
    config = Muon(lr=0.02, unit="spectral", ns="svd", momentum=0.8, equilibrate=True)
    assert_moved_alike(train(config, start, grads), expected, start, tolerance=1e-5)


def test_equilibration_leaves_empty_rows_empty():
    G = gaussian(1, 6, 9)
    G[:, 2] = 0
    D = directions(Muon(equilibrate=True, ns="quintic"), [G])[0]
    assert D.isfinite().all() and not D[:, 2].any() and D[:, 1].any()
