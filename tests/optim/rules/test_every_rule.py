"""What every rule owes: updates that compile once, and no more to keep than it says."""

import functools

import pytest
import torch
from torch import Tensor, nn

from configs.groups import Group, Optim
from optim.comm import Comm
from optim.groups import build_groups
from optim.rules import RULES
from optim.schedule import Values
from optim.sharded import ShardedOptimizer
from tests.optim.rules.oracle import gaussian

SHAPES = {"a": (6, 10), "b": (10, 6)}


def make(rule: str, **options: bool) -> tuple[dict[str, nn.Parameter], ShardedOptimizer]:
    params = {name: nn.Parameter(gaussian(*shape, scale=0.1)) for name, shape in SHAPES.items()}
    constraint = "stiefel" if rule == "stiefel" else "none"
    optim = Optim(matrix=Group(rule=rule, lr=0.02, weight_decay=0.1, constraint=constraint))
    return params, ShardedOptimizer(build_groups(params, dict.fromkeys(params, "matrix"), optim), Comm(), **options)


def run(params: dict[str, nn.Parameter], optimizer: ShardedOptimizer, steps: range) -> dict[str, Tensor]:
    for step in steps:
        for i, param in enumerate(params.values()):
            param.grad.copy_(gaussian(*param.shape, seed=100 * step + i))
        optimizer.step(Values(1 - 0.1 * step, 1, 0.9, 1, 1, None), step + 1)
    return optimizer.state_tensors()


@pytest.mark.parametrize("rule", sorted(name for name, rule in RULES.items() if rule.compiles and name != "adam"))
def test_updates_compile_once_and_do_the_same(rule, monkeypatch):
    """Adam's fused path on CPUs is not compiled; on GPUs it is the plain one."""
    graphs = []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=lambda g, _: graphs.append(g) or g))
    torch._dynamo.reset()
    params, compiled = make(rule, compile_updates=True)
    run(params, compiled, range(1))
    first = len(graphs)
    found, wanted = run(params, compiled, range(1, 5)), run(*make(rule), range(5))
    assert first >= 1 and len(graphs) == first
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_loading_continues_bit_for_bit(rule):
    straight = run(*make(rule), range(6))
    saved = run(*make(rule), range(3))
    params, optimizer = make(rule)
    run(params, optimizer, range(2))
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == optimizer.state_shapes()
    optimizer.load_state_tensors(saved)
    resumed = run(params, optimizer, range(3, 6))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize("rule", RULES)
def test_what_was_saved_is_a_copy(rule):
    params, optimizer = make(rule)
    saved = run(params, optimizer, range(2))
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    run(params, optimizer, range(2, 4))
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
