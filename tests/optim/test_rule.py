"""Step: decay and rounding; and the second moment that rules share."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from configs.optim import Adam, NorMuon, Steepest
from optim.rule import Step, update_second_moment
from tests.optim.oracle import gaussian, hyper, train


def walk(step: Step, start: Tensor, steps: int, *, lr: float = 0.01) -> Tensor:
    W = start.clone()
    state = step.init_state(W)
    for i in range(steps):
        step.apply(W, gaussian(*W.shape, seed=i), state, hyper(lr, count=i + 1))
    return W


def test_with_the_remainder_nothing_is_lost():
    """bfloat16 weights with a remainder move exactly as float32 weights do, and are their rounded values."""
    start, step = gaussian(2, 9, 11).bfloat16(), Step(rounding="remainder")
    W, exact = start.clone(), start.float()
    state = step.init_state(W)
    for i in range(100):
        D = gaussian(2, 9, 11, seed=i)
        step.apply(W, D, state, hyper(1e-4))
        Step().apply(exact, D, {}, hyper(1e-4))
    assert torch.equal(step.float32_weights(W, state), exact)
    assert ((W.float() - exact).abs() <= (exact.bfloat16().float() - exact).abs()).all()
    assert not torch.equal(walk(Step(), start, 100, lr=1e-4), W)


@pytest.mark.parametrize("value", [1.0, -1.0, 3.1415927, -2.7182817e-20, 1.17e-38, 6.5e37, 0.0])
def test_the_remainder_is_exact_for_every_value(value):
    step, W = Step(rounding="remainder"), torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    state = step.init_state(W)
    step.apply(W, torch.full((1, 1, 1), -value), state, hyper(1.0))
    assert step.float32_weights(W, state).item() == torch.tensor(value).item()


def test_stochastic_rounding_is_right_in_the_mean():
    """20,000 copies of the weight 1, with tiny offsets, should become 1 + d, d a tenth of a bfloat16 unit: with stochastic
    rounding their mean moves by d, with rounding to nearest not at all."""
    offsets = torch.linspace(0, 1e-4, 20_000).view(1, 1, -1)
    expected = 1 + 2**-7 / 10 + offsets

    def rounded(kind: str) -> Tensor:
        W = torch.ones_like(expected, dtype=torch.bfloat16)
        Step(rounding=kind).apply(W, 1 - expected, {}, hyper(1.0))
        return W.float()

    assert torch.equal(rounded("nearest"), torch.ones_like(expected))
    assert (rounded("stochastic") - expected).mean().abs() < 1e-4
    assert set(rounded("stochastic").unique().tolist()) == {1.0, 1 + 2**-7}


def test_stochastic_rounding_does_not_depend_on_the_stack():
    W, D = gaussian(4, 6, 8).bfloat16(), gaussian(4, 6, 8, seed=1)
    whole, parts = W.clone(), W.clone()
    step = Step(rounding="stochastic")
    step.apply(whole, D, {}, hyper(0.01))
    for part, direction in zip(parts.split(1), D.split(1), strict=True):
        step.apply(part, direction, {}, hyper(0.01))
    assert torch.equal(whole, parts)


def test_squares_beyond_float32_are_finite_and_fade():
    average = torch.zeros(3)
    update_second_moment(average, torch.tensor([1e30, 2.0, 0.0]), 0.5)
    assert average.isfinite().all() and average[1] == 2 and average[2] == 0
    for _ in range(200):
        update_second_moment(average, torch.tensor([1.0, 2.0, 0.0]), 0.5)
    torch.testing.assert_close(average, torch.tensor([1.0, 4.0, 0.0]))


# ---- Decay --------------------------------------------------------------------------------------------------------------

DECAYS = ["none", "decoupled", "independent", "corrected", "cautious"]


def decayed(kind: str, W: Tensor, D: Tensor, lr: float, wd: float, peak: float) -> Tensor:
    """Return the weights after a step with decay, computed element by element."""
    weights = []
    for w, d in zip(W.flatten().tolist(), D.flatten().tolist(), strict=True):
        shrink = {"none": 0, "decoupled": lr * wd, "independent": wd * lr / peak,
                  "corrected": wd * lr * lr / peak, "cautious": lr * wd * (w * d >= 0),
                  "cautious_moving": lr * wd * (w * d > 0)}[kind]
        weights.append(w - shrink * w - lr * d)
    return torch.tensor(weights, dtype=torch.float64).view_as(W)


@pytest.mark.parametrize("kind", [*DECAYS, "cautious_moving"])
def test_decay_is_its_formula(kind):
    W, D = gaussian(1, 6, 9), gaussian(1, 6, 9, seed=1)
    D[0, 0], W[0, 1] = 0, 0
    expected = decayed(kind, W, D, 0.03, 0.4, 0.1)
    Step(kind, 0.1).apply(W, D, {}, hyper(0.03, wd=0.4))
    torch.testing.assert_close(W.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("rule", [Adam, partial(Steepest, norm="sign")])
def test_rules_apply_every_decay(kind, rule):
    """Decay acts on the weights before the step. The first direction of both rules is the sign."""
    W, G = gaussian(1, 6, 9), gaussian(1, 6, 9, seed=1)
    config = rule(decay=kind, weight_decay=0.4, lr=0.1)
    expected = decayed(kind, W, G.sign(), 0.03, 0.4, 0.1)
    torch.testing.assert_close(train(config, W, [G], lr=lambda step: 0.03).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("config", "rests"), [(Adam(), True), (NorMuon(), False)])
def test_cautious_decay_of_adam_leaves_rows_alone_that_never_had_a_gradient(config, rests):
    W, G = gaussian(1, 6, 9), gaussian(1, 6, 9, seed=1)
    G[:, 2] = 0
    after = train(replace(config, lr=0.1, decay="cautious", weight_decay=0.4), W, [G])
    assert torch.equal(after[:, 2], W[:, 2]) == rests and not torch.equal(after[:, 1], W[:, 1])


@pytest.mark.parametrize("kind", DECAYS)
def test_bfloat16_weights_are_rounded_once(kind):
    """Decay and step are computed in float32 and rounded at the end."""
    W, D = gaussian(1, 64, 64).bfloat16(), gaussian(1, 64, 64, seed=1).bfloat16()
    expected = decayed(kind, W, D, 0.013, 0.4, 0.1).float().bfloat16()
    Step(kind, 0.1).apply(W, D, {}, hyper(0.013, wd=0.4))
    assert (W != expected).float().mean() < 0.002


@pytest.mark.parametrize("kind", DECAYS[1:])
def test_a_frozen_group_stays_finite(kind):
    """A group with lr 0 does not move."""
    W, config = gaussian(1, 6, 9), Steepest(norm="sign", decay=kind, weight_decay=0.1, lr=0.0)
    assert torch.equal(train(config, W, [gaussian(1, 6, 9, seed=1)]), W)
