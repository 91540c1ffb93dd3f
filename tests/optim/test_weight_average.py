"""Averaged weights: a plain running mean that only evaluation sees, saved and resumed, free where it is off."""

import pytest
import torch
from torch import nn

from configs.groups import Group, Optim
from configs.schema import Train
from optim.comm import Comm
from optim.groups import build_groups
from optim.schedule import Values
from optim.sharded import ShardedOptimizer
from optim.weight_average import WeightAverage
from tests.optim.rules.oracle import gaussian

SHAPES = {"a": (6, 10), "b": (6, 10), "c": (9,)}


def make(average: WeightAverage | None, dtype: torch.dtype = torch.float32) -> tuple[dict, ShardedOptimizer]:
    params = {name: nn.Parameter(gaussian(*shape, seed=ord(name)).to(dtype)) for name, shape in SHAPES.items()}
    optim = Optim(matrix=Group(rule="adam", lr=0.1))
    return params, ShardedOptimizer(build_groups(params, dict.fromkeys(params, "matrix"), optim), Comm(), average=average)


def run(params: dict, optimizer: ShardedOptimizer, steps: range) -> list[dict]:
    """The weights after each step."""
    path = []
    for step in steps:
        for name, param in params.items():
            param.grad.copy_(gaussian(*SHAPES[name], seed=100 * step + ord(name)))
        optimizer.step(Values(1, 1, None, 1, 1, None), step + 1)
        path.append(copies(params))
    return path


def copies(params: dict) -> dict:
    return {name: param.detach().clone() for name, param in params.items()}


def shown(params: dict, optimizer: ShardedOptimizer) -> dict:
    with optimizer.averaged_weights():
        return copies(params)


@pytest.mark.parametrize(("start", "blend"), [(0, 1.0), (3, 1.0), (3, 0.4), (20, 1.0)])
def test_the_average_is_its_formula(start, blend):
    params, optimizer = make(WeightAverage(0.7, start, blend))
    path = [copies(params), *run(params, optimizer, range(8))]
    for name in SHAPES:
        average = path[min(start, 8)][name].double()
        for weights in path[start + 1:]:
            average = 0.7 * average + 0.3 * weights[name].double()
        wanted = blend * average + (1 - blend) * path[-1][name].double()
        torch.testing.assert_close(shown(params, optimizer)[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_training_never_sees_it_even_if_the_evaluation_fails():
    params, optimizer = make(WeightAverage(0.9, 0))
    other, plain = make(None)
    run(params, optimizer, range(3))
    before = copies(params)
    with pytest.raises(KeyError), optimizer.averaged_weights():
        assert not torch.equal(params["a"], before["a"])
        raise KeyError
    run(params, optimizer, range(3, 6))
    run(other, plain, range(6))
    assert all(torch.equal(params[name], other[name]) for name in SHAPES)


def test_off_it_keeps_nothing_and_shows_the_weights():
    params, optimizer = make(None)
    run(params, optimizer, range(2))
    before = copies(params)
    assert all(torch.equal(shown(params, optimizer)[name], before[name]) for name in SHAPES)
    assert not any(key.startswith("average") for key in optimizer.state_shapes())
    assert WeightAverage.build(Train()) is None


def test_it_is_saved_resumed_and_undone():
    average = WeightAverage(0.8, 2)
    params, optimizer = make(average)
    run(params, optimizer, range(4))
    saved, snapshot = optimizer.state_tensors(), optimizer.snapshot()
    assert saved["average/a"].shape == (6, 10) and "average/c" in optimizer.state_shapes()
    run(params, optimizer, range(4, 7))
    wanted = shown(params, optimizer)
    other, resumed = make(average)
    resumed.load_state_tensors(saved)
    run(other, resumed, range(4, 7))
    assert all(torch.equal(shown(other, resumed)[name], wanted[name]) for name in SHAPES)
    optimizer.restore(snapshot)
    assert torch.equal(optimizer.state_tensors()["average/b"], saved["average/b"])


def test_weights_in_bfloat16_are_averaged_in_float32():
    params, optimizer = make(WeightAverage(0.999, 0), torch.bfloat16)
    start = copies(params)
    run(params, optimizer, range(20))
    average = optimizer.state_tensors()["average/a"]
    assert average.dtype == torch.float32 and shown(params, optimizer)["a"].dtype == torch.bfloat16
    moved = (params["a"].double() - start["a"].double()).norm()
    assert 1e-3 * moved < (average.double() - start["a"].double()).norm() < 0.05 * moved


def test_the_configuration_counts_the_start_in_steps():
    built = WeightAverage.build(Train(steps=200, weight_average=0.99, weight_average_start=0.25, weight_average_blend=0.5))
    assert built == WeightAverage(0.99, 50, 0.5)


@pytest.mark.parametrize("wrong", [{"weight_average": 1.0}, {"weight_average_start": 1.5}, {"weight_average_blend": -0.1}])
def test_shares_outside_0_and_1_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} must lie in \[0, 1"):
        Train(**wrong)
