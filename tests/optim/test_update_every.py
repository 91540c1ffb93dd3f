"""Groups with update_every k: updated at every k-th step by the mean of k gradients, and resumed in between."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from configs.optim import Adam, Extra, Muon, NorMuon, Optim, Prodigy, RuleConfig
from optim.comm import Comm
from optim.groups import build_groups
from optim.metrics import StepMetrics
from optim.sharded import ShardedOptimizer
from tests.optim.oracle import FULL, gaussian

SHAPES = {"slow": (6, 10), "fast": (4, 9)}
ROLES = {"slow": "embed", "fast": "matrix"}


def make(every: int, rule: type[RuleConfig] = Adam, *, later: tuple[str, ...] = (),
         **changes: object) -> tuple[dict[str, nn.Parameter], ShardedOptimizer]:
    params = {name: nn.Parameter(gaussian(*shape)) for name, shape in SHAPES.items()}
    slow = rule(lr=0.1, update_every=every, extra=Extra(update_every_from=later), **changes)
    optim = Optim(embed=slow, matrix=Muon())
    return params, ShardedOptimizer(build_groups(params, ROLES, optim), Comm())


def grad(name: str, step: int) -> torch.Tensor:
    return gaussian(*SHAPES[name], seed=2 * step + (name == "slow"))


def run(params: dict, optimizer: ShardedOptimizer, steps: range) -> list[dict]:
    """Train as train_gpt.py does, adding up gradients until they are zeroed; return the weights after each step."""
    path = []
    for step in steps:
        for name, param in params.items():
            param.grad.add_(grad(name, step))
        optimizer.step(FULL, step + 1)
        optimizer.zero_grad()
        path.append({name: param.detach().clone() for name, param in params.items()})
    return path


@pytest.mark.parametrize("changes", [{"rule": Adam, "eps": 0.3}, {"rule": NorMuon}, {"rule": Prodigy}])
def test_it_is_a_slower_run_on_means(changes):
    """The updates are those of a run whose gradients are the means of k, so bias correction counts updates, not steps.
    Adam's large eps makes a mean differ from a sum."""
    path = run(*make(3, **changes), range(9))
    params, optimizer = make(1, **changes)
    for update in range(3):
        params["slow"].grad.copy_(sum(grad("slow", 3 * update + i) for i in range(3)) / 3)
        optimizer.step(FULL, update + 1)
        torch.testing.assert_close(path[3 * update + 2]["slow"], params["slow"].detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("every", "later", "updates"), [
    (1, ("4=2",), [1, 2, 3, 4, 6, 8, 10, 12, 14, 16]), (2, ("8=4",), [2, 4, 6, 8, 12, 16]),
    (1, ("2=2", "8=4"), [1, 2, 4, 6, 8, 12, 16])])
def test_its_period_may_grow(every, later, updates):
    """Each update is by the mean of the gradients since the one before; bias correction counts updates."""
    slow = make(every, later=later, eps=0.3)
    path = [{"slow": gaussian(*SHAPES["slow"])}, *run(*slow, range(17))]
    assert [step for step in range(1, 18) if not torch.equal(path[step - 1]["slow"], path[step]["slow"])] == updates
    assert slow[1].period == int(later[-1].split("=")[1])
    params, optimizer = make(1, eps=0.3)
    for update, (before, after) in enumerate(pairwise([0, *updates]), 1):
        params["slow"].grad.copy_(sum(grad("slow", step) for step in range(before, after)) / (after - before))
        optimizer.step(FULL, update)
        torch.testing.assert_close(path[after]["slow"], params["slow"].detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("saved_at", [3, 4, 5, 7, 8, 10])
def test_resuming_around_the_change_is_exact(saved_at):
    straight = run(*make(2, later=("4=4",)), range(13))
    params, optimizer = make(2, later=("4=4",))
    run(params, optimizer, range(saved_at))
    saved = optimizer.state.tensors()
    assert saved["pending/slow"].any() == (saved_at not in (4, 8))
    params, resumed = make(2, later=("4=4",))
    resumed.state.load(saved)
    assert torch.equal(run(params, resumed, range(saved_at, 13))[-1]["slow"], straight[-1]["slow"])


def test_between_its_updates_it_rests_and_others_go_on():
    params, optimizer = make(2)
    start = {name: param.detach().clone() for name, param in params.items()}
    path = [start, *run(params, optimizer, range(5))]
    moved = {name: [not torch.equal(a[name], b[name]) for a, b in zip(path, path[1:], strict=False)] for name in SHAPES}
    assert moved == {"slow": [False, True, False, True, False], "fast": [True] * 5}
    fast = run(*make(1), range(5))
    assert all(torch.equal(a["fast"], b["fast"]) for a, b in zip(path[1:], fast, strict=True))


def test_between_its_updates_nothing_of_it_is_sent():
    params, optimizer = make(2)
    sent = []
    optimizer.comm.all_reduce = lambda tensor, send=optimizer.comm.all_reduce: sent.append(tensor.shape) or send(tensor)
    run(params, optimizer, range(1))
    assert len(sent) == 1
    run(params, optimizer, range(1, 2))
    assert len(sent) == 3


@pytest.mark.parametrize("saved_at", [1, 2, 3, 5])
def test_resuming_in_the_middle_is_exact(saved_at):
    straight = run(*make(3), range(7))
    params, optimizer = make(3)
    run(params, optimizer, range(saved_at))
    saved = optimizer.state.tensors()
    assert saved["pending/slow"].any() == (saved_at % 3 > 0) and "pending/fast" not in saved
    params, resumed = make(3)
    run(params, resumed, range(2))
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == resumed.state.shapes()
    resumed.state.load(saved)
    path = run(params, resumed, range(saved_at, 7))
    assert all(torch.equal(path[-1][name], straight[-1][name]) for name in SHAPES)


def test_a_rehearsal_leaves_waiting_gradients_as_they_were():
    params, optimizer = make(3)
    run(params, optimizer, range(4))
    snapshot = optimizer.state.snapshot()
    run(params, optimizer, range(20, 25))
    optimizer.state.restore(snapshot)
    assert torch.equal(run(params, optimizer, range(4, 7))[-1]["slow"], run(*make(3), range(7))[-1]["slow"])


def test_the_period_is_when_all_are_updated():
    assert make(1)[1].period == 1 and make(6)[1].period == 6


def test_metrics_of_a_group_that_rests_are_zero():
    params, optimizer = make(2)
    step_metrics = StepMetrics(optimizer.comm)
    step_metrics.remember(optimizer.banks)
    run(params, optimizer, range(1))
    by_role = step_metrics.by_role(FULL)
    assert by_role["embed"]["update_rms"] == 0 < by_role["matrix"]["update_rms"]
