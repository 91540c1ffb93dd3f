"""Muon: momentum, then orthogonalisation (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

One step of a weight matrix W of shape (m, n) = (outputs, inputs), with gradient G, momentum mu and learning rate lr:

    M <- mu M + (1 - mu) G              momentum buffer
    A  = mu M + (1 - mu) G              Nesterov look-ahead
    O  ~ U V^T,  where A = U S V^T      orthogonalise (Newton-Schulz): all singular values become about 1
    W <- W - lr (m/n)^.5 O              scale by the unit: (m/n)^.5 by default, max(1, m/n)^.5 in the post (`at_least_one`)

Among all matrices of spectral norm 1, U V^T has the largest inner product with A: Muon is steepest descent under the
spectral norm (Bernstein & Newhouse 2024, arXiv 2409.20325). optim/zoo/steepest.py does the same for any other norm.

This file computes the direction D = (m/n)^.5 O. `Step` in optim/rule.py then applies weight decay and W <- W - lr D, and
optim/sharded.py communicates. All tensors are stacks (K, m, n) of K matrices of one shape.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import configs.optim as configs
from configs.notation import parse_kernel
from optim.newton_schulz import coefficient_table, orthogonalize, unit_length
from optim.norms import Norm, Row, Spectral
from optim.rule import Hyper, Rule, zeros_like_bank


class Muon(Rule):
    """Direction D = scale * orthogonalise(average of the gradients)."""

    config: configs.Muon

    def __init__(self, config: configs.Muon) -> None:
        super().__init__(config)
        self.table = coefficient_table(config.ns)  # once, so that no step parses an inline table

    @property
    def norm(self) -> Norm:
        """Spectral norm in the configured unit: metrics measure weights in it, and its scope is that of the sharding."""
        return Spectral(self.config.unit, self.config.ns, self.config.ns_steps)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the zero momentum buffer, (K, m, n)."""
        return init_average(param, self.config)

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Update the momentum buffer in place and return its orthogonalised look-ahead, (K, m, n)."""
        return self.dual(average_gradient(grad, state, self.config, hyper))

    def dual(self, average: Tensor) -> Tensor:
        """Return scale * U V^T of `average` = U S V^T, (K, m, n), a new tensor; the scale is `unit_length`.

        With `equilibrate`, U V^T is that of the average with its rows scaled to one length: another matrix.
        """
        if self.config.equilibrate:
            # Rows of one length are usually better conditioned: fewer Newton-Schulz steps reach small singular values.
            average = Row().dual(average)
        scale = unit_length(self.config.unit, *average.shape[-2:])
        return orthogonalize(average, self.table, steps=self.config.ns_steps).mul_(scale)


# ---- Averages of the gradient, for every rule that has momentum -----------------------------------------------------------


def init_average(param: Tensor, config: configs.Averaged) -> dict[str, Tensor]:
    """Return zero momentum buffers in the dtype of `param`: `momentum`, `momentum_1`, ..., or none."""
    count = 0 if config.averaging == "none" else len(config.kernel) or config.averages
    return {momentum_key(k): zeros_like_bank(param) for k in range(count)}


def momentum_key(k: int) -> str:
    """Return the state key of average k = 0, 1, ..."""
    return f"momentum_{k}" if k else "momentum"


def average_gradient(grad: Tensor, state: dict[str, Tensor], config: configs.Averaged, hyper: Hyper) -> Tensor:
    """Update the momentum buffers in place with `grad` and return the average, of grad's shape.

    The result may be the buffer or `grad` itself: the caller must not write into it. With config.nesterov:

        ema           m <- mu m + (1 - mu) g,    return mu m + (1 - mu) g
        heavy_ball    m <- mu m + g,             return mu m + g
        none                                     return g

    Without nesterov it returns m or g. At constant mu the first two differ by a factor, which orthogonalisation removes.
    """
    if config.averaging == "none":
        return grad
    if config.averages > 1 or config.kernel:
        return mean_of_averages(grad, state, config, hyper)  # the config allows several averages for ema only
    mu = hyper.momentum.to(grad.dtype)  # before 1 - mu: in bfloat16 too, the two weights of an average add up to 1
    weighted_grad = grad * (1 - mu) if config.averaging == "ema" else grad
    momentum = state["momentum"].mul_(mu).add_(weighted_grad)
    return momentum * mu + weighted_grad if config.nesterov else momentum


class Average(NamedTuple):
    """One of several running averages m <- mu m + (1 - mu) g, at one update."""

    mu: Tensor | float
    """Its momentum."""
    weight: Tensor | float
    """Its weight in their mean, before division by the sum of the weights."""
    reach: Tensor | float
    """Nesterov's look-ahead: its part of the mean is reach m + (1 - reach) g."""


def averages_at(config: configs.Averaged, hyper: Hyper) -> list[Average]:
    """Return the averages of an update, in the order of their buffers.

    Those of `averages` have time scales 1 / (1 - mu_k) that are evenly spaced in the logarithm, from mu's, which may be
    scheduled, to config.momentum_fast's: 1 - mu_k = (1 - mu)^(1 - s) (1 - momentum_fast)^s with s = k / (averages - 1).
    Old gradients then fade like a power law, not exponentially; AdEMAMix mixes two averages to that end (Pagliardini et al.
    2024, arXiv 2409.03137). Those of `kernel` are fixed (speedrun track 3, pull request 339).
    """
    mu = hyper.momentum
    if config.kernel:
        averages = [Average(mu_k, weight, mu) for mu_k, weight in parse_kernel(config.kernel).items()]
    else:
        shares = [k / (config.averages - 1) for k in range(config.averages)]
        mus = [1 - (1 - mu) ** (1 - s) * (1 - config.momentum_fast) ** s if s else mu for s in shares]  # s = 0: no rounding
        averages = [Average(mu_k, 1.0, mu_k) for mu_k in mus]
    if not config.kernel_from:
        return averages
    # Until then every buffer is the same average, and the first has all the weight. Chosen by the count as a tensor, because
    # a branch would compile a second graph.
    acts = hyper.count > config.kernel_from
    return [Average(torch.where(acts, average.mu, mu), torch.where(acts, average.weight, float(k == 0)),
                    torch.where(acts, average.reach, mu)) for k, average in enumerate(averages)]


def mean_of_averages(grad: Tensor, state: dict[str, Tensor], config: configs.Averaged, hyper: Hyper) -> Tensor:
    """Update several running averages in place and return their weighted mean, of grad's shape, a new tensor."""
    mean, total = None, 0.0
    for k, average in enumerate(averages_at(config, hyper)):
        mu, reach = (torch.as_tensor(x, dtype=grad.dtype) for x in (average.mu, average.reach))
        buffer = state[momentum_key(k)].mul_(mu).add_(grad * (1 - mu))
        part = (buffer * reach + grad * (1 - reach) if config.nesterov else buffer) * average.weight
        mean, total = part if mean is None else mean.add_(part), total + average.weight
    return mean.div_(total)
