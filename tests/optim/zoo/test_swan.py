"""Test SWAN against its formula in float64: rows standardised, then whitened by SVD."""

import pytest
import torch
from torch import Tensor

from configs.optim import SWAN
from optim.groups import build_rule
from optim.zoo.swan import standardise_rows, whiten
from tests.optim.oracle import SHAPES, assert_moved_alike, directions, gaussian, gradients, hyper, train


def swan(**changes: object) -> SWAN:
    return SWAN(**dict(lr=0.01, whiten_steps=30) | changes)


def reference(G: Tensor) -> Tensor:
    """Return the directions, in float64, matrix by matrix; singular values that are rounding errors are left out."""
    steps = []
    for matrix in G.double():
        rows = torch.stack([(row - row.mean()) / row.std(correction=0) for row in matrix])
        U, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        P = (U * (S > 1e-5 * S[0])) @ Vh
        steps.append(P * (P.numel() ** 0.5 / P.norm()))
    return torch.stack(steps)


@pytest.mark.parametrize(("shape", "steps", "tolerance"), [
    ((2, 12, 20), 30, 1e-5), ((1, 3, 50), 30, 1e-5), ((2, 20, 11), 20, 1e-3)])
def test_swan_matches_its_formula(shape, steps, tolerance):
    start, grads = gaussian(*shape, seed=99), gradients(*shape, steps=20)
    expected = start.double() - 0.01 * sum(reference(grad) for grad in grads)
    assert_moved_alike(train(swan(whiten_steps=steps), start, grads), expected, start, tolerance=tolerance)


@pytest.mark.parametrize("steps", [30, 60])
def test_square_matrices_lose_the_direction_that_centring_removes(steps):
    """Rows of mean 0 leave rank n - 1: the other directions converge, this one holds rounding errors only."""
    G = gradients(2, 16, 16, steps=1)[0]
    P = whiten(standardise_rows(G), steps=steps)
    assert P.isfinite().all() and torch.linalg.svdvals(P)[:, 0].max() < 1.001
    if steps == 30:
        assert (directions(swan(), [G])[0].double() - reference(G)).norm() < 0.01 * reference(G).norm()


@pytest.mark.parametrize("steps", [3, 8, 12])
def test_the_iteration_matches_the_papers_coupled_iteration(steps):
    S = standardise_rows(gaussian(1, 10, 30)).double()
    Y = S @ S.mT / (S @ S.mT).norm()
    Z = eye = torch.eye(10).double()[None]
    for _ in range(steps):
        T = (3 * eye - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    expected = Z @ S / (S @ S.mT).norm().sqrt()
    torch.testing.assert_close(whiten(S.float(), steps=steps).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("steps", "low"), [(5, 0.45), (10, 0.99), (20, 0.9999)])
def test_singular_values_after_a_number_of_iterations(steps, low):
    values = torch.linalg.svdvals(whiten(standardise_rows(gaussian(1, 256, 768)), steps=steps))
    assert low < values.min() and values.max() < 1.0001


def test_whitened_rows_are_orthonormal():
    P = whiten(gaussian(3, 12, 30), steps=30)
    torch.testing.assert_close(P @ P.mT, torch.eye(12).expand(3, 12, 12), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_have_rms_one_and_there_is_no_state(shape):
    rule, grads = build_rule(swan()), gradients(*shape, steps=3)
    assert rule.init_state(grads[0]) == {}
    for grad in grads:
        D = rule.direction(grad, grad, {}, hyper(1.0))
        torch.testing.assert_close(D.square().mean((-2, -1)).sqrt(), torch.ones(2), rtol=1e-5, atol=0)
        again = rule.direction(grad, grad * 2.0**-90, {}, hyper(1.0))
        torch.testing.assert_close(again, D, rtol=1e-2, atol=1e-3)


def test_steps_ignore_shift_and_scale_of_rows():
    G = gaussian(1, 8, 20)
    scaled = G * torch.logspace(-3, 3, 8)[:, None] + torch.linspace(-1e-3, 1e-3, 8)[:, None]
    torch.testing.assert_close(directions(swan(), [scaled])[0], directions(swan(), [G])[0], rtol=1e-3, atol=1e-3)


def test_constant_rows_get_no_step():
    """The mean of many 0.1 in float32 differs from 0.1 by rounding, which must not count as a gradient."""
    G = gaussian(1, 4, 1000)
    G[0, 1] = 0.1
    D = directions(swan(), [G])[0]
    assert not D[0, 1].any() and D[0, 0].any()


def test_low_rank_gradients_give_steps_of_the_same_rank():
    G = gaussian(1, 10, 3) @ gaussian(1, 3, 24, seed=1)
    D = directions(swan(whiten_steps=25), [G])[0]
    assert (D.double() - reference(G)).norm() < 0.02 * reference(G).norm()
