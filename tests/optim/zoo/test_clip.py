"""Test gradient clipping in every norm: gradients in the ball at any scale, and clipping before the rule."""

import pytest
import torch
from torch import nn

from configs.optim import SM3, Adam, Extra, Optim, Steepest
from optim.groups import build_groups
from optim.norms import Frobenius, Sign, build_norm
from optim.zoo.clip import Clip
from tests.optim.oracle import FULL, gaussian, one_role

NORMS = ["spectral", "rms_operator", "schatten", "row", "column", "sign", "frobenius"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_clipped_gradients_lie_in_the_ball_and_small_ones_are_unchanged(norm, scale):
    G, clip = scale * gaussian(2, 6, 10), Clip(build_norm(norm), 0.5 * scale)
    size = build_norm(norm).size
    assert (size(clip(G) / scale) <= 0.5 * (1 + 1e-5)).all() and clip(G).dtype == G.dtype
    inside = G * (0.4 * scale / (size(G / scale) * scale))[:, None, None]
    torch.testing.assert_close(clip(inside) / scale, inside / scale, rtol=1e-5, atol=1e-6)


def test_frobenius_matches_pytorchs_clip_grad_norm_per_tensor():
    G = gaussian(3, 6, 10) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    params = [nn.Parameter(torch.zeros(6, 10)) for _ in G]
    for param, grad in zip(params, G, strict=True):
        param.grad = grad.clone()
        nn.utils.clip_grad_norm_([param], 2.0)
    clipped_G = Clip(Frobenius(), 2.0)(G)
    torch.testing.assert_close(clipped_G, torch.stack([param.grad for param in params]), rtol=1e-5, atol=1e-7)


def test_sign_norm_clamps_entries():
    G = gaussian(1, 6, 10)
    assert torch.equal(Clip(Sign(), 0.5)(G), G.clamp(-0.5, 0.5))


def train(grads: dict[str, torch.Tensor], **clip: object) -> dict[str, torch.Tensor]:
    params = {name: nn.Parameter(torch.zeros_like(grad)) for name, grad in grads.items()}
    optimizer = one_role(Steepest(norm="frobenius", lr=1.0, extra=Extra(**clip)), params)
    for step in range(3):
        for name, param in params.items():
            param.grad.copy_(grads[name] * 10**step)
        optimizer.step(FULL, step + 1)
    return {name: param.detach() for name, param in params.items()}


def test_gradients_are_clipped_before_they_are_averaged():
    """Clipped gradients have equal weights in the average, although the gradients grow from step to step."""
    grads = {"a": gaussian(4, 6), "b": gaussian(4, 6, seed=1), "c": gaussian(9)}
    other_grads = {name: gaussian(*grad.shape, seed=7) for name, grad in grads.items()}
    plain, clipped = train(grads), train(grads, clip=0.1)
    for name in grads:
        # All gradients of a tensor are parallel, so their averages have the same dual, clipped or not.
        torch.testing.assert_close(clipped[name], plain[name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(train(other_grads, clip=0.1, clip_norm="sign")[name], train(other_grads)[name], atol=1e-3)


@pytest.mark.parametrize(("rule", "norm", "scope"), [
    (Adam, "frobenius", "matrix"), (Adam, "row", "row"), (Adam, "sign", "element"), (SM3, "sign", "matrix")])
def test_group_scope_includes_the_scope_of_clipping(rule, norm, scope):
    config = rule(extra=Extra(clip=1.0, clip_norm=norm))
    group, = build_groups({"w": torch.zeros(2, 2)}, {"w": "matrix"}, Optim(matrix=config))
    assert group.scope == scope
