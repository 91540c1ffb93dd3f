"""Test manifold Muon: steps are tangential, of norm 1 and optimal; the weights stay on the manifold."""

import pytest
import torch
from torch import Tensor

from configs.optim import Stiefel
from optim.groups import build_rule
from optim.newton_schulz import orthogonalize_svd
from optim.rule import Hyper, Step
from optim.zoo.stiefel import StiefelSet, solve_dual
from tests.optim.oracle import FULL, one_role

SHAPES = [(6, 6), (24, 6), (6, 24), (12, 8)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
HYPER = Hyper(*(torch.tensor(x) for x in (0.1, 0.0, 0.9, 1.0)))


def residual(W: Tensor, A: Tensor) -> Tensor:
    """Return rms(A^T W + W^T A) / rms(A), (K,), which is 0 for tangential steps; wide matrices are transposed."""
    W, A = (x.mT if W.size(-2) < W.size(-1) else x for x in (W, A))
    H = W.mT @ A + A.mT @ W
    return H.square().mean((-2, -1)).sqrt() / A.square().mean((-2, -1)).sqrt().clamp_min(1e-30)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_at(W: Tensor, G: Tensor, **config: object) -> Tensor:
    rule = build_rule(Stiefel(averaging="none", **({"dual_steps": 60} | config)))
    return rule.direction(W, G, rule.init_state(W), HYPER)


@every_shape
def test_steps_are_tangential_and_of_norm_at_most_one(shape):
    W, G = orthogonalize_svd(gaussian(3, *shape)), gaussian(3, *shape, seed=1)
    A = step_at(W, G)
    assert residual(W, A).max() < 1e-4
    assert torch.linalg.matrix_norm(A, 2).max() < 1 + 1e-9


@every_shape
def test_no_tangential_step_of_norm_one_is_steeper(shape):
    W, G = orthogonalize_svd(gaussian(1, *shape)), gaussian(1, *shape, seed=1)
    best = (G * step_at(W, G)).sum()
    tall, is_wide = (W, False) if shape[0] >= shape[1] else (W.mT, True)
    for seed in range(50):
        noise = 0.3 * gaussian(*tall.shape, seed=seed + 2)
        A = (step_at(W, G).mT if is_wide else step_at(W, G)) + noise
        A = A - tall @ (tall.mT @ A + A.mT @ tall) / 2
        A = A / torch.linalg.matrix_norm(A, 2)[:, None, None].clamp_min(1)
        assert ((G.mT if is_wide else G) * A).sum() <= best + 1e-3 * abs(best)


def test_square_weights_have_a_closed_form():
    """The tangent space at W is {W B: B skew}, so A = W msign(skew(W^T G)), in one iteration."""
    W, G = orthogonalize_svd(gaussian(2, 6, 6)), gaussian(2, 6, 6, seed=1)
    C = W.mT @ G
    torch.testing.assert_close(step_at(W, G, dual_steps=1), W @ orthogonalize_svd(C - C.mT), atol=1e-6, rtol=0)


def test_twenty_iterations_leave_a_residual_below_a_thousandth_at_aspect_ratio_four():
    W, G = orthogonalize_svd(gaussian(4, 128, 32)), gaussian(4, 128, 32, seed=1)
    A, _ = solve_dual(W, G, torch.zeros(4, 32, 32, dtype=torch.float64), 20)
    assert residual(W, A).max() < 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@every_shape
def test_the_gradients_scale_does_not_matter(scale, shape):
    W, G = orthogonalize_svd(gaussian(1, *shape)), gaussian(1, *shape, seed=1)
    torch.testing.assert_close(step_at(W, G * scale), step_at(W, G), atol=1e-4, rtol=0)


@every_shape
def test_zero_and_radial_gradients_give_no_step(shape):
    W = orthogonalize_svd(gaussian(1, *shape))
    for G in (torch.zeros_like(W), W.clone()):
        assert step_at(W, G).abs().max() < 1e-5


@every_shape
def test_a_gradient_of_rank_one_gives_a_finite_step(shape):
    W = orthogonalize_svd(gaussian(1, *shape))
    A = step_at(W, gaussian(1, shape[0], 1) @ gaussian(1, 1, shape[1], seed=1))
    assert A.isfinite().all() and torch.linalg.matrix_norm(A, 2).max() < 1 + 1e-6


def test_a_warm_start_of_the_dual_reduces_the_residual():
    W, G = orthogonalize_svd(gaussian(1, 24, 12)), gaussian(1, 24, 12, seed=1)
    rule = build_rule(Stiefel(averaging="none", dual_steps=3))
    state = rule.init_state(W)
    residuals = [residual(W, rule.direction(W, G, state, HYPER)).item() for _ in range(6)]
    assert residuals[-1] < 0.3 * residuals[0]


# ---- The manifold --------------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("lr", [0.0, 0.1, 3.0])
def test_a_tangent_step_and_its_retraction_end_on_the_manifold(shape, lr):
    W, G = orthogonalize_svd(gaussian(2, *shape)).float(), gaussian(2, *shape, seed=1).float()
    before = W.clone()
    StiefelSet().move(W, step_at(W, G), torch.tensor(lr), {})
    assert (torch.linalg.svdvals(W) - 1).abs().max() < (1e-5 if lr < 1 else 0.02)
    assert lr > 0 or torch.allclose(W, before, atol=1e-6)


def test_singular_values_stay_one_while_it_trains():
    params = {"tall": torch.nn.Parameter(gaussian(24, 6).float()), "wide": torch.nn.Parameter(gaussian(6, 24).float())}
    optimizer = one_role(Stiefel(lr=0.1), params)
    for step in range(30):
        for seed, weight in enumerate(params.values()):
            weight.grad.copy_(weight.detach() * 0.3 + gaussian(*weight.shape, seed=100 * step + seed))
        optimizer.step(FULL, step + 1)
        optimizer.zero_grad()
        assert all((torch.linalg.svdvals(w.detach()) - 1).abs().max() < 1e-4 for w in params.values())


def test_zero_weights_raise():
    with pytest.raises(ValueError, match="full rank.*--model.no_zero_init_projections"):
        StiefelSet().project_start(torch.zeros(1, 4, 3))


def test_the_rule_sets_its_constraint():
    assert Step.build(Stiefel()).constraint == StiefelSet()
