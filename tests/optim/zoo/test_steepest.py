"""Test steepest descent under any norm: closed forms of Signum, normalised SGD, the row and column norms; and Scion.

Scion (Pethick et al. 2025, arXiv 2502.07529) is `steepest` with decoupled decay: lr = eta rho, weight_decay = 1 / rho.
Then W <- (1 - eta) W - eta rho dual(average): a convex combination of W and a point of the ball of radius rho, so that W
never leaves that ball.
"""

import math

import pytest
import torch
from torch import Tensor

from configs.ablations import find_row
from configs.cli import parse_row
from configs.optim import Averaged, Steepest
from model import GPT
from optim.groups import build_groups, build_rule
from tests.optim.oracle import SHAPES, assert_moved_alike, gaussian, gradients, train


def warm_then_cold(step: int) -> float:
    """Return a learning rate that differs at every step."""
    return 0.02 * min(1, (step + 1) / 10) * (1 - 0.02 * step)


def averages(grads: list[Tensor], averaging: str, nesterov: bool, mu: list[float]) -> list[Tensor]:
    """Return the averages whose duals are the steps, in float64, as sums over all past gradients."""
    results = []
    for t in range(len(grads)):
        weights = [(1 - mu[s] if averaging == "ema" else 1) * math.prod(mu[s + 1:t + 1]) for s in range(t + 1)]
        total = sum(w * g.double() for w, g in zip(weights, grads, strict=False))
        fresh = (1 - mu[t] if averaging == "ema" else 1) * grads[t].double()
        results.append(mu[t] * total + fresh if nesterov else total)
    return results


@pytest.mark.parametrize("averaging", ["ema", "heavy_ball"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("norm", ["sign", "frobenius", "row", "column"])
def test_steepest_descent_with_scheduled_momentum(averaging, nesterov, norm):
    """Signum, normalised SGD, row and column norms: W = W0 - sum of lr dual(average)."""
    start, grads = gaussian(1, 5, 8, seed=99, scale=0.1), gradients(1, 5, 8, steps=15)
    mu = [0.5 + 0.03 * step for step in range(15)]
    expected = start.double()
    for step, A in enumerate(averages(grads, averaging, nesterov, mu)):
        length = {"sign": A.abs(), "frobenius": A.norm(), "row": A.square().mean(-1, keepdim=True).sqrt(),
                  "column": A.square().mean(-2, keepdim=True).sqrt()}[norm]
        expected = expected - warm_then_cold(step) * torch.where(A == 0, 0, A / length)
    config = Steepest(norm=norm, averaging=averaging, nesterov=nesterov)
    weights = train(config, start, grads, lr=warm_then_cold, momentum=lambda step: mu[step])
    assert_moved_alike(weights, expected, start, tolerance=3e-6)


def test_averaging_none_has_no_state():
    config = Steepest(norm="sign", averaging="none")
    rule, grads = build_rule(config), gradients(1, 5, 8, steps=6)
    assert rule.init_state(grads[0]) == {}
    expected = -sum(warm_then_cold(step) * grad.sign() for step, grad in enumerate(grads))
    torch.testing.assert_close(train(config, torch.zeros(1, 5, 8), grads, lr=warm_then_cold), expected, rtol=0, atol=1e-6)


# ---- Scion --------------------------------------------------------------------------------------------------------------

NORMS = ("spectral", "rms_operator", "row", "column", "sign", "frobenius")


def scion(norm: str, *, eta: float, rho: float, constrained: bool = True, **changes: object) -> Steepest:
    """Return Scion's config: no Nesterov, lr = eta rho, decay 1 / rho if constrained."""
    decay = 1 / rho if constrained else 0.0
    return Steepest(**dict(norm=norm, lr=eta * rho, weight_decay=decay, nesterov=False, momentum=0.9, ns="svd") | changes)


def public_scion(norm: str, start: Tensor, grads: list[Tensor], *, constrained: bool) -> Tensor:
    """Return the weights of pytorch_optimizer's SCION, eta 0.02, rho 3, a 0.1; its columns are our rows in embeddings."""
    public = pytest.importorskip("pytorch_optimizer")
    kinds = {"row": (6, {"transpose": True}), "column": (6, {}), "sign": (4, {"normalize": False}), "rms_operator": (2, {})}
    kind, options = kinds[norm]
    param = torch.nn.Parameter(start.clone())
    optimizer = public.SCION([param], lr=0.02, momentum=0.1, constraint=constrained, norm_type=kind,
                             norm_kwargs=options, scale=3.0, weight_decay=0.0)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("norm", ["row", "column", "sign", "rms_operator"])
def test_scion_matches_pytorch_optimizer(norm, constrained):
    """Its Newton-Schulz runs in bfloat16, and it adds 1e-8 in divisions."""
    start, grads = gaussian(24, 40, seed=99, scale=0.1), gradients(24, 40, steps=25)
    config = scion(norm, eta=0.02, rho=3.0, constrained=constrained, ns="quintic")
    weights = train(config, start[None], [grad[None] for grad in grads])[0]
    expected = public_scion(norm, start, grads, constrained=constrained)
    assert_moved_alike(weights, expected, start, tolerance=0.03 if norm == "rms_operator" else 2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eta", [0.05, 0.5, 1.0])
def test_constrained_iterates_stay_in_their_ball(norm, shape, eta):
    """Also from the surface of the ball, and with long steps."""
    config = scion(norm, eta=eta, rho=2.5)
    ball, W = build_rule(config).norm, gaussian(*shape, seed=99)
    W = W / ball.size(W)[:, None, None] * 2.5
    for step in range(15):
        W = train(config, W, gradients(*shape, steps=step + 1)[step:])
        assert (ball.size(W) <= 2.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_constrained_iterates_reach_the_surface_and_unconstrained_leave_the_ball(norm):
    """For a constant gradient W converges to -rho dual(G), the point of the ball with least <G, W>; without decay beyond."""
    start, G = gaussian(1, 8, 6, seed=1, scale=0.01), gaussian(1, 8, 6, seed=2)
    ball = build_rule(scion(norm, eta=0.2, rho=2.5)).norm
    bound = train(scion(norm, eta=0.2, rho=2.5), start, [G] * 60)
    torch.testing.assert_close(bound, -2.5 * ball.dual(G), rtol=0, atol=1e-4)
    free = train(scion(norm, eta=0.2, rho=2.5, constrained=False), start, [G] * 60)
    assert ball.size(free).item() == pytest.approx(60 * 0.2 * 2.5, rel=0.02)


def test_the_ablation_has_no_adam_and_starts_inside_its_balls():
    run = parse_row("bytes", find_row("scion_constrained").flags.split())
    torch.manual_seed(1)
    model = GPT(run.model, vocab_size=256, max_tokens=64)
    params, roles = dict(model.named_parameters()), model.roles()
    groups = build_groups(params, roles, run.optim)
    assert groups
    for group in groups:
        assert isinstance(group.config, Averaged) and group.config.lr * group.config.weight_decay <= 1
        for name, param in group.params.items():
            stack = param.detach().reshape(1, -1, param.size(-1))
            assert (group.rule.norm.size(stack) <= 1 / group.config.weight_decay).all(), name
