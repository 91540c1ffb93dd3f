"""Test Muown: against its formula with explicit g and v, and its effect on lengths and directions of rows."""

import pytest
import torch

from configs.optim import Muown
from optim.zoo.muown import ZERO_ROW_GAIN
from tests.optim.oracle import SHAPES, assert_moved_alike, gaussian, gradients, polar, train


def muown(**changes: object) -> Muown:
    base = dict(lr=0.02, unit="match_adam", ns="svd", beta1=0.9, beta2=0.95, momentum=0.8,
                averaging="heavy_ball")
    return Muown(**base | changes)


def reference(start, grads, *, lr, mu, betas=(0.9, 0.95), eps=1e-10):
    """Return the weights after all gradients, in float64, by autograd through W = g v / |v| with parameters g, v."""
    weights = []
    for k in range(start.size(0)):
        W = start[k].double()
        length = W.norm(dim=1, keepdim=True)
        g = torch.where(length > 0, length, ZERO_ROW_GAIN)
        v, rho = W.clone(), g.clone()
        memory, mean, square = torch.zeros_like(v), torch.zeros_like(g), torch.zeros_like(g)
        for t, grad in enumerate(grads):
            with torch.enable_grad():
                g_leaf, v_leaf = g.clone().requires_grad_(), v.clone().requires_grad_()
                size = v_leaf.norm(dim=1, keepdim=True).where(v.norm(dim=1, keepdim=True) > 0, rho)
                grad_g, grad_v = torch.autograd.grad((g_leaf * v_leaf / size * grad[k].double()).sum(), (g_leaf, v_leaf))
            memory = mu * memory + grad_v
            v = v - lr * 0.2 * max(v.shape) ** 0.5 * polar(grad_v + mu * memory)
            mean = betas[0] * mean + (1 - betas[0]) * grad_g
            square = betas[1] * square + (1 - betas[1]) * grad_g**2
            hats = mean / (1 - betas[0] ** (t + 1)), square / (1 - betas[1] ** (t + 1))
            g = g - lr * hats[0] / (hats[1].sqrt() + eps)
            v = rho * v / v.norm(dim=1, keepdim=True)
            W = g * v / rho
        weights.append(W)
    return torch.stack(weights)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_muown_matches_its_formula(shape, scale):
    """Scale 0.01: the gains are so small that they change sign on the way."""
    start, grads = gaussian(*shape, seed=99, scale=scale), gradients(*shape, steps=20)
    assert_moved_alike(train(muown(), start, grads), reference(start, grads, lr=0.02, mu=0.8), start, tolerance=2e-4)


def test_zero_rows_start_with_the_default_length():
    start, grads = torch.zeros(1, 12, 20), gradients(1, 12, 20, steps=20)
    expected = reference(start, grads, lr=0.02, mu=0.8)
    assert_moved_alike(train(muown(), start, grads), expected, start, tolerance=2e-4)
    first = train(muown(), start, grads[:1])
    assert ((first.norm(dim=-1) - ZERO_ROW_GAIN).abs() <= 0.0201).all()


def test_a_gradient_along_the_weights_changes_lengths_only():
    start = gaussian(1, 6, 9)
    weights = train(muown(ns="quintic"), start, [start * 3] * 3)
    torch.testing.assert_close(weights / weights.norm(dim=-1, keepdim=True), start / start.norm(dim=-1, keepdim=True),
                               rtol=0, atol=0.05)
    assert (weights.norm(dim=-1) < start.norm(dim=-1)).all()


def test_decay_shortens_rows():
    """W <- (1 - lr wd) W is not undone by the next step, because the gain is read from the weights."""
    start = gaussian(1, 6, 9)
    weights = train(muown(weight_decay=5.0, lr=0.1), start, [torch.zeros(1, 6, 9)] * 3)
    torch.testing.assert_close(weights, start * 0.5**3, rtol=1e-5, atol=1e-6)


def test_lr_zero_moves_nothing():
    start = gaussian(1, 6, 9)
    assert torch.equal(train(muown(lr=0.0), start, gradients(1, 6, 9, steps=3)), start)
