"""Test AGD against algorithm 1 of its paper, and its step length against the majorization that it minimises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from configs.optim import AGD
from optim.groups import build_rule
from optim.sharded import ShardedOptimizer
from tests.optim.oracle import FULL, gaussian, hyper, one_role, parameters

SHAPES = {"in": (12, 5), "hidden": (12, 12), "same": (12, 12), "out": (3, 12)}


def make_optimizer(lr: float = 1.0) -> tuple[dict[str, nn.Parameter], ShardedOptimizer]:
    params = parameters(SHAPES)
    return params, one_role(AGD(lr=lr), params)


def gradient(name: str, W: Tensor, step: int) -> Tensor:
    return 10.0 ** (step % 3 - 1) * (W - gaussian(*SHAPES[name], seed=50 + step).to(W.dtype))


def reference(steps: int, gain: float) -> dict[str, Tensor]:
    """Return the weights after `steps` steps of the paper's algorithm 1, layer by layer, in float64."""
    W = {name: param.detach().double() for name, param in make_optimizer()[0].items()}
    for step in range(steps):
        g = {name: gradient(name, w.float(), step).double() for name, w in W.items()}
        scale = {name: math.sqrt(w.size(0) / w.size(1)) for name, w in W.items()}
        summary = sum(scale[name] * g[name].norm().item() for name in W) / len(W)
        eta = math.log((1 + math.sqrt(1 + 4 * summary)) / 2)
        W = {name: w - gain * eta / len(W) * scale[name] * g[name] / g[name].norm() for name, w in W.items()}
    return W


@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_agd_matches_its_formula(gain):
    params, optimizer = make_optimizer(gain)
    for step in range(20):
        for name, param in params.items():
            param.grad.copy_(gradient(name, param.detach(), step))
        optimizer.step(FULL, step + 1)
    for name, expected in reference(20, gain).items():
        moved = (expected - make_optimizer()[0][name]).norm()
        assert (params[name] - expected).norm() <= 2e-6 * moved, name


@given(st.floats(-20, 4))
def test_step_length_solves_the_papers_equation(power):
    """e^eta (e^eta - 1) = S: there the derivative of the majorization is zero."""
    rule, total = build_rule(AGD()), 10.0**power
    numbers = hyper(1.0)._replace(shared=rule.init_shared())
    rule.update_shared(torch.tensor([total * 4, 4.0]), numbers)
    eta = 4 * numbers.shared["length"].double()
    assert (eta.exp() * eta.expm1()).item() == pytest.approx(total, rel=1e-4, abs=3e-7)


def test_layers_without_gradient_do_not_move_but_count_in_l():
    params, optimizer = make_optimizer()
    before = params["hidden"].detach().clone()
    for name, param in params.items():
        param.grad.copy_(gradient(name, param.detach(), 0) * (name == "out"))
    optimizer.step(FULL, 1)
    assert torch.equal(params["hidden"], before)
    size = gradient("out", make_optimizer()[0]["out"].detach(), 0).norm().item() * 0.5
    eta = math.log((1 + math.sqrt(1 + 4 * size / 4)) / 2)
    moved = (params["out"] - make_optimizer()[0]["out"]).norm().item()
    assert moved == pytest.approx(eta / 4 * 0.5, rel=1e-5)


def test_a_network_trains_without_tuning():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.ReLU(),
                          nn.Linear(32, 4, bias=False))
    for layer in model[::2]:  # the paper's initialisation: orthogonal, of spectral norm (m/n)^.5
        nn.init.orthogonal_(layer.weight, (layer.weight.size(0) / layer.weight.size(1)) ** 0.5)
    params = dict(model.named_parameters())
    optimizer = one_role(AGD(lr=1.0), params)
    x = torch.randn(64, 20)
    y = torch.randn(64, 4)
    losses = []
    for step in range(200):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step(FULL, step + 1)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
