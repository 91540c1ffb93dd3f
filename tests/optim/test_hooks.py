"""Hooks: look-ahead and averaged weights against slow float64 twins; saved and resumed; without cost if off."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from configs.optim import Adam, Extra, Optim, RuleConfig, Steepest
from configs.schema import Run, Schedule, Train
from optim.hooks import Hook, Lookahead, WeightAverage, build_hooks
from optim.sharded import ShardedOptimizer
from tests.optim.oracle import FULL, gaussian, one_role

LR, DECAY, GAMMA, STEPS = 0.1, 0.5, 0.7, 12
REACH = (0.0, 0.0, 0.0, *[0.9] * 6, *[0.3] * 3)
TARGET = gaussian(5, 8, seed=9)


def make(*hooks: Hook, config: RuleConfig | None = None, dtype: torch.dtype = torch.float32,
         start: Tensor | None = None) -> tuple[nn.Parameter, ShardedOptimizer]:
    """Build the optimizer of one parameter; by default normalised descent without momentum, whose twin is short."""
    param = nn.Parameter((gaussian(5, 8) if start is None else start).to(dtype))
    config = config or Steepest(norm="frobenius", averaging="none", lr=LR, weight_decay=DECAY)
    return param, one_role(config, {"w": param}, hooks=hooks)


def run(param: nn.Parameter, optimizer: ShardedOptimizer, steps: range) -> list[tuple[Tensor, Tensor]]:
    """Minimise |W - target|^2 / 2; return after each step the weights of the next gradient and those of evaluation."""
    path = []
    for step in steps:
        param.grad.copy_(param.detach() - TARGET)
        optimizer.step(FULL, step + 1)
        path.append((param.detach().clone(), evaluated(param, optimizer)))
    return path


def evaluated(param: nn.Parameter, optimizer: ShardedOptimizer) -> Tensor:
    with optimizer.evaluation_weights():
        return param.detach().clone()


def twin(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Return (y, x) after each step of y = x + b d; x' = (1 - lr wd) y - lr g / |g| with g taken at y; d follows x' - x."""
    x, drift, path = gaussian(5, 8).double(), torch.zeros(5, 8, dtype=torch.float64), []
    for t in range(steps):
        y = x + REACH[t] * drift
        grad = y - TARGET.double()
        after = (1 - LR * DECAY) * y - LR * grad / grad.norm()
        drift, x = GAMMA * drift + (1 - GAMMA) * (after - x), after
        path.append((x + (REACH[t + 1] if t + 1 < steps else 0) * drift, x))
    return path


def test_it_is_its_formula():
    for actual, expected in zip(run(*make(Lookahead(GAMMA, REACH)), range(STEPS)), twin(STEPS), strict=True):
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_it_looks_ahead_only_when_it_should_and_not_after_the_end():
    path = run(*make(Lookahead(GAMMA, REACH)), range(STEPS))
    ahead = [not torch.equal(y, x) for y, x in path]
    assert ahead == [False] * 2 + [True] * 9 + [False]


def test_without_reach_it_changes_nothing():
    actual, expected = (run(*make(*hooks), range(5)) for hooks in ([Lookahead(GAMMA, (0.0,) * STEPS)], []))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(actual, expected, strict=True))
    _, optimizer = make()
    assert not any(name.startswith("ahead") for name in optimizer.state.shapes())


def test_it_is_saved_resumed_and_undone():
    param, optimizer = make(Lookahead(GAMMA, REACH))
    run(param, optimizer, range(5))
    saved, snapshot = optimizer.state.tensors(), optimizer.state.snapshot()
    expected = run(param, optimizer, range(5, 9))
    other, resumed = make(Lookahead(GAMMA, REACH))
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == resumed.state.shapes()
    resumed.state.load(saved)
    assert torch.equal(run(other, resumed, range(5, 9))[-1][1], expected[-1][1])
    optimizer.state.restore(snapshot)
    assert torch.equal(run(param, optimizer, range(5, 9))[-1][0], expected[-1][0])


def test_averages_are_of_the_evaluated_weights():
    actual = run(*make(WeightAverage(0.5, 0), Lookahead(GAMMA, REACH)), range(6))[-1][1]
    expected = gaussian(5, 8).double()
    for _, x in twin(STEPS)[:6]:
        expected = 0.5 * expected + 0.5 * x
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_with_the_remainder_bfloat16_weights_move_as_float32_ones_do():
    """Even steps far below the resolution of bfloat16 count; only gradients are taken at rounded weights."""
    config = Steepest(norm="frobenius", averaging="none", lr=1e-3, rounding="remainder", state_dtype="float32")
    start = gaussian(5, 8).bfloat16()
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        param, optimizer = make(Lookahead(GAMMA, REACH), config=config, dtype=dtype, start=start)
        run(param, optimizer, range(STEPS))
        base = optimizer.state.tensors()["ahead_base/w"]
        assert base.dtype == torch.float32
        moved.append(base - start.float())
    assert (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()


def test_on_the_sphere_what_is_ahead_is_on_it_too():
    config = Steepest(norm="row", averaging="none", lr=LR, constraint="sphere")
    param, optimizer = make(Lookahead(GAMMA, REACH), config=config)
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
    assert build_hooks(run_) == [built] and build_hooks(replace(run_, train=Train(steps=10))) == []


# ---- Averaged weights ---------------------------------------------------------------------------------------------------

AVERAGED = Adam(lr=0.1)


@pytest.mark.parametrize(("start", "blend"), [(0, 1.0), (3, 1.0), (3, 0.4), (20, 1.0)])
def test_the_average_is_its_formula(start, blend):
    path = run(*make(WeightAverage(0.7, start, blend), config=AVERAGED), range(8))
    trained = [gaussian(5, 8), *(weights for weights, _ in path)]
    average = trained[min(start, 8)].double()
    for weights in trained[start + 1:]:
        average = 0.7 * average + 0.3 * weights.double()
    expected = blend * average + (1 - blend) * trained[-1].double()
    torch.testing.assert_close(path[-1][1].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", [0.0, 0.4, 1.0])
def test_a_role_may_have_its_own_blend(own):
    config = replace(AVERAGED, extra=Extra(average_blend=own))
    param, optimizer = make(WeightAverage(0.7, 0, 0.9), config=config)
    path = run(param, optimizer, range(6))
    weights = [weights for weights, _ in path]
    average = gaussian(5, 8).double()
    for trained in weights:
        average = 0.7 * average + 0.3 * trained.double()
    torch.testing.assert_close(path[-1][1].double(), own * average + (1 - own) * weights[-1].double(), rtol=1e-5, atol=1e-6)
    assert ("average/w" in optimizer.state.shapes()) == (own > 0)  # without a share it costs nothing
    assert torch.equal(weights[-1], run(*make(config=AVERAGED), range(6))[-1][0])


def test_a_blend_without_an_average_is_refused():
    with pytest.raises(ValueError, match="embed, head.extra.average_blend has no effect without --train.weight_average"):
        Run(optim=Optim(embed=Adam(extra=Extra(average_blend=0.6)), head=Adam(extra=Extra(average_blend=0.6))))


def test_training_never_sees_the_average_even_if_the_evaluation_fails():
    param, optimizer = make(WeightAverage(0.9, 0), config=AVERAGED)
    run(param, optimizer, range(3))
    before = param.detach().clone()
    with pytest.raises(KeyError), optimizer.evaluation_weights():
        assert not torch.equal(param, before)
        raise KeyError
    assert torch.equal(run(param, optimizer, range(3, 6))[-1][0], run(*make(config=AVERAGED), range(6))[-1][0])


def test_without_hooks_there_is_no_state_and_the_weights_are_evaluated():
    param, optimizer = make(config=AVERAGED)
    assert torch.equal(*run(param, optimizer, range(2))[-1])
    assert {name.split("/")[0] for name in optimizer.state.shapes()} == {"weights", "mean", "square"}
    assert build_hooks(Run()) == []


def test_the_average_is_saved_resumed_and_undone():
    param, optimizer = make(WeightAverage(0.8, 2), config=AVERAGED)
    run(param, optimizer, range(4))
    saved, snapshot = optimizer.state.tensors(), optimizer.state.snapshot()
    assert saved["average/w"].shape == (5, 8)
    expected = run(param, optimizer, range(4, 7))[-1][1]
    other, resumed = make(WeightAverage(0.8, 2), config=AVERAGED)
    resumed.state.load(saved)
    assert torch.equal(run(other, resumed, range(4, 7))[-1][1], expected)
    optimizer.state.restore(snapshot)
    assert torch.equal(optimizer.state.tensors()["average/w"], saved["average/w"])


def test_weights_in_bfloat16_are_averaged_in_float32():
    param, optimizer = make(WeightAverage(0.999, 0), config=AVERAGED, dtype=torch.bfloat16)
    start = param.detach().double()
    weights, averaged = run(param, optimizer, range(20))[-1]
    average = optimizer.state.tensors()["average/w"]
    assert average.dtype == torch.float32 and averaged.dtype == torch.bfloat16
    moved = (weights.double() - start).norm()
    assert 1e-3 * moved < (average.double() - start).norm() < 0.05 * moved


def test_the_configuration_counts_the_averages_start_in_steps():
    train = Train(steps=200, weight_average=0.99, weight_average_start=0.25, weight_average_blend=0.5)
    assert build_hooks(Run(train=train)) == [WeightAverage(0.99, 50, 0.5)]
    both = build_hooks(Run(train=replace(train, lookahead=0.5)))
    assert [type(hook) for hook in both] == [WeightAverage, Lookahead]  # the average does not see what lies ahead
