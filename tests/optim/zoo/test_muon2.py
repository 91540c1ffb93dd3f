"""Test Muon^2: against its formula, and in its limits."""

import pytest
import torch

from configs.optim import Muon, Muon2
from tests.optim.oracle import (
    SHAPES,
    assert_moved_alike,
    directions,
    gaussian,
    gradients,
    nesterov_means,
    polar,
    train,
)

PLAIN = dict(lr=0.02, unit="spectral", ns="svd", momentum=0.8)


def muon2(**changes: object) -> Muon2:
    return Muon2(**PLAIN | dict(beta2=0.9) | changes)


def reference(start, grads, *, lr, mu, beta2, wd):
    W, v = start.double(), 0
    for grad, average in zip(grads, nesterov_means(grads, mu), strict=True):
        v = beta2 * v + (1 - beta2) * grad.double() ** 2
        W = (1 - lr * wd) * W - lr * polar(average / v.sqrt())
    return W


@pytest.mark.parametrize("shape", SHAPES)
def test_muon2_matches_its_formula(shape):
    start, grads = gaussian(*shape, seed=99, scale=0.1), gradients(*shape, steps=20)
    expected = reference(start, grads, lr=0.02, mu=0.8, beta2=0.9, wd=0.3)
    assert_moved_alike(train(muon2(weight_decay=0.3), start, grads), expected, start, tolerance=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_muon2_without_averages_orthogonalises_the_sign(shape):
    G = gradients(*shape, steps=1)
    D = directions(muon2(beta2=0.0, averaging="none"), G)[0]
    torch.testing.assert_close(D.double(), polar(G[0].sign()), rtol=0, atol=1e-5)


def test_a_large_eps_makes_muon2_muon():
    start, grads = gaussian(2, 6, 9, seed=99), gradients(2, 6, 9, steps=10)
    weights, expected = train(muon2(eps=1e6), start, grads), train(Muon(**PLAIN), start, grads)
    assert_moved_alike(weights, expected, start, tolerance=1e-4)


def test_muon2_forgets_one_huge_gradient():
    """Its square overflows float32; the second moment must not stay infinite."""
    grads = [gaussian(1, 6, 9) * 1e30] + [gaussian(1, 6, 9, seed=i) for i in range(1, 200)]
    config = muon2(beta2=0.5, momentum=0.5)
    assert all(D.isfinite().all() for D in directions(config, grads))
    torch.testing.assert_close(directions(config, grads)[-1], directions(config, grads[100:])[-1], rtol=0, atol=1e-3)
