"""Test the hyperball: every matrix keeps the Frobenius norm that it started with."""

import pytest
import torch
from torch import Tensor, nn

from configs.optim import Adam
from optim.rule import Step
from optim.zoo.hyperball import Hyperball
from tests.optim.oracle import FULL, gaussian, hyper, one_role


def take_steps(step: Step, start: Tensor, steps: int, *, lr: float = 0.01) -> Tensor:
    W = start.clone()
    state = step.init_state(W)
    for i in range(steps):
        step.apply(W, gaussian(*W.shape, seed=i), state, hyper(lr, count=i + 1))
    return W


def test_the_hyperball_keeps_every_matrixs_norm():
    start = gaussian(3, 5, 7) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1)
    W = take_steps(Step(constraint=Hyperball()), start, 20, lr=0.3)
    torch.testing.assert_close(W.norm(dim=(1, 2)), start.norm(dim=(1, 2)), rtol=1e-6, atol=0)
    assert not torch.allclose(W, start, rtol=0.1)


def test_a_zero_matrix_on_the_hyperball_stays_zero():
    assert not take_steps(Step(constraint=Hyperball()), torch.zeros(1, 4, 4), 3).any()


def test_the_hyperball_needs_whole_matrices():
    """AdamH: each matrix keeps its own norm, although Adam alone may be sharded element by element."""
    params = {name: nn.Parameter(gaussian(5, 8, seed=i, scale=i + 1.0)) for i, name in enumerate("abc")}
    before = {name: param.norm().item() for name, param in params.items()}
    optimizer = one_role(Adam(constraint="hyperball", lr=0.1), params)
    start = {name: param.detach().clone() for name, param in params.items()}
    for step in range(5):
        for i, param in enumerate(params.values()):
            param.grad.copy_(gaussian(5, 8, seed=10 * step + i))
        optimizer.step(FULL, step + 1)
    for name, param in params.items():
        assert param.norm().item() == pytest.approx(before[name], rel=1e-5)
        assert (param - start[name]).norm() > 0.5
