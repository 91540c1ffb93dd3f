"""Test Prodigy: against its formula, against prodigyopt, and on problems whose distance is known."""

import pytest
import torch
from torch import Tensor, nn

from configs.optim import Prodigy
from optim.schedule import Values
from optim.sharded import ShardedOptimizer
from tests.optim.oracle import FULL, assert_moved_alike, gaussian, one_role, parameters

SHAPES = {"a": (6, 10), "b": (10, 6), "c": (6, 10), "d": (13,)}
CONFIG = dict(lr=1.0, beta1=0.9, beta2=0.99, eps=1e-8)


def target(name: str) -> Tensor:
    return gaussian(*SHAPES[name], seed=ord(name))


def make_optimizer(**changes: object) -> tuple[dict[str, nn.Parameter], ShardedOptimizer]:
    params = parameters(SHAPES, scale=0.1)
    return params, one_role(Prodigy(**CONFIG | changes), params)


def gradient(name: str, W: Tensor, step: int) -> Tensor:
    """Return the gradient of |W - target|^2 / 2, plus noise."""
    return W - target(name).to(W.dtype) + 0.1 * gaussian(*SHAPES[name], seed=1000 * step + ord(name)).to(W.dtype)


def values(step: int) -> Values:
    return Values(1 - step / 100, 1, None, 1, 1, None)


def train_ours(steps: int, **changes: object) -> tuple[dict[str, Tensor], ShardedOptimizer]:
    params, optimizer = make_optimizer(**changes)
    for step in range(steps):
        for name, param in params.items():
            param.grad.copy_(gradient(name, param.detach(), step))
        optimizer.step(values(step), step + 1)
    return {name: param.detach() for name, param in params.items()}, optimizer


def start_weights() -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in make_optimizer()[0].items()}


def reference(steps: int, *, wd: float, d0: float = 1e-6, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-8):
    """Return weights and d after `steps` steps of the paper's algorithm 4, in float64."""
    b3 = b2**0.5
    W = {name: w.double() for name, w in start_weights().items()}
    W0, d, numerator = {name: w.clone() for name, w in W.items()}, d0, 0.0
    m, v, s = ({name: torch.zeros_like(w) for name, w in W.items()} for _ in range(3))
    for step in range(steps):
        lr = values(step).lr
        g = {name: gradient(name, w.float(), step).double() for name, w in W.items()}
        numerator = b3 * numerator + sum(d / d0 * d * lr * (g[n] * (W0[n] - W[n])).sum().item() for n in W)
        for n in W:
            s[n] = b3 * s[n] + d / d0 * d * lr * g[n]
            m[n] = b1 * m[n] + (1 - b1) * d * g[n]
            v[n] = b2 * v[n] + (1 - b2) * (d * g[n]) ** 2
        new = max(d, numerator / sum(x.abs().sum().item() for x in s.values()))
        for n in W:
            W[n] = W[n] - d * lr * wd * W[n] - d * lr * m[n] / (v[n].sqrt() + new * eps)
        d = new
    return W, d


@pytest.mark.parametrize("wd", [0.0, 0.3])
def test_prodigy_matches_its_formula(wd):
    weights, optimizer = train_ours(60, weight_decay=wd)
    expected, d = reference(60, wd=wd)
    for name, W in start_weights().items():
        assert_moved_alike(weights[name], expected[name], W, tolerance=3e-4)
    assert optimizer.shared["matrix"]["d"].item() == pytest.approx(d, rel=5e-4)


@pytest.mark.parametrize("wd", [0.0, 0.3])
def test_prodigy_matches_prodigyopt(wd):
    """In 60 steps, in which d grows by five orders of magnitude."""
    public = pytest.importorskip("prodigyopt")
    params = {name: nn.Parameter(W) for name, W in start_weights().items()}
    optimizer = public.Prodigy(params.values(), lr=1.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=wd)
    for step in range(60):
        optimizer.param_groups[0]["lr"] = values(step).lr
        for name, param in params.items():
            param.grad = gradient(name, param.detach(), step)
        optimizer.step()
    weights, our_optimizer = train_ours(60, weight_decay=wd)
    for name, W in start_weights().items():
        assert_moved_alike(weights[name], params[name].detach(), W, tolerance=3e-4)
    assert our_optimizer.shared["matrix"]["d"].item() == pytest.approx(optimizer.param_groups[0]["d"], rel=1e-4)
    assert optimizer.param_groups[0]["d"] > 0.05


def test_ten_steps_match_prodigyopt_up_to_rounding():
    public = pytest.importorskip("prodigyopt")
    params = {name: nn.Parameter(W) for name, W in start_weights().items()}
    optimizer = public.Prodigy(params.values(), lr=1.0, betas=(0.9, 0.99), d0=1e-3)
    for step in range(10):
        optimizer.param_groups[0]["lr"] = values(step).lr
        for name, param in params.items():
            param.grad = gradient(name, param.detach(), step)
        optimizer.step()
    weights, _ = train_ours(10, distance_start=1e-3)
    for name, W in start_weights().items():
        assert_moved_alike(weights[name], params[name].detach(), W, tolerance=1e-5)


def test_the_estimate_grows_and_stays_below_the_distance():
    """For a convex problem without noise, d is a lower bound of the distance in the largest coordinate."""
    params, optimizer = make_optimizer()
    farthest = max((target(name) - param).abs().max().item() for name, param in params.items())
    estimates = []
    for step in range(100):
        for name, param in params.items():
            param.grad.copy_(param.detach() - target(name))
        optimizer.step(FULL, step + 1)
        estimates.append(optimizer.shared["matrix"]["d"].item())
    assert estimates == sorted(estimates) and 1e-3 < estimates[-1] < farthest


@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1e3, 1e10])
def test_the_estimate_ignores_the_scale_of_the_loss(scale):
    def estimate(factor: float) -> float:
        params, optimizer = make_optimizer(eps=0.0)
        for step in range(20):
            for name, param in params.items():
                param.grad.copy_(factor * gradient(name, param.detach(), step))
            optimizer.step(values(step), step + 1)
        return optimizer.shared["matrix"]["d"].item()

    assert estimate(scale) == pytest.approx(estimate(1.0), rel=1e-3)


def test_resuming_continues_bit_for_bit():
    straight, _ = train_ours(12)
    _, half = train_ours(6)
    params, optimizer = make_optimizer()
    optimizer.state.load(half.state.tensors())
    for step in range(6, 12):
        for name, param in params.items():
            param.grad.copy_(gradient(name, param.detach(), step))
        optimizer.step(values(step), step + 1)
    assert all(torch.equal(params[name], straight[name]) for name in params)
