"""What the rules' tests share: gradients, a training loop, and slow exact duals in float64."""

import torch
from torch import Tensor

from configs.groups import Group
from optim.rules import RULES, Hyper
from optim.step import Step


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def gradients(*shape: int, steps: int) -> list[Tensor]:
    """Of several magnitudes."""
    return [gaussian(*shape, seed=i, scale=10.0 ** (i % 3 - 1)) for i in range(steps)]


def hyper(lr: float, *, wd: float = 0.0, momentum: float = 0.95, count: int = 1) -> Hyper:
    return Hyper(*(torch.tensor(float(x)) for x in (lr, wd, momentum, count)))


def train(group: Group, start: Tensor, grads: list[Tensor], *, momentum=None) -> Tensor:
    """The weights after all gradients; neither the start nor the gradients may change, nor memories be replaced."""
    rule, step, W = RULES[group.rule].build(group), Step.build(group), start.clone()
    state = step.init_state(W) | rule.init_state(W)
    kept = dict(state)
    for t, grad in enumerate(grads):
        before = grad.clone()
        mu = group.momentum if momentum is None else momentum(t)
        rule.update(W, grad, state, hyper(group.lr, wd=group.weight_decay, momentum=mu, count=t + 1), step=step)
        assert torch.equal(grad, before)
    assert state.keys() == kept.keys() and all(state[key] is kept[key] for key in kept)
    return W


def directions(group: Group, grads: list[Tensor], *, mu: float | None = None, start: Tensor | None = None) -> list[Tensor]:
    """What the rule alone makes of the gradients, at weights that stay what they are."""
    rule = RULES[group.rule].build(group)
    W = gaussian(*grads[0].shape, seed=77) if start is None else start
    state, kept = rule.init_state(W), W.clone()
    mu = group.momentum if mu is None else mu
    found = [rule.direction(W, grad, state, hyper(group.lr, momentum=mu, count=t + 1)).clone()
             for t, grad in enumerate(grads)]
    assert torch.equal(W, kept)
    return found


def assert_moved_alike(found: Tensor, wanted: Tensor, start: Tensor, *, tolerance: float) -> None:
    """Equal within a share of the distance moved."""
    moved = (wanted.double() - start.double()).norm()
    assert moved > 0
    assert (found.double() - wanted.double()).norm() / moved <= tolerance


def polar(G: Tensor) -> Tensor:
    """U V^T over the singular values that are not zero, matrix by matrix, in float64."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return (U * (S > 1e-10 * S.amax(-1, keepdim=True)).unsqueeze(-2)) @ Vh


def nesterov_means(grads: list[Tensor], mu: float) -> list[Tensor]:
    """mu m + (1 - mu) g after each gradient, in float64."""
    memory, found = torch.zeros_like(grads[0], dtype=torch.float64), []
    for grad in grads:
        memory = mu * memory + (1 - mu) * grad.double()
        found.append(mu * memory + (1 - mu) * grad.double())
    return found


SHAPES = [(2, 12, 20), (2, 20, 12), (2, 16, 16)]
