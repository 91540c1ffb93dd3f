"""Gradients from ahead: a slow float64 twin, what is shown and what is kept, free where it is off."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from configs.groups import Group, Optim
from configs.schema import Run, Schedule, Train
from optim.comm import Comm
from optim.groups import build_groups
from optim.lookahead import Lookahead
from optim.schedule import Values
from optim.sharded import ShardedOptimizer
from optim.weight_average import WeightAverage
from tests.optim.rules.oracle import gaussian

LR, DECAY, GAMMA, STEPS = 0.1, 0.5, 0.7, 12
REACH = (0.0, 0.0, 0.0, *[0.9] * 6, *[0.3] * 3)
TARGET = gaussian(5, 8, seed=9)


def make(lookahead: Lookahead | None, group: Group | None = None, *, dtype: torch.dtype = torch.float32,
         average: WeightAverage | None = None, start: Tensor | None = None) -> tuple[nn.Parameter, ShardedOptimizer]:
    """Normalised descent without memory, so that the twin is short."""
    param = nn.Parameter((gaussian(5, 8) if start is None else start).to(dtype))
    group = group or Group(rule="steepest", norm="frobenius", averaging="none", lr=LR, weight_decay=DECAY)
    groups = build_groups({"w": param}, {"w": "matrix"}, Optim(matrix=group))
    return param, ShardedOptimizer(groups, Comm(), lookahead=lookahead, average=average)


def run(param: nn.Parameter, optimizer: ShardedOptimizer, steps: range) -> list[tuple[Tensor, Tensor]]:
    """Down |W - target|^2 / 2: after each step the weights that gradients see and those that are shown."""
    path = []
    for step in steps:
        param.grad.copy_(param.detach() - TARGET)
        optimizer.step(Values(1, 1, None, 1, 1, None), step + 1)
        path.append((param.detach().clone(), shown(param, optimizer)))
    return path


def shown(param: nn.Parameter, optimizer: ShardedOptimizer) -> Tensor:
    with optimizer.averaged_weights():
        return param.detach().clone()


def twin(steps: int) -> list[tuple[Tensor, Tensor]]:
    """y = x + b d; x' = (1 - lr wd) y - lr g / |g| with g taken at y; d follows x' - x."""
    x, drift, path = gaussian(5, 8).double(), torch.zeros(5, 8, dtype=torch.float64), []
    for t in range(steps):
        y = x + REACH[t] * drift
        grad = y - TARGET.double()
        after = (1 - LR * DECAY) * y - LR * grad / grad.norm()
        drift, x = GAMMA * drift + (1 - GAMMA) * (after - x), after
        path.append((x + (REACH[t + 1] if t + 1 < steps else 0) * drift, x))
    return path


def test_it_is_its_formula():
    for found, wanted in zip(run(*make(Lookahead(GAMMA, REACH)), range(STEPS)), twin(STEPS), strict=True):
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_it_looks_ahead_only_when_it_should_and_not_after_the_end():
    path = run(*make(Lookahead(GAMMA, REACH)), range(STEPS))
    ahead = [not torch.equal(y, x) for y, x in path]
    assert ahead == [False] * 2 + [True] * 9 + [False]


def test_without_reach_it_changes_nothing():
    found, wanted = (run(*make(lookahead), range(5)) for lookahead in (Lookahead(GAMMA, (0.0,) * STEPS), None))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(found, wanted, strict=True))
    _, optimizer = make(None)
    assert not any(name.startswith("ahead") for name in optimizer.state_shapes())


def test_it_is_saved_resumed_and_undone():
    param, optimizer = make(Lookahead(GAMMA, REACH))
    run(param, optimizer, range(5))
    saved, snapshot = optimizer.state_tensors(), optimizer.snapshot()
    wanted = run(param, optimizer, range(5, 9))
    other, resumed = make(Lookahead(GAMMA, REACH))
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == resumed.state_shapes()
    resumed.load_state_tensors(saved)
    assert torch.equal(run(other, resumed, range(5, 9))[-1][1], wanted[-1][1])
    optimizer.restore(snapshot)
    assert torch.equal(run(param, optimizer, range(5, 9))[-1][0], wanted[-1][0])


def test_averages_are_of_the_weights_that_are_shown():
    average = WeightAverage(0.5, 0)
    found = run(*make(Lookahead(GAMMA, REACH), average=average), range(6))[-1][1]
    wanted = gaussian(5, 8).double()
    for _, x in twin(STEPS)[:6]:
        wanted = 0.5 * wanted + 0.5 * x
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_with_the_remainder_bfloat16_weights_move_as_float32_ones_do():
    """Also by steps far below what bfloat16 resolves: only gradients are taken at rounded weights."""
    group = Group(rule="steepest", norm="frobenius", averaging="none", lr=1e-3, rounding="remainder", state_dtype="float32")
    start = gaussian(5, 8).bfloat16()
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        param, optimizer = make(Lookahead(GAMMA, REACH), group, dtype=dtype, start=start)
        run(param, optimizer, range(STEPS))
        base = optimizer.state_tensors()["ahead_base/w"]
        assert base.dtype == torch.float32
        moved.append(base - start.float())
    assert (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()


def test_on_the_sphere_what_is_ahead_is_on_it_too():
    group = Group(rule="steepest", norm="row", averaging="none", lr=LR, constraint="sphere")
    param, optimizer = make(Lookahead(GAMMA, REACH), group)
    path = run(param, optimizer, range(8))
    assert not torch.equal(*path[-1])
    for weights in path[-1]:
        torch.testing.assert_close(weights.norm(dim=-1), torch.ones(5))


def test_the_configuration_counts_in_shares_and_follows_the_lr_curve():
    run_ = Run(train=Train(steps=10, lookahead=0.6, lookahead_gamma=0.9, lookahead_start=0.2, lookahead_end=0.7),
               schedule=Schedule(lr="0=1 40%=1 80%=0"))
    built = Lookahead.build(run_)
    assert built.gamma == 0.9
    assert built.reach == pytest.approx((0, 0, 0.6, 0.6, 0.6, 0.45, 0.3, 0, 0, 0))
    assert Lookahead.build(replace(run_, train=Train(steps=10))) is None


@pytest.mark.parametrize(("wrong", "says"), [
    ({"lookahead": -1.0}, "lookahead must be at least 0, got -1.0"),
    ({"lookahead_gamma": 1.0}, r"lookahead_gamma must lie in \[0, 1\), got 1.0"),
    ({"lookahead": 0.5, "lookahead_start": 0.8}, "lookahead_start must be less than lookahead_end")])
def test_impossible_settings_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Train(**wrong)


def test_groups_that_wait_do_not_look_ahead():
    with pytest.raises(ValueError, match="update_every to be 1; it is more for embed"):
        Run(train=Train(lookahead=0.5), optim=Optim(embed=Group(update_every=2)))
