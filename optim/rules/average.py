"""Averages of the gradient: what every rule may step along instead of the last gradient alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.groups import Group
from optim.rules.base import zeros_like_bank


@dataclass(frozen=True, slots=True)
class Average:
    """`ema`: m <- mu m + (1 - mu) g, looking ahead (Nesterov) mu m + (1 - mu) g; `heavy_ball`: m <- mu m + g, looking ahead
    g + mu m; `none`: g. The first two differ by a factor, which a dual ignores, unless mu is scheduled.

    Several averages (`ema` alone): the mean of `count` of them, whose ages 1 / (1 - mu_k) are spaced evenly in the logarithm
    between `fast`'s and mu's: a kernel with a power law's tail, as AdEMAMix mixes two (Pagliardini et al. 2024,
    arXiv 2409.03137).
    """

    kind: str
    nesterov: bool
    count: int = 1
    fast: float = 0.5

    @classmethod
    def build(cls, group: Group) -> "Average":
        """The average that a group's configuration describes."""
        return cls(group.averaging, group.nesterov, group.averages, group.momentum_fast)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The running averages, if any, the slowest first."""
        return {} if self.kind == "none" else {key: zeros_like_bank(param) for key in self._keys()}

    def next(self, grad: Tensor, state: dict[str, Tensor], mu: Tensor) -> Tensor:
        """The average with `grad` taken in, of grad's shape; not to be written into: it may be the state itself."""
        if self.kind == "none":
            return grad
        found = [self._advance(grad, state[key], self._mu(k, mu).to(grad.dtype)) for k, key in enumerate(self._keys())]
        return found[0] if self.count == 1 else torch.stack(found).mean(0)

    def _advance(self, grad: Tensor, memory: Tensor, mu: Tensor) -> Tensor:
        fresh = grad * (1 - mu) if self.kind == "ema" else grad
        memory.mul_(mu).add_(fresh)
        return memory * mu + fresh if self.nesterov else memory

    def _mu(self, k: int, mu: Tensor) -> Tensor:
        """1 - mu_k = (1 - mu)^(1 - s) (1 - fast)^s with s = k / (count - 1)."""
        if k == 0:
            return mu
        share = k / (self.count - 1)
        return 1 - (1 - mu) ** (1 - share) * (1 - self.fast) ** share

    def _keys(self) -> list[str]:
        return ["momentum", *(f"momentum_{k}" for k in range(1, self.count))]


def absorb_square(memory: Tensor, grad: Tensor, beta: float) -> None:
    """v <- beta v + (1 - beta) g^2, in place; squares beyond float32 count as its largest number, so that one huge gradient
    is forgotten like any other."""
    square = grad.float().square().clamp_max_(torch.finfo(torch.float32).max)
    memory.mul_(beta).add_(square.mul_(1 - beta).to(memory.dtype))
