"""Muon^2 and row equilibration against their formulas and limits."""

import pytest
import torch

from configs.groups import Group
from tests.optim.rules.oracle import (
    SHAPES,
    assert_moved_alike,
    directions,
    gaussian,
    gradients,
    nesterov_means,
    polar,
    train,
)


def group_of(rule: str, **changes: object) -> Group:
    return Group(**dict(rule=rule, lr=0.02, norm="spectral", ns="svd", beta2=0.9, momentum=0.8) | changes)


def muon2_twin(start, grads, *, lr, mu, beta2, wd):
    W, v = start.double(), 0
    for grad, average in zip(grads, nesterov_means(grads, mu), strict=True):
        v = beta2 * v + (1 - beta2) * grad.double() ** 2
        W = (1 - lr * wd) * W - lr * polar(average / v.sqrt())
    return W


@pytest.mark.parametrize("shape", SHAPES)
def test_muon2_is_its_formula(shape):
    start, grads = gaussian(*shape, seed=99, scale=0.1), gradients(*shape, steps=20)
    wanted = muon2_twin(start, grads, lr=0.02, mu=0.8, beta2=0.9, wd=0.3)
    assert_moved_alike(train(group_of("muon2", weight_decay=0.3), start, grads), wanted, start, tolerance=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_memories_muon2_orthogonalises_the_sign(shape):
    G = gradients(*shape, steps=1)
    D = directions(group_of("muon2", beta2=0.0, averaging="none"), G)[0]
    torch.testing.assert_close(D.double(), polar(G[0].sign()), rtol=0, atol=1e-5)


def test_a_large_eps_makes_muon2_muon():
    start, grads = gaussian(2, 6, 9, seed=99), gradients(2, 6, 9, steps=10)
    found, wanted = train(group_of("muon2", eps=1e6), start, grads), train(group_of("steepest"), start, grads)
    assert_moved_alike(found, wanted, start, tolerance=1e-4)


def test_muon2_forgets_one_huge_gradient():
    """Its square overflows float32; some steps later it must not be remembered as infinite."""
    grads = [gaussian(1, 6, 9) * 1e30] + [gaussian(1, 6, 9, seed=i) for i in range(1, 200)]
    group = group_of("muon2", beta2=0.5, momentum=0.5)
    assert all(D.isfinite().all() for D in directions(group, grads))
    torch.testing.assert_close(directions(group, grads)[-1], directions(group, grads[100:])[-1], rtol=0, atol=1e-3)


# ---- Equilibration -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", ["steepest", "normuon", "muon2"])
def test_equilibrated_rules_do_not_see_the_length_of_rows(rule, shape):
    """Rows scaled by any positive numbers give the same step (without the elementwise second moment of muon2)."""
    group = group_of(rule, equilibrate=True, eps=1e6 if rule == "muon2" else 1e-10)
    grads = gradients(*shape, steps=6)
    scales = gaussian(shape[0], shape[1], 1, seed=5).exp()
    for a, b in zip(directions(group, grads), directions(group, [g * scales for g in grads]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    plain = directions(group_of(rule, eps=group.eps), [g * scales for g in grads])[-1]
    assert (plain - b).norm() > 0.05 * b.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_equilibration_is_its_formula(shape):
    start, grads = gaussian(*shape, seed=99, scale=0.1), gradients(*shape, steps=20)
    wanted = start.double()
    for average in nesterov_means(grads, 0.8):
        wanted = wanted - 0.02 * polar(average / average.norm(dim=-1, keepdim=True))
    assert_moved_alike(train(group_of("steepest", equilibrate=True), start, grads), wanted, start, tolerance=1e-5)


def test_equilibration_leaves_empty_rows_empty():
    G = gaussian(1, 6, 9)
    G[:, 2] = 0
    D = directions(group_of("steepest", equilibrate=True, ns="quintic"), [G])[0]
    assert D.isfinite().all() and not D[:, 2].any() and D[:, 1].any()


def test_equilibration_belongs_to_norms_of_matrices():
    with pytest.raises(ValueError, match="equilibrate belongs to norm spectral or rms_operator, got norm sign"):
        Group(rule="steepest", norm="sign", equilibrate=True)
