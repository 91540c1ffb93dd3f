"""Test Dion and Dion2: against their formulas, in their limits, and the error feedback."""

import math

import pytest
import torch

from configs.optim import Dion, Dion2, Muon
from optim.groups import build_rule
from tests.optim.oracle import SHAPES, assert_moved_alike, directions, gaussian, gradients, hyper, polar, train


def dion(**changes: object) -> Dion:
    return Dion(**dict(lr=0.02, momentum=0.9) | changes)


def dion2(**changes: object) -> Dion2:
    return Dion2(**dict(lr=0.02, momentum=0.9, ns="svd") | changes)


def reference_dion(start, grads, right, *, lr, mu, wd):
    """Return the weights after all gradients, in float64, matrix by matrix; Gram-Schmidt instead of Householder QR."""
    weights = []
    for k in range(start.size(0)):
        W, Q = start[k].double(), right[k].double()
        is_wide = W.size(0) < W.size(1)
        M = torch.zeros_like(W.T if is_wide else W)
        for grad in grads:
            M = M + (grad[k].double().T if is_wide else grad[k].double())
            columns = []
            for column in (M @ Q).T:
                for _ in range(2):
                    column = column - sum(((p @ column) * p for p in columns), torch.zeros_like(column))
                columns.append(column / column.norm())
            P = torch.stack(columns, 1)
            R = M.T @ P
            M = M - (1 - mu) * P @ R.T
            Q = R / R.norm(dim=0)
            D = (W.size(0) / W.size(1)) ** 0.5 * (Q @ P.T if is_wide else P @ Q.T)
            W = (1 - lr * wd) * W - lr * D
        weights.append(W)
    return torch.stack(weights)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank_frac", [0.2, 1.0])
def test_dion_matches_its_formula(shape, rank_frac):
    start, grads = gaussian(*shape, seed=99, scale=0.1), gradients(*shape, steps=20)
    config = dion(rank_frac=rank_frac, weight_decay=0.3)
    right = build_rule(config).init_state(start)["right"]
    expected = reference_dion(start, grads, right, lr=0.02, mu=0.9, wd=0.3)
    tolerance = 3e-5 if rank_frac == 1 and shape[1] == shape[2] else 4e-6  # full rank: the last column is ill-conditioned
    assert_moved_alike(train(config, start, grads), expected, start, tolerance=tolerance)


def test_every_matrix_starts_with_the_same_q():
    """Q depends on the shape alone, not on the rank that owns the matrix; r = ceil(rank_frac min(m, n))."""
    rule = build_rule(dion(rank_frac=0.3))
    whole, part = (rule.init_state(torch.zeros(K, 10, 24))["right"] for K in (5, 2))
    assert whole.shape == (5, 10, 3) and torch.equal(whole[3:], part) and torch.equal(whole[0], whole[1])
    assert rule.init_state(torch.zeros(0, 10, 24))["right"].shape == (0, 10, 3)


def geometric_spectrum(m, n):
    """Return a matrix with singular values 1, 1/2, 1/4, ..., and its U and V."""
    U, V = (torch.linalg.qr(gaussian(side, side, seed=side)).Q for side in (m, n))
    rank = min(m, n)
    return (U[:, :rank] * 0.5 ** torch.arange(rank)) @ V[:, :rank].T, U, V


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
def test_dion_converges_to_the_polar_factor_of_rank_r(shape):
    """For a constant residual (mu = 1: no error feedback) the power iteration makes P Q^T converge to U_r V_r^T."""
    G, U, V = geometric_spectrum(*shape)
    grads = [G[None]] + [torch.zeros_like(G)[None]] * 40
    rank = -(-min(shape) // 2)
    expected = (U[:, :rank] @ V[:, :rank].T) * (shape[0] / shape[1]) ** 0.5
    torch.testing.assert_close(directions(dion(rank_frac=0.5), grads, mu=1.0)[-1][0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_feedback_removes_what_the_step_used(shape):
    """M + g - M' is (1 - mu) times the projection of M + g onto the subspace of the step."""
    config = dion(rank_frac=0.25)
    rule, W, is_tall = build_rule(config), torch.zeros(shape), shape[1] >= shape[2]
    state = rule.init_state(W)
    rank = state["right"].size(-1)
    for t, grad in enumerate(gradients(*shape, steps=6)):
        total = state["residual"].double() + grad.double()
        U, _, Vh = torch.linalg.svd(rule.direction(W, grad, state, hyper(0.1, momentum=0.9, count=t + 1)).double())
        U, V = U[..., :rank], Vh.mT[..., :rank]
        removed = (total - state["residual"].double()) / (1 - 0.9)
        torch.testing.assert_close(removed, U @ U.mT @ total if is_tall else total @ V @ V.mT, rtol=0, atol=1e-3)


def test_every_direction_is_used_in_the_end():
    """One gradient, then zeros: after enough steps of rank one the residual is empty."""
    grads = [gaussian(1, 6, 4)] + [torch.zeros(1, 6, 4)] * 60
    for config in (dion(rank_frac=0.25), dion2(rank_frac=0.25)):
        rule, W = build_rule(config), torch.zeros(1, 6, 4)
        state = rule.init_state(W)
        for grad in grads:
            rule.direction(W, grad, state, hyper(0.1, momentum=0.0))
        assert state["residual"].norm() < 1e-3 * grads[0].norm()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_dion_ignores_the_scale_of_the_gradient(scale):
    grads = [grad * scale for grad in gradients(2, 8, 6, steps=5)]
    plain = gradients(2, 8, 6, steps=5)
    for D, expected in zip(directions(dion(), grads), directions(dion(), plain), strict=True):
        torch.testing.assert_close(D, expected, rtol=0, atol=1e-4)


def test_a_gradient_of_lower_rank_gives_a_step_of_that_rank():
    """Columns of R that are rounding errors give no step and leave their columns of Q unchanged."""
    grads = [gaussian(1, 10, 1, seed=1) @ gaussian(1, 1, 6, seed=2)] * 4
    config = dion(rank_frac=0.5)
    for D in directions(config, grads):
        values = torch.linalg.svdvals(D[0])
        assert values[0] == pytest.approx((10 / 6) ** 0.5, rel=1e-5) and values[1] < 1e-4
    rule, W = build_rule(config), torch.zeros(1, 10, 6)
    state = rule.init_state(W)
    right = state["right"].clone()
    assert not rule.direction(W, torch.zeros_like(W), state, hyper(0.1)).any() and torch.equal(state["right"], right)


# ---- Dion2 ---------------------------------------------------------------------------------------


def reference_dion2(start, grads, *, lr, mu, wd, rank_frac):
    """Return the weights after all gradients, in float64, index by index."""
    weights = []
    for k in range(start.size(0)):
        W, M = start[k].double(), torch.zeros_like(start[k]).double()
        m, n = W.shape
        for grad in grads:
            M = M + grad[k].double()
            lengths = [float(part.abs().sum()) for part in (M if m <= n else M.T)]
            selected = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:math.ceil(min(m, n) * rank_frac)]
            index = (selected, slice(None)) if m <= n else (slice(None), selected)
            D = torch.zeros_like(M)
            D[index] = polar(M[index]) * (m / n) ** 0.5
            M[index] = mu * M[index]
            W = (1 - lr * wd) * W - lr * D
        weights.append(W)
    return torch.stack(weights)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank_frac", [0.25, 0.4, 1.0])
def test_dion2_matches_its_formula(shape, rank_frac):
    start, grads = gaussian(*shape, seed=99, scale=0.1), gradients(*shape, steps=20)
    expected = reference_dion2(start, grads, lr=0.02, mu=0.9, wd=0.3, rank_frac=rank_frac)
    weights = train(dion2(rank_frac=rank_frac, weight_decay=0.3), start, grads)
    assert_moved_alike(weights, expected, start, tolerance=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_dion2_of_all_rows_is_muon_with_heavy_ball_momentum(shape):
    start, grads = gaussian(*shape, seed=99), gradients(*shape, steps=20)
    muon = Muon(lr=0.02, momentum=0.9, averaging="heavy_ball", nesterov=False, ns="svd")
    weights = train(dion2(rank_frac=1.0), start, grads)
    assert_moved_alike(weights, train(muon, start, grads), start, tolerance=1e-5)


def test_rows_are_used_in_turn():
    """Of rows of equal size a quarter moves per step; with mu = 0 each row moves once in four steps."""
    G, moved = gaussian(1, 8, 12), torch.zeros(8)
    for D in directions(dion2(rank_frac=0.25), [G / G.abs().sum(-1, keepdim=True)] * 4, mu=0.0):
        rows = (D[0] != 0).any(-1)
        assert rows.sum() == 2
        moved += rows
    assert (moved == 1).all()
