"""Test the sphere: steps and tangential parts against their closed forms."""

import math

import pytest
import torch
from torch import Tensor

from optim.zoo.hyperball import Hyperball
from optim.zoo.sphere import Sphere


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start_on_sphere(constraint: Sphere, *shape: int) -> Tensor:
    W = gaussian(*shape)
    constraint.project_start(W)
    return W


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_geodesic_step_turns_by_lr_times_the_tangents_length(axis):
    sphere = Sphere(axis=axis, retraction="geodesic")
    W, D = start_on_sphere(sphere, 2, 3, 4), gaussian(2, 3, 4, seed=1)
    tangent = D - W * (W * D).sum(axis, keepdim=True)
    before = W.clone()
    sphere.move(W, D, torch.tensor(0.3, dtype=torch.float64), {})
    angle = torch.acos((W * before).sum(axis).clamp(-1, 1))
    torch.testing.assert_close(angle, 0.3 * tangent.norm(dim=axis))
    assert ((W - before) * D).sum() < 0


def test_half_a_turn_along_the_geodesic_reaches_the_other_pole():
    sphere = Sphere(retraction="geodesic")
    W, D = torch.tensor([[[1.0, 0.0]]]).double(), torch.tensor([[[5.0, 1.0]]]).double()  # the radial part does not count
    sphere.move(W, D, torch.tensor(math.pi).double(), {})
    torch.testing.assert_close(W, torch.tensor([[[-1.0, 0.0]]]).double())


@pytest.mark.parametrize("axis", [-1, -2])
def test_retraction_and_geodesic_agree_to_second_order(axis):
    W, D = start_on_sphere(Sphere(axis=axis), 2, 3, 4), gaussian(2, 3, 4, seed=1)
    gaps = []
    for lr in (1e-2, 1e-3):
        straight, great = W.clone(), W.clone()
        Sphere(axis=axis, tangent="dual").move(straight, D, torch.tensor(lr).double(), {})
        Sphere(axis=axis, retraction="geodesic").move(great, D, torch.tensor(lr).double(), {})
        gaps.append((straight - great).abs().max())
    assert gaps[1] < 2e-3 * gaps[0]  # the difference is even of third order


@pytest.mark.parametrize("tangent", ["gradient", "momentum", "dual"])
def test_gradients_and_averages_are_tangential_as_configured(tangent):
    sphere = Sphere(tangent=tangent)
    W, G, state = start_on_sphere(sphere, 2, 3, 4), gaussian(2, 3, 4, seed=1), {"momentum": gaussian(2, 3, 4, seed=2)}
    projected = sphere.project_gradient(W, G, state)
    torch.testing.assert_close((projected.double() * W).sum(-1), torch.zeros(2, 3).double(), atol=1e-6, rtol=0)
    radial = (state["momentum"] * W).sum(-1).abs().max()
    assert (radial < 1e-6) == (tangent != "gradient")


def test_tangent_none_changes_neither_gradient_nor_average():
    G, state = gaussian(1, 2, 3), {"momentum": gaussian(1, 2, 3, seed=1)}
    before = state["momentum"].clone()
    assert Sphere().project_gradient(gaussian(1, 2, 3, seed=2), G, state) is G and torch.equal(state["momentum"], before)


def test_steepest_descent_on_the_sphere_is_the_best_of_all_tangent_steps():
    """Euclidean norm of rows: no tangential step of the same length decreases the loss more, to first order."""
    W, G = start_on_sphere(Sphere(), 1, 1, 6), gaussian(1, 1, 6, seed=1)
    best = Sphere(tangent="gradient").project_gradient(W, G, {})
    best = best / best.norm()
    for seed in range(20):
        other = Sphere(tangent="gradient").project_gradient(W, gaussian(1, 1, 6, seed=seed + 2), {})
        assert (G * other / other.norm()).sum() <= (G * best).sum() + 1e-6


@pytest.mark.parametrize(("constraint", "scope"), [
    (Hyperball(), "matrix"), (Sphere(), "row"), (Sphere().with_axis(-2), "matrix")])
def test_scope_keeps_vectors_whole(constraint, scope):
    assert constraint.scope == scope


def test_zero_padding_stays_zero():
    W = torch.zeros(1, 2, 3)
    for sphere in (Sphere(), Sphere(retraction="geodesic")):
        sphere.move(W, torch.zeros(1, 2, 3), torch.tensor(0.1), {})
        assert not W.any()
