"""Clipping in every norm: the nearest gradient in the ball, before the rule sees it, whatever its scale."""

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
def test_clipped_gradients_lie_in_the_ball_and_small_ones_stay(norm, scale):
    G, clip = scale * gaussian(2, 6, 10), Clip(build_norm(norm), 0.5 * scale)
    size = build_norm(norm).size
    assert (size(clip(G) / scale) <= 0.5 * (1 + 1e-5)).all() and clip(G).dtype == G.dtype
    inside = G * (0.4 * scale / (size(G / scale) * scale))[:, None, None]
    torch.testing.assert_close(clip(inside) / scale, inside / scale, rtol=1e-5, atol=1e-6)


def test_frobenius_is_pytorchs_clipping_of_each_tensor():
    G = gaussian(3, 6, 10) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    params = [nn.Parameter(torch.zeros(6, 10)) for _ in G]
    for param, grad in zip(params, G, strict=True):
        param.grad = grad.clone()
        nn.utils.clip_grad_norm_([param], 2.0)
    found = Clip(Frobenius(), 2.0)(G)
    torch.testing.assert_close(found, torch.stack([param.grad for param in params]), rtol=1e-5, atol=1e-7)


def test_sign_is_pytorchs_clipping_of_entries():
    G = gaussian(1, 6, 10)
    assert torch.equal(Clip(Sign(), 0.5)(G), G.clamp(-0.5, 0.5))


def stepped(grads: dict[str, torch.Tensor], **clip: object) -> dict[str, torch.Tensor]:
    params = {name: nn.Parameter(torch.zeros_like(grad)) for name, grad in grads.items()}
    optimizer = one_role(Steepest(norm="frobenius", lr=1.0, extra=Extra(**clip)), params)
    for step in range(3):
        for name, param in params.items():
            param.grad.copy_(grads[name] * 10**step)
        optimizer.step(FULL, step + 1)
    return {name: param.detach() for name, param in params.items()}


def test_the_rule_sees_the_clipped_gradient():
    """An average of clipped gradients is not the clipped average: the growing gradients count alike."""
    grads = {"a": gaussian(4, 6), "b": gaussian(4, 6, seed=1), "c": gaussian(9)}
    other = {name: gaussian(*grad.shape, seed=7) for name, grad in grads.items()}
    plain, clipped = stepped(grads), stepped(grads, clip=0.1)
    for name in grads:
        torch.testing.assert_close(clipped[name], plain[name], rtol=1e-4, atol=1e-5)  # one direction: the dual is the same
        assert not torch.allclose(stepped(other, clip=0.1, clip_norm="sign")[name], stepped(other)[name], atol=1e-3)


@pytest.mark.parametrize(("rule", "norm", "scope"), [
    (Adam, "frobenius", "matrix"), (Adam, "row", "row"), (Adam, "sign", "element"), (SM3, "sign", "matrix")])
def test_tensors_are_cut_no_finer_than_the_ball_allows(rule, norm, scope):
    config = rule(extra=Extra(clip=1.0, clip_norm=norm))
    group, = build_groups({"w": torch.zeros(2, 2)}, {"w": "matrix"}, Optim(matrix=config))
    assert group.scope == scope
