"""Clipping in every norm: the nearest gradient in the ball, before the rule sees it, whatever its scale."""

import pytest
import torch
from torch import nn

from configs.groups import Group, Optim
from optim.clip import Clip
from optim.comm import Comm
from optim.groups import build_groups
from optim.norms import build_norm
from optim.schedule import Values
from optim.sharded import ShardedOptimizer
from tests.optim.rules.oracle import gaussian

NORMS = ["spectral", "rms_operator", "schatten", "row", "column", "sign", "frobenius"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_clipped_gradients_lie_in_the_ball_and_small_ones_stay(norm, scale):
    G, clip = scale * gaussian(2, 6, 10), Clip.build(Group(clip=0.5 * scale, clip_norm=norm))
    size = build_norm(Group(rule="steepest", norm=norm)).size
    assert (size(clip(G) / scale) <= 0.5 * (1 + 1e-5)).all() and clip(G).dtype == G.dtype
    inside = G * (0.4 * scale / (size(G / scale) * scale))[:, None, None]
    torch.testing.assert_close(clip(inside) / scale, inside / scale, rtol=1e-5, atol=1e-6)


def test_frobenius_is_pytorchs_clipping_of_each_tensor():
    G = gaussian(3, 6, 10) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    params = [nn.Parameter(torch.zeros(6, 10)) for _ in G]
    for param, grad in zip(params, G, strict=True):
        param.grad = grad.clone()
        nn.utils.clip_grad_norm_([param], 2.0)
    found = Clip.build(Group(clip=2.0))(G)
    torch.testing.assert_close(found, torch.stack([param.grad for param in params]), rtol=1e-5, atol=1e-7)


def test_sign_is_pytorchs_clipping_of_entries():
    G = gaussian(1, 6, 10)
    assert torch.equal(Clip.build(Group(clip=0.5, clip_norm="sign"))(G), G.clamp(-0.5, 0.5))


def stepped(grads: dict[str, torch.Tensor], **fields: object) -> dict[str, torch.Tensor]:
    params = {name: nn.Parameter(torch.zeros_like(grad)) for name, grad in grads.items()}
    optim = Optim(matrix=Group(rule="steepest", norm="frobenius", lr=1.0, **fields))
    optimizer = ShardedOptimizer(build_groups(params, dict.fromkeys(params, "matrix"), optim), Comm())
    for step in range(3):
        for name, param in params.items():
            param.grad.copy_(grads[name] * 10**step)
        optimizer.step(Values(1, 1, None, 1, 1, None), step + 1)
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
    ("adam", "frobenius", "matrix"), ("adam", "row", "row"), ("adam", "sign", "element"), ("sm3", "sign", "matrix")])
def test_tensors_are_cut_no_finer_than_the_ball_allows(rule, norm, scope):
    def group(clip: float):
        optim = Optim(matrix=Group(rule=rule, clip=clip, clip_norm=norm))
        return build_groups({"w": torch.zeros(2, 2)}, {"w": "matrix"}, optim)[0]

    assert group(1.0).scope == scope and group(0.0).scope == group(0.0).rule.scope


def test_the_hyperball_needs_whole_matrices():
    """AdamH: each matrix keeps its own length, though Adam alone may be cut anywhere."""
    params = {name: nn.Parameter(gaussian(5, 8, seed=i, scale=i + 1.0)) for i, name in enumerate("abc")}
    before = {name: param.norm().item() for name, param in params.items()}
    optim = Optim(matrix=Group(rule="adam", constraint="hyperball", lr=0.1))
    optimizer = ShardedOptimizer(build_groups(params, dict.fromkeys(params, "matrix"), optim), Comm())
    start = {name: param.detach().clone() for name, param in params.items()}
    for step in range(5):
        for i, param in enumerate(params.values()):
            param.grad.copy_(gaussian(5, 8, seed=10 * step + i))
        optimizer.step(Values(1, 1, None, 1, 1, None), step + 1)
    for name, param in params.items():
        assert param.norm().item() == pytest.approx(before[name], rel=1e-5)
        assert (param - start[name]).norm() > 0.5


@pytest.mark.parametrize("clip", [-1.0, float("inf"), float("nan")])
def test_radii_that_make_no_ball_are_refused(clip):
    with pytest.raises(ValueError, match="clip must be at least 0"):
        Group(clip=clip)
