"""Test the radial brake, the row floor and the constraint `radial`, against slow float64 references."""

import pytest
import torch
from torch import Tensor

from configs.optim import RULES, Adam, Extra, Optim
from optim.constraint import length
from optim.groups import build_groups, build_rule
from optim.rule import Step
from optim.zoo.radial import Radial, Shape
from tests.optim.oracle import gaussian, hyper

EXTREME_SCALES = (0.0, 1e-30, 1e30)


def reference(W: Tensor, D: Tensor, brake: float, floor: float) -> Tensor:
    """Return the changed directions, in float64, matrix by matrix and row by row."""
    changed = []
    for w, d in zip(W.double(), D.double(), strict=True):
        inner = (d * w).sum().item()
        if inner < 0:  # W - lr D is longer than W
            d = d - brake * inner / (w * w).sum() * w
        rows = [row * max(1.0, floor * at.norm().item() / max(row.norm().item(), 1e-30))
                for row, at in zip(d, w, strict=True)]
        changed.append(torch.stack(rows))
    return torch.stack(changed)


def outward_and_inward() -> tuple[Tensor, Tensor]:
    """Return two weights and two directions: the first lengthens its matrix, the second shortens it; one row is short."""
    W = gaussian(2, 5, 7)
    D = gaussian(2, 5, 7, seed=1) * 0.3 + W * torch.tensor([-0.5, 0.5]).view(2, 1, 1)
    D[:, 1] *= 1e-3
    return W, D


@pytest.mark.parametrize(("brake", "floor"), [(0.5, 0.0), (1.0, 0.0), (0.0, 0.3825), (0.5, 0.3825), (0.0, 0.0)])
def test_brake_and_floor_match_their_formulas(brake, floor):
    W, D = outward_and_inward()
    torch.testing.assert_close(Shape(brake, floor)(W, D).double(), reference(W, D, brake, floor), rtol=1e-5, atol=1e-6)


def test_the_brake_removes_a_share_of_the_outward_part_only():
    W, D = outward_and_inward()
    braked, unit = Shape(radial_brake=0.25)(W, D), W / length(W, (1, 2))
    before, after = ((x * unit).sum((1, 2)) for x in (D, braked))
    assert before[0] < 0 < before[1]
    torch.testing.assert_close(after, before * torch.tensor([0.75, 1.0]))
    torch.testing.assert_close(braked - after.view(2, 1, 1) * unit, D - before.view(2, 1, 1) * unit, rtol=1e-4, atol=1e-6)


def test_the_floor_lengthens_short_rows_only_and_rotates_none():
    W, D = outward_and_inward()
    lifted = Shape(row_floor=0.1)(W, D)
    share, old = (x.norm(dim=-1) / W.norm(dim=-1) for x in (lifted, D))
    assert (share >= 0.1 * (1 - 1e-6)).all() and (old[:, 1] < 0.1).all()
    assert torch.equal(lifted[old > 0.1], D[old > 0.1])
    torch.testing.assert_close(torch.cosine_similarity(lifted, D, dim=-1), torch.ones(2, 5))


@pytest.mark.parametrize("weights", EXTREME_SCALES)
@pytest.mark.parametrize("direction", EXTREME_SCALES)
def test_extreme_weights_and_directions_give_finite_steps(weights, direction):
    W, D = gaussian(1, 4, 6) * weights, gaussian(1, 4, 6, seed=1) * direction
    for constraint in (None, Radial()):
        moved = W.clone()
        Step(constraint=constraint, shape=Shape(0.5, 0.3825)).apply(moved, D, {}, hyper(0.01))
        assert moved.isfinite().all()
    assert Shape(0.5, 0.3825)(W, D).any() == (direction > 0)


def test_the_norm_changes_by_the_radial_part_of_the_step_alone():
    """|W'| = |W| - lr <D, W> / |W|; a straight step would also add lr^2 |tangent|^2 to |W'|^2."""
    W, D, lr = gaussian(3, 5, 7), gaussian(3, 5, 7, seed=1), 0.5
    moved = W.clone()
    Step(constraint=Radial()).apply(moved, D, {}, hyper(lr))
    before = W.double().norm(dim=(1, 2))
    expected = before - lr * (D.double() * W.double()).sum((1, 2)) / before
    torch.testing.assert_close(moved.double().norm(dim=(1, 2)), expected, rtol=1e-5, atol=0)
    straight = W - lr * D
    torch.testing.assert_close(moved / length(moved, (1, 2)), straight / length(straight, (1, 2)))
    assert (straight.double().norm(dim=(1, 2)) > expected * 1.05).all()


def test_a_tangential_step_keeps_the_norm_and_a_zero_matrix_moves():
    W, D = gaussian(1, 5, 7), gaussian(1, 5, 7, seed=1)
    D -= (D * W).sum() / W.square().sum() * W
    moved = W.clone()
    Step(constraint=Radial()).apply(moved, D, {}, hyper(1.0))
    torch.testing.assert_close(moved.norm(), W.norm())
    zero = torch.zeros_like(W)
    Step(constraint=Radial()).apply(zero, D, {}, hyper(1.0))
    torch.testing.assert_close(zero, -D)


@pytest.mark.parametrize("rule", RULES)
def test_brake_and_floor_act_on_every_rule(rule):
    """The step is W - lr shape(W, D) for the D of any rule, also of rules with a faster `update` of their own."""
    start = {"distance_start": 1.0} if rule == "prodigy" else {}
    config = RULES[rule](lr=0.1, extra=Extra(radial_brake=0.5, row_floor=0.4), **start)
    W = gaussian(1, 6, 9)
    steps = {}
    for shape in (None, Step.build(config).shape):
        built, weights = build_rule(config), W.clone()
        state, shared = built.init_state(weights), built.init_shared()
        for t in range(2):  # SOAP's first step moves nothing
            numbers = hyper(0.1, count=t + 1, shared=shared)
            if shared:
                built.update_shared(built.sums(weights, gaussian(1, 6, 9, seed=3), state, numbers), numbers)
            before = weights.clone()
            built.update(weights, gaussian(1, 6, 9, seed=3), state, numbers, step=Step(shape=shape))
            if not torch.equal(weights, before):
                break
        steps[shape] = (before - weights) / 0.1
    plain, shaped = steps.values()
    torch.testing.assert_close(shaped.double(), reference(before, plain, 0.5, 0.4), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("config", "scope"), [
    (Adam(), "element"), (Adam(extra=Extra(row_floor=0.3)), "row"), (Adam(extra=Extra(radial_brake=0.5)), "matrix"),
    (Adam(constraint="radial"), "matrix")])
def test_group_scope_includes_the_scope_of_brake_and_floor(config, scope):
    group, = build_groups({"w": gaussian(4, 6)}, {"w": "matrix"}, Optim(matrix=config))
    assert group.scope == scope


def test_a_shape_that_is_off_returns_the_direction_itself():
    W, D = outward_and_inward()
    assert Shape()(W, D) is D and Step.build(Adam()).shape is None
