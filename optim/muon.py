"""Muon: momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

One step of an m x n matrix W with gradient G:

    M <- mu M + (1 - mu) G                    momentum
    U S V^T = mu M + (1 - mu) G               its look-ahead (Nesterov)
    W <- W - lr (m/n)^.5 U V^T                orthogonalise: all singular values become 1; unit: the step's length

U V^T is the matrix of spectral norm 1 that decreases the loss most to first order: Muon is steepest descent under the
spectral norm (Bernstein & Newhouse 2024, arXiv 2409.20325). The same with any other norm is optim/zoo/steepest.py.
"""

import torch
from torch import Tensor

import configs.optim as configs
from optim.newton_schulz import coefficient_table, orthogonalize, unit_length
from optim.norms import Norm, Row, Spectral
from optim.rule import Hyper, Rule, zeros_like_bank


class Muon(Rule):
    """D = unit * orthogonalise(average of the gradients)."""

    config: configs.Muon

    def __init__(self, config: configs.Muon) -> None:
        super().__init__(config)
        self.table = coefficient_table(config.ns)

    @property
    def norm(self) -> Norm:
        """The spectral norm in the configured unit."""
        return Spectral(self.config.unit, self.config.ns, self.config.ns_steps)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The momentum buffer, (K, m, n)."""
        return init_average(param, self.config)

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """The orthogonalised average: (K, m, n) -> (K, m, n)."""
        return self.dual(average_gradient(grad, state, self.config, hyper.momentum))

    def dual(self, average: Tensor) -> Tensor:
        """The step of lr 1 that decreases <average, .> most: unit * U V^T of `average` = U S V^T, (K, m, n)."""
        if self.config.equilibrate:  # the span of the rows stays as it is, their singular values come closer together
            average = Row().dual(average)
        return orthogonalize(average, self.table, steps=self.config.ns_steps).mul_(
            unit_length(self.config.unit, *average.shape[-2:]))


# ---- Averages of the gradient, for every rule that steps along one --------------------------------------------------------


def init_average(param: Tensor, config: configs.Averaged) -> dict[str, Tensor]:
    """The running averages' buffers, if any, the slowest first: `momentum`, `momentum_1`, ..."""
    count = 0 if config.averaging == "none" else config.averages
    return {f"momentum_{k}" if k else "momentum": zeros_like_bank(param) for k in range(count)}


def average_gradient(grad: Tensor, state: dict[str, Tensor], config: configs.Averaged, mu: Tensor) -> Tensor:
    """The average with `grad` taken in, of grad's shape; not to be written into: it may be the buffer itself.

    ema: m <- mu m + (1 - mu) g, looking ahead (Nesterov) mu m + (1 - mu) g; heavy_ball: m <- mu m + g, looking ahead
    mu m + g; none: g. The first two differ by a factor, which orthogonalisation ignores, unless mu is scheduled.
    """
    if config.averaging == "none":
        return grad
    if config.averages > 1:
        return mean_of_averages(grad, state, config, mu)
    mu = mu.to(grad.dtype)
    fresh = grad * (1 - mu) if config.averaging == "ema" else grad
    momentum = state["momentum"].mul_(mu).add_(fresh)
    return momentum * mu + fresh if config.nesterov else momentum


def mean_of_averages(grad: Tensor, state: dict[str, Tensor], config: configs.Averaged, mu: Tensor) -> Tensor:
    """The mean of several running averages, whose ages 1 / (1 - mu_k) are spaced evenly in the logarithm between mu's and
    momentum_fast's: 1 - mu_k = (1 - mu)^(1 - s) (1 - momentum_fast)^s with s = k / (count - 1).

    A kernel with a power law's tail, as AdEMAMix mixes two (Pagliardini et al. 2024, arXiv 2409.03137).
    """
    averages = []
    for k in range(config.averages):
        share = k / (config.averages - 1)
        mu_k = (1 - (1 - mu) ** (1 - share) * (1 - config.momentum_fast) ** share if k else mu).to(grad.dtype)
        fresh = grad * (1 - mu_k)
        buffer = state[f"momentum_{k}" if k else "momentum"].mul_(mu_k).add_(fresh)
        averages.append(buffer * mu_k + fresh if config.nesterov else buffer)
    return torch.stack(averages).mean(0)
