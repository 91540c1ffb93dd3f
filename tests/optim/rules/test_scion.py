"""Scion (Pethick et al. 2025, arXiv 2502.07529) is `steepest` with decoupled decay: lr = eta rho, weight_decay = 1 / rho.

Then W <- (1 - eta) W - eta rho dual(average): a convex combination of W and a point of the ball of radius rho, so that W
never leaves that ball.
"""

import pytest
import torch
from torch import Tensor

from configs.ablations import row_named
from configs.groups import Group
from model import GPT
from optim.groups import build_groups
from optim.norms import build_norm
from tests.optim.rules.oracle import SHAPES, assert_moved_alike, gaussian, gradients, train

NORMS = ("spectral", "rms_operator", "row", "column", "sign", "frobenius")


def scion(norm: str, *, eta: float, rho: float, constrained: bool = True, **changes: object) -> Group:
    """Its average has no look-ahead."""
    decay = 1 / rho if constrained else 0.0
    return Group(**dict(rule="steepest", norm=norm, lr=eta * rho, weight_decay=decay, nesterov=False, momentum=0.9,
                        ns="svd") | changes)


def public_scion(norm: str, start: Tensor, grads: list[Tensor], *, constrained: bool) -> Tensor:
    """pytorch_optimizer's, eta 0.02, rho 3, a 0.1; its tables have the columns where ours have the rows."""
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
def test_scion_is_pytorch_optimizers(norm, constrained):
    """Whose Newton-Schulz runs in bfloat16, and whose divisions add 1e-8."""
    start, grads = gaussian(24, 40, seed=99, scale=0.1), gradients(24, 40, steps=25)
    group = scion(norm, eta=0.02, rho=3.0, constrained=constrained, ns="quintic")
    found = train(group, start[None], [grad[None] for grad in grads])[0]
    wanted = public_scion(norm, start, grads, constrained=constrained)
    assert_moved_alike(found, wanted, start, tolerance=0.03 if norm == "rms_operator" else 2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eta", [0.05, 0.5, 1.0])
def test_constrained_iterates_stay_in_their_ball(norm, shape, eta):
    """From its surface on, and with long steps."""
    group = scion(norm, eta=eta, rho=2.5)
    ball, W = build_norm(group), gaussian(*shape, seed=99)
    W = W / ball.size(W)[:, None, None] * 2.5
    for step in range(15):
        W = train(group, W, gradients(*shape, steps=step + 1)[step:])
        assert (ball.size(W) <= 2.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_ball_is_reached_and_unconstrained_iterates_leave_it(norm):
    """Under a constant gradient W goes to the ball's point farthest down, -rho dual(G); without decay beyond it."""
    start, G = gaussian(1, 8, 6, seed=1, scale=0.01), gaussian(1, 8, 6, seed=2)
    ball = build_norm(scion(norm, eta=0.2, rho=2.5))
    bound = train(scion(norm, eta=0.2, rho=2.5), start, [G] * 60)
    torch.testing.assert_close(bound, -2.5 * ball.dual(G), rtol=0, atol=1e-4)
    free = train(scion(norm, eta=0.2, rho=2.5, constrained=False), start, [G] * 60)
    assert ball.size(free).item() == pytest.approx(60 * 0.2 * 2.5, rel=0.02)


def test_the_ablation_has_no_adam_and_starts_inside_its_balls():
    run = row_named("scion_constrained")
    torch.manual_seed(1)
    model = GPT(run.model, vocab_size=256, max_tokens=64)
    params, roles = dict(model.named_parameters()), model.roles()
    groups = build_groups(params, roles, run.optim)
    assert groups
    for group in groups:
        assert group.config.rule == "steepest" and group.config.lr * group.config.weight_decay <= 1
        for name, param in group.params.items():
            stack = param.detach().reshape(1, -1, param.size(-1))
            assert (group.rule.norm.size(stack) <= 1 / group.config.weight_decay).all(), name
