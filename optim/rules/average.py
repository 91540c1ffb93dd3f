"""Averages of the gradient: what every rule may step along instead of the last gradient alone."""

from dataclasses import dataclass

from torch import Tensor

from configs.schema import Group
from optim.rules.base import zeros_like_bank


@dataclass(frozen=True, slots=True)
class Average:
    """`ema`: m <- mu m + (1 - mu) g, looking ahead (Nesterov) mu m + (1 - mu) g; `heavy_ball`: m <- mu m + g, looking ahead
    g + mu m; `none`: g. The first two differ by a factor, which a dual ignores, unless mu is scheduled.
    """

    kind: str
    nesterov: bool

    @classmethod
    def build(cls, group: Group) -> "Average":
        """The average that a group's configuration describes."""
        return cls(group.averaging, group.nesterov)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The running average, if any."""
        return {} if self.kind == "none" else {"momentum": zeros_like_bank(param)}

    def next(self, grad: Tensor, state: dict[str, Tensor], mu: Tensor) -> Tensor:
        """The average with `grad` taken in, of grad's shape; not to be written into: it may be the state itself."""
        if self.kind == "none":
            return grad
        memory, mu = state["momentum"], mu.to(grad.dtype)
        fresh = grad * (1 - mu) if self.kind == "ema" else grad
        memory.mul_(mu).add_(fresh)
        return memory * mu + fresh if self.nesterov else memory
