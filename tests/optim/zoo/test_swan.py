"""SWAN against its formula by eigenvectors in float64: standardised rows, whitened."""

import pytest
import torch
from torch import Tensor

from configs.optim import SWAN
from optim.groups import build_rule
from optim.zoo.swan import standardise_rows, whiten
from tests.optim.oracle import SHAPES, assert_moved_alike, directions, gaussian, gradients, hyper, train


def swan(**changes: object) -> SWAN:
    return SWAN(**dict(lr=0.01, whiten_steps=30) | changes)


def twin(G: Tensor) -> Tensor:
    """Matrix by matrix, row by row; directions that rounding alone would fill stay empty."""
    found = []
    for matrix in G.double():
        rows = torch.stack([(row - row.mean()) / row.std(correction=0) for row in matrix])
        U, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        P = (U * (S > 1e-5 * S[0])) @ Vh
        found.append(P * (P.numel() ** 0.5 / P.norm()))
    return torch.stack(found)


@pytest.mark.parametrize(("shape", "steps", "tolerance"), [
    ((2, 12, 20), 30, 1e-5), ((1, 3, 50), 30, 1e-5), ((2, 20, 11), 20, 1e-3)])
def test_swan_is_its_formula(shape, steps, tolerance):
    start, grads = gaussian(*shape, seed=99), gradients(*shape, steps=20)
    wanted = start.double() - 0.01 * sum(twin(grad) for grad in grads)
    assert_moved_alike(train(swan(whiten_steps=steps), start, grads), wanted, start, tolerance=tolerance)


@pytest.mark.parametrize("steps", [30, 60])
def test_square_matrices_lose_the_direction_that_centring_removes(steps):
    """Rows of mean 0 leave rank n - 1; the rest converges, and that direction stays rounding."""
    G = gradients(2, 16, 16, steps=1)[0]
    P = whiten(standardise_rows(G), steps=steps)
    assert P.isfinite().all() and torch.linalg.svdvals(P)[:, 0].max() < 1.001
    if steps == 30:
        assert (directions(swan(), [G])[0].double() - twin(G)).norm() < 0.01 * twin(G).norm()


@pytest.mark.parametrize("steps", [3, 8, 12])
def test_the_iteration_is_the_papers_coupled_one(steps):
    S = standardise_rows(gaussian(1, 10, 30)).double()
    Y = S @ S.mT / (S @ S.mT).norm()
    Z = eye = torch.eye(10).double()[None]
    for _ in range(steps):
        T = (3 * eye - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    wanted = Z @ S / (S @ S.mT).norm().sqrt()
    torch.testing.assert_close(whiten(S.float(), steps=steps).double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("steps", "low"), [(5, 0.45), (10, 0.99), (20, 0.9999)])
def test_how_well_so_many_iterations_whiten(steps, low):
    values = torch.linalg.svdvals(whiten(standardise_rows(gaussian(1, 256, 768)), steps=steps))
    assert low < values.min() and values.max() < 1.0001


def test_whitened_rows_are_orthonormal():
    P = whiten(gaussian(3, 12, 30), steps=30)
    torch.testing.assert_close(P @ P.mT, torch.eye(12).expand(3, 12, 12), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_has_adams_size_and_no_memory(shape):
    rule, grads = build_rule(swan()), gradients(*shape, steps=3)
    assert rule.init_state(grads[0]) == {}
    for grad in grads:
        found = rule.direction(grad, grad, {}, hyper(1.0))
        torch.testing.assert_close(found.square().mean((-2, -1)).sqrt(), torch.ones(2), rtol=1e-5, atol=0)
        again = rule.direction(grad, grad * 2.0**-90, {}, hyper(1.0))
        torch.testing.assert_close(again, found, rtol=1e-2, atol=1e-3)


def test_shifts_and_scales_of_rows_do_not_matter():
    G = gaussian(1, 8, 20)
    scaled = G * torch.logspace(-3, 3, 8)[:, None] + torch.linspace(-1e-3, 1e-3, 8)[:, None]
    torch.testing.assert_close(directions(swan(), [scaled])[0], directions(swan(), [G])[0], rtol=1e-3, atol=1e-3)


def test_constant_rows_get_no_step():
    """0.1 is not a float32: the mean of many differs from it by rounding, which must not be taken for a gradient."""
    G = gaussian(1, 4, 1000)
    G[0, 1] = 0.1
    found = directions(swan(), [G])[0]
    assert not found[0, 1].any() and found[0, 0].any()


def test_low_rank_gradients_fill_their_own_space_alone():
    G = gaussian(1, 10, 3) @ gaussian(1, 3, 24, seed=1)
    found = directions(swan(whiten_steps=25), [G])[0]
    assert (found.double() - twin(G)).norm() < 0.02 * twin(G).norm()
