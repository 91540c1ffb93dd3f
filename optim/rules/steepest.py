"""Steepest descent: average the gradient, then step to the norm's dual.

With the norm it is Muon (spectral), Scion's LMOs, Signum (sign), normalised SGD (Frobenius) or modular duality's step
for a lookup table (row). Bernstein & Newhouse 2024, arXiv 2409.20325; Jordan et al. 2024.
"""

from dataclasses import dataclass

from torch import Tensor

from configs.schema import Group
from optim.norms import Norm, build_norm
from optim.rules.base import Decay, Hyper, apply_step, zeros_like_bank


@dataclass(frozen=True, slots=True)
class Steepest:
    """D = dual(average of the gradients).

    averaging `ema`: m <- mu m + (1 - mu) g, looking ahead (Nesterov) mu m + (1 - mu) g; `heavy_ball`: m <- mu m + g,
    looking ahead g + mu m; `none`: g. The first two differ by a factor, which the dual ignores, unless mu is scheduled.
    """

    norm: Norm
    averaging: str
    nesterov: bool

    @classmethod
    def build(cls, group: Group) -> "Steepest":
        """The rule that a group's configuration describes."""
        return cls(build_norm(group), group.averaging, group.nesterov)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The average, if any."""
        return {} if self.averaging == "none" else {"momentum": zeros_like_bank(param)}

    def direction(self, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """dual(average): (K, m, n) -> (K, m, n)."""
        return self.norm.dual(self._average(grad, state, hyper.momentum))

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper, *, decay: Decay) -> None:
        """W <- W - lr D, with decay, in place."""
        apply_step(param, self.direction(grad, state, hyper), hyper, decay=decay)

    def _average(self, grad: Tensor, state: dict[str, Tensor], mu: Tensor) -> Tensor:
        if self.averaging == "none":
            return grad
        memory, mu = state["momentum"], mu.to(grad.dtype)
        fresh = grad * (1 - mu) if self.averaging == "ema" else grad
        memory.mul_(mu).add_(fresh)
        return memory * mu + fresh if self.nesterov else memory
