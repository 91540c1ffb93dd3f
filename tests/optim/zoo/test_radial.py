"""The radial brake, the floor under rows, and the radius that follows the radial part alone: against slow float64 twins."""

import pytest
import torch
from torch import Tensor

from configs.optim import RULES, Adam, Extra, Optim
from optim.constraint import length
from optim.groups import build_groups, build_rule
from optim.rule import Step
from optim.zoo.radial import Radial, Shape
from tests.optim.oracle import gaussian, hyper

HOSTILE = (0.0, 1e-30, 1e30)


def twin(W: Tensor, D: Tensor, brake: float, floor: float) -> Tensor:
    """Matrix by matrix, row by row, in float64."""
    found = []
    for w, d in zip(W.double(), D.double(), strict=True):
        inner = (d * w).sum().item()
        if inner < 0:  # W - lr D is longer than W
            d = d - brake * inner / (w * w).sum() * w
        rows = [row * max(1.0, floor * at.norm().item() / max(row.norm().item(), 1e-30))
                for row, at in zip(d, w, strict=True)]
        found.append(torch.stack(rows))
    return torch.stack(found)


def outward_and_inward() -> tuple[Tensor, Tensor]:
    """Weights, and directions of which one lengthens its matrix and one shortens it; the first's rows differ in length."""
    W = gaussian(2, 5, 7)
    D = gaussian(2, 5, 7, seed=1) * 0.3 + W * torch.tensor([-0.5, 0.5]).view(2, 1, 1)
    D[:, 1] *= 1e-3
    return W, D


@pytest.mark.parametrize(("brake", "floor"), [(0.5, 0.0), (1.0, 0.0), (0.0, 0.3825), (0.5, 0.3825), (0.0, 0.0)])
def test_both_are_their_formulas(brake, floor):
    W, D = outward_and_inward()
    torch.testing.assert_close(Shape(brake, floor)(W, D).double(), twin(W, D, brake, floor), rtol=1e-5, atol=1e-6)


def test_the_brake_takes_a_share_of_what_is_outward_and_leaves_the_rest():
    W, D = outward_and_inward()
    found, unit = Shape(radial_brake=0.25)(W, D), W / length(W, (1, 2))
    before, after = ((x * unit).sum((1, 2)) for x in (D, found))
    assert before[0] < 0 < before[1]
    torch.testing.assert_close(after, before * torch.tensor([0.75, 1.0]))
    torch.testing.assert_close(found - after.view(2, 1, 1) * unit, D - before.view(2, 1, 1) * unit, rtol=1e-4, atol=1e-6)


def test_the_floor_lifts_short_rows_alone_and_turns_none():
    W, D = outward_and_inward()
    found = Shape(row_floor=0.1)(W, D)
    share, old = (x.norm(dim=-1) / W.norm(dim=-1) for x in (found, D))
    assert (share >= 0.1 * (1 - 1e-6)).all() and (old[:, 1] < 0.1).all()
    assert torch.equal(found[old > 0.1], D[old > 0.1])
    torch.testing.assert_close(torch.cosine_similarity(found, D, dim=-1), torch.ones(2, 5))


@pytest.mark.parametrize("weights", HOSTILE)
@pytest.mark.parametrize("direction", HOSTILE)
def test_hostile_tensors_give_finite_steps(weights, direction):
    W, D = gaussian(1, 4, 6) * weights, gaussian(1, 4, 6, seed=1) * direction
    for constraint in (None, Radial()):
        now = W.clone()
        Step(constraint=constraint, shape=Shape(0.5, 0.3825)).apply(now, D, {}, hyper(0.01))
        assert now.isfinite().all()
    assert Shape(0.5, 0.3825)(W, D).any() == (direction > 0)


def test_the_radius_follows_the_radial_part_alone():
    """|W'| = |W| - lr <D, W> / |W|, where a straight step would end (lr^2 |tangent|^2) further out."""
    W, D, lr = gaussian(3, 5, 7), gaussian(3, 5, 7, seed=1), 0.5
    now = W.clone()
    Step(constraint=Radial()).apply(now, D, {}, hyper(lr))
    before = W.double().norm(dim=(1, 2))
    wanted = before - lr * (D.double() * W.double()).sum((1, 2)) / before
    torch.testing.assert_close(now.double().norm(dim=(1, 2)), wanted, rtol=1e-5, atol=0)
    straight = W - lr * D
    torch.testing.assert_close(now / length(now, (1, 2)), straight / length(straight, (1, 2)))
    assert (straight.double().norm(dim=(1, 2)) > wanted * 1.05).all()


def test_a_tangential_step_keeps_the_radius_and_a_matrix_that_is_zero_moves():
    W, D = gaussian(1, 5, 7), gaussian(1, 5, 7, seed=1)
    D -= (D * W).sum() / W.square().sum() * W
    now = W.clone()
    Step(constraint=Radial()).apply(now, D, {}, hyper(1.0))
    torch.testing.assert_close(now.norm(), W.norm())
    zero = torch.zeros_like(W)
    Step(constraint=Radial()).apply(zero, D, {}, hyper(1.0))
    torch.testing.assert_close(zero, -D)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_them(rule):
    """The step is W - lr shape(W, D) for whatever D the rule finds; also where it has a faster way."""
    start = {"distance_start": 1.0} if rule == "prodigy" else {}
    config = RULES[rule](lr=0.1, extra=Extra(radial_brake=0.5, row_floor=0.4), **start)
    W = gaussian(1, 6, 9)
    steps = {}
    for shape in (None, Step.build(config).shape):
        built, now = build_rule(config), W.clone()
        state, shared = built.init_state(now), built.init_shared()
        for t in range(2):  # SOAP's first moves nothing
            numbers = hyper(0.1, count=t + 1, shared=shared)
            if shared:
                built.update_shared(built.sums(now, gaussian(1, 6, 9, seed=3), state, numbers), numbers)
            before = now.clone()
            built.update(now, gaussian(1, 6, 9, seed=3), state, numbers, step=Step(shape=shape))
            if not torch.equal(now, before):
                break
        steps[shape] = (before - now) / 0.1
    plain, shaped = steps.values()
    torch.testing.assert_close(shaped.double(), twin(before, plain, 0.5, 0.4), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("config", "scope"), [
    (Adam(), "element"), (Adam(extra=Extra(row_floor=0.3)), "row"), (Adam(extra=Extra(radial_brake=0.5)), "matrix"),
    (Adam(constraint="radial"), "matrix")])
def test_ranks_cut_no_finer_than_they_need(config, scope):
    group, = build_groups({"w": gaussian(4, 6)}, {"w": "matrix"}, Optim(matrix=config))
    assert group.scope == scope


def test_off_a_direction_is_passed_on_untouched():
    W, D = outward_and_inward()
    assert Shape()(W, D) is D and Step.build(Adam()).shape is None
