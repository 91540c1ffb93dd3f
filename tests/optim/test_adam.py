"""Adam against PyTorch's AdamW and its formula; its fused path against the general one."""

import math

import pytest
import torch
from torch import Tensor

from configs.optim import Adam
from optim.groups import build_rule
from optim.rule import Step
from tests.optim.oracle import assert_moved_alike, gaussian, gradients, hyper, train


def warm_then_cold(step: int) -> float:
    """Return a learning rate that differs at every step."""
    return 0.02 * min(1, (step + 1) / 10) * (1 - 0.02 * step)


def spotted(*shape: int) -> list[Tensor]:
    """Return gradients of several magnitudes, with one element that is always zero."""
    grads = gradients(*shape, steps=30)
    for grad in grads:
        grad.view(-1)[3] = 0
    return grads


def torch_adamw(config: Adam, start: Tensor, grads: list[Tensor]) -> Tensor:
    param = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([param], betas=(config.beta1, config.beta2), eps=config.eps,
                                  weight_decay=config.weight_decay, fused=False, foreach=False)
    for step, grad in enumerate(grads):
        optimizer.param_groups[0]["lr"] = warm_then_cold(step)
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("config", [
    Adam(weight_decay=0.1), Adam(beta1=0.9, beta2=0.999, eps=1e-8), Adam(eps=0.3, weight_decay=0.01), Adam(beta1=0.0)])
def test_adam_is_pytorchs_adamw(config):
    start, grads = gaussian(2, 5, 7, seed=99), spotted(2, 5, 7)
    actual, expected = train(config, start, grads, lr=warm_then_cold), torch_adamw(config, start, grads)
    assert_moved_alike(actual, expected, start, tolerance=1e-6)


@pytest.mark.parametrize("config", [Adam(weight_decay=0.1), Adam(eps=0.3), Adam(decay="none", weight_decay=0.1)])
def test_the_fast_path_of_adam_is_the_plain_one(config):
    start, grads = gaussian(1, 37, 1, seed=99), spotted(1, 37, 1)
    rule, W = build_rule(config), start.clone()
    state = rule.init_state(W)
    for step, grad in enumerate(grads):
        numbers = hyper(warm_then_cold(step), wd=config.weight_decay, count=step + 1)
        Step.build(config).apply(W, rule.direction(W, grad, state, numbers), state, numbers)
    assert_moved_alike(train(config, start, grads, lr=warm_then_cold), W, start, tolerance=1e-6)


def test_adams_first_step_is_the_sign():
    """With bias correction mhat = g and vhat = g^2 at count 1, but not at count 2."""
    rule, G = build_rule(Adam()), gaussian(1, 6, 4)
    torch.testing.assert_close(rule.direction(G, G, rule.init_state(G), hyper(1)), G.sign(), rtol=0, atol=1e-5)
    late = rule.direction(G, G, rule.init_state(G), hyper(1, count=2))
    expected = 0.2 / (1 - 0.8**2) / math.sqrt(0.05 / (1 - 0.95**2))
    torch.testing.assert_close(late, G.sign() * expected, rtol=1e-5, atol=0)


def test_adam_in_bfloat16_follows_the_formula_with_rounded_memories():
    start, config = gaussian(1, 40, 8, seed=9).bfloat16(), Adam(weight_decay=0.1, lr=0.01)
    rule, W, twin = build_rule(config), start.clone(), start.clone()
    state = rule.init_state(W)
    mean, square = torch.zeros_like(W), torch.zeros_like(W)
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    for step in range(12):
        grad = gaussian(1, 40, 8, seed=step).bfloat16()
        rule.update(W, grad, state, hyper(0.01, wd=0.1, count=step + 1), step=Step("decoupled", 0.01))
        mean = (0.8 * mean.float() + 0.2 * grad.float()).bfloat16()
        square = (0.95 * square.float() + 0.05 * grad.float() ** 2).bfloat16()
        hats = mean.float() / (1 - 0.8 ** (step + 1)), square.float() / (1 - 0.95 ** (step + 1))
        twin = (twin.float() * (1 - 0.001) - 0.01 * hats[0] / (hats[1].sqrt() + 1e-10)).bfloat16()
    assert W.dtype == torch.bfloat16
    assert_moved_alike(W, twin, start, tolerance=0.02)
