"""Constraint sets of the weights: how first weights get in, how a step stays in. The sets themselves are in optim/zoo/."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from configs.optim import RuleConfig

Scope = Literal["element", "row", "matrix"]
"""How finely a tensor may be cut among ranks, each part updated alone."""
TINY = 1e-30  # shorter vectors count as this long, so that no quotient overflows


def length(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Euclidean norm along `dim`, which is kept with size 1; its squares neither over- nor underflow."""
    largest = x.abs().amax(dim=dim, keepdim=True)
    return largest * torch.linalg.vector_norm(x / largest.clamp_min(TINY), dim=dim, keepdim=True)


@dataclass(frozen=True, slots=True)
class Constraint:
    """A set that weights stay in, stacks of matrices (K, m, n), float32; here all of space, for subclasses to narrow."""

    plain: ClassVar[bool] = True
    """Whether a step is W - lr D and then `retract`, so that a rule may subtract in its own kernel."""
    scope: ClassVar[Scope] = "matrix"
    """How finely a tensor may be cut and each part moved alone."""

    @classmethod
    def build(cls, config: RuleConfig) -> "Constraint":
        """The set that a rule's configuration describes."""
        return cls()

    def with_axis(self, axis: int) -> "Constraint":
        """The same set for tensors whose model dimension is `axis`, -1 or -2."""
        return self

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """State that the set needs of the first weights; its names begin with `step_`."""
        return {}

    def project_start(self, weights: Tensor) -> None:
        """Bring the first weights into the set, in place."""

    def project_gradient(self, weights: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The gradient as the rule gets it; averages in `state` may be moved to the present weights, in place."""
        return grad

    def move(self, weights: Tensor, direction: Tensor, lr: Tensor, state: dict[str, Tensor]) -> None:
        """A step of length lr along -D within the set, in place."""
        weights.sub_(direction * lr)
        self.retract(weights, state)

    def retract(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        """Back into the set, in place."""
