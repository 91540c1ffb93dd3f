"""What all of Muon's kin must bear: gradients from hell, shares of nothing, bfloat16, and being saved."""

import pytest
import torch
from torch import nn

from configs.groups import Group, Optim
from optim.comm import Comm
from optim.groups import build_groups
from optim.rules import RULES
from optim.schedule import Values
from optim.sharded import ShardedOptimizer
from tests.optim.rules.oracle import directions, gaussian, hyper, train

KIN = {
    "normuon": Group(rule="normuon", lr=0.02),
    "normuon_longer": Group(rule="normuon", lr=0.02, normalise="longer"),
    "muon2": Group(rule="muon2", lr=0.02),
    "muown": Group(rule="muown", lr=0.02, norm="spectral", unit="match_adam"),
    "dion": Group(rule="dion", lr=0.02),
    "dion2": Group(rule="dion2", lr=0.02),
    "equilibrated": Group(rule="steepest", lr=0.02, equilibrate=True),
    "averages": Group(rule="steepest", lr=0.02, averages=3),
}
each_of_the_kin = pytest.mark.parametrize("group", KIN.values(), ids=KIN)


def hostile(*shape: int) -> dict[str, torch.Tensor]:
    G = gaussian(*shape, seed=1)
    some_rows = G.clone()
    some_rows[:, ::2] = 0
    one = torch.zeros_like(G)
    one[:, 0, 0] = 1
    return {"zero": torch.zeros_like(G), "tiny": G * 1e-30, "huge": G * 1e30, "rank one": G[:, :, :1] * G[:, :1],
            "empty rows": some_rows, "one element": one, "plain": G, "bfloat16": G.bfloat16()}


@each_of_the_kin
@pytest.mark.parametrize("shape", [(2, 12, 20), (2, 20, 12), (3, 1, 7), (1, 7, 1), (0, 4, 6)])
def test_no_gradient_makes_a_nan(group, shape):
    """Each four times on end, then all of them after one another."""
    cases = hostile(*shape)
    for name, grad in cases.items():
        for D in directions(group, [grad.float()] * 4):
            assert D.isfinite().all() and D.shape == grad.shape, name
    grads = [grad.float() for grad in (*cases.values(), *cases.values())]
    assert all(D.isfinite().all() for D in directions(group, grads))


@each_of_the_kin
def test_zero_gradients_move_nothing(group):
    start = gaussian(2, 6, 4)
    torch.testing.assert_close(train(group, start, [torch.zeros(2, 6, 4)] * 3), start, rtol=1e-6, atol=1e-7)


@each_of_the_kin
def test_bfloat16_follows_float32(group):
    """Weights, gradients and memories of 8 bits: the first steps go the same way, within a few percent."""
    start = gaussian(2, 24, 16, seed=9, scale=0.1).bfloat16()
    grads = [gaussian(2, 24, 16, seed=i).bfloat16() for i in (1, 2)]
    low = directions(group, grads, start=start)
    high = directions(group, [grad.float() for grad in grads], start=start.float())
    for found, wanted in zip(low, high, strict=True):
        assert torch.cosine_similarity(found.flatten().float(), wanted.flatten(), dim=0) > 0.97


@each_of_the_kin
def test_each_matrix_is_updated_alone(group):
    """A stack of matrices is what it would be one by one: banks may be cut anywhere between matrices."""
    start, grads = gaussian(3, 8, 6, seed=9), [gaussian(3, 8, 6, seed=i) for i in range(4)]
    alone = [train(group, start[k:k + 1], [grad[k:k + 1] for grad in grads]) for k in range(3)]
    torch.testing.assert_close(train(group, start, grads), torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert RULES[group.rule].build(group).scope == "matrix"


def make(group: Group, seed: int) -> tuple[dict[str, nn.Parameter], ShardedOptimizer]:
    shapes = {"a": (12, 20), "b": (12, 20), "tall": (20, 12), "vector": (9,)}
    params = {name: nn.Parameter(gaussian(*shape, seed=seed + i)) for i, (name, shape) in enumerate(shapes.items())}
    groups = build_groups(params, dict.fromkeys(params, "matrix"), Optim(matrix=group))
    return params, ShardedOptimizer(groups, Comm())


def run(params: dict[str, nn.Parameter], optimizer: ShardedOptimizer, steps: range) -> None:
    for step in steps:
        for i, param in enumerate(params.values()):
            param.grad.copy_(gaussian(*param.shape, seed=100 * step + i))
        optimizer.step(Values(1 - 0.1 * step, 1, 0.8 + 0.02 * step, 1, 1, None), step + 1)


@each_of_the_kin
def test_saved_and_resumed_is_uninterrupted(group):
    params, optimizer = make(group, seed=0)
    run(params, optimizer, range(3))
    saved = optimizer.state_tensors()
    assert {name: tuple(t.shape) for name, t in saved.items()} == optimizer.state_shapes()
    run(params, optimizer, range(3, 6))
    others, resumed = make(group, seed=50)
    resumed.load_state_tensors(saved)
    run(others, resumed, range(3, 6))
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(resumed.state_tensors()[name], tensor), name


@each_of_the_kin
def test_it_descends(group):
    """A quadratic with a curvature of its own for every element falls below a twentieth of its start."""
    W, target = gaussian(1, 8, 12, seed=1, scale=0.5), gaussian(1, 8, 12, seed=2, scale=0.5)
    curvature = 1 + gaussian(1, 8, 12, seed=3).abs()
    rule = RULES[group.rule].build(group)
    state = rule.init_state(W)
    start = ((W - target) ** 2 * curvature).sum()
    for t in range(150):
        rate = 0.2 * (1 - t / 150)
        W = W - rate * rule.direction(W, curvature * (W - target), state, hyper(rate, momentum=0.8, count=t + 1))
    assert ((W - target) ** 2 * curvature).sum() < 0.05 * start
