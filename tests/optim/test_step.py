"""From a direction to a step: constraint and rounding (decay is tested with the rules)."""

import pytest
import torch
from torch import Tensor

from optim.constraints import Hyperball
from optim.rules import Hyper
from optim.step import Step


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def hyper(lr: float, *, wd: float = 0.0, count: int = 1) -> Hyper:
    return Hyper(*(torch.tensor(float(x)) for x in (lr, wd, 0.95, count)))


def walk(step: Step, start: Tensor, steps: int, *, lr: float = 0.01) -> Tensor:
    W = start.clone()
    state = step.init_state(W)
    for i in range(steps):
        step.apply(W, gaussian(*W.shape, seed=i), state, hyper(lr, count=i + 1))
    return W


def test_the_hyperball_keeps_every_matrixs_norm():
    start = gaussian(3, 5, 7) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1)
    W = walk(Step(constraint=Hyperball()), start, 20, lr=0.3)
    torch.testing.assert_close(W.norm(dim=(1, 2)), start.norm(dim=(1, 2)), rtol=1e-6, atol=0)
    assert not torch.allclose(W, start, rtol=0.1)


def test_a_zero_matrix_on_the_hyperball_stays_zero():
    assert not walk(Step(constraint=Hyperball()), torch.zeros(1, 4, 4), 3).any()


def test_with_the_remainder_nothing_is_lost():
    """bfloat16 weights that keep their remainder walk exactly as float32 weights do, and are those rounded."""
    start, step = gaussian(2, 9, 11).bfloat16(), Step(rounding="remainder")
    W, exact = start.clone(), start.float()
    state = step.init_state(W)
    for i in range(100):
        D = gaussian(2, 9, 11, seed=i)
        step.apply(W, D, state, hyper(1e-4))
        Step().apply(exact, D, {}, hyper(1e-4))
    assert torch.equal(step.exact(W, state), exact)
    assert ((W.float() - exact).abs() <= (exact.bfloat16().float() - exact).abs()).all()
    assert not torch.equal(walk(Step(), start, 100, lr=1e-4), W)


@pytest.mark.parametrize("value", [1.0, -1.0, 3.1415927, -2.7182817e-20, 1.17e-38, 6.5e37, 0.0])
def test_the_remainder_is_exact_for_every_value(value):
    step, W = Step(rounding="remainder"), torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    state = step.init_state(W)
    step.apply(W, torch.full((1, 1, 1), -value), state, hyper(1.0))
    assert step.exact(W, state).item() == torch.tensor(value).item()


def test_stochastic_rounding_is_right_in_the_mean():
    """A weight of 1 that should become 1 + d, d a tenth of a bfloat16 unit, in 20,000 copies that differ in nothing but
    their tiny offsets: the mean moves by d; rounding to nearest never moves."""
    offsets = torch.linspace(0, 1e-4, 20_000).view(1, 1, -1)
    wanted = 1 + 2**-7 / 10 + offsets

    def rounded(kind: str) -> Tensor:
        W = torch.ones_like(wanted, dtype=torch.bfloat16)
        Step(rounding=kind).apply(W, 1 - wanted, {}, hyper(1.0))
        return W.float()

    assert torch.equal(rounded("nearest"), torch.ones_like(wanted))
    assert (rounded("stochastic") - wanted).mean().abs() < 1e-4
    assert set(rounded("stochastic").unique().tolist()) == {1.0, 1 + 2**-7}


def test_stochastic_rounding_does_not_depend_on_the_stack():
    W, D = gaussian(4, 6, 8).bfloat16(), gaussian(4, 6, 8, seed=1)
    whole, parts = W.clone(), W.clone()
    step = Step(rounding="stochastic")
    step.apply(whole, D, {}, hyper(0.01))
    for part, direction in zip(parts.split(1), D.split(1), strict=True):
        step.apply(part, direction, {}, hyper(0.01))
    assert torch.equal(whole, parts)


def test_corrected_decay_falls_with_the_square_of_the_rate():
    W = gaussian(1, 3, 4)
    now = W.clone()
    Step("corrected", peak_lr=0.2).apply(now, torch.zeros_like(W), {}, hyper(0.1, wd=0.3))
    torch.testing.assert_close(now, W * (1 - 0.1 * 0.3 * 0.1 / 0.2))
