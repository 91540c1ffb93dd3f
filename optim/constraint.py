"""Constraint sets of the weights: how initial weights are projected into a set, and how a step stays in it.

This file has the base class, which is no constraint at all; the sets are in optim/zoo/.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from configs.optim import RuleConfig

Scope = Literal["element", "row", "matrix"]
"""Finest piece of a tensor that can be updated alone; ranks may cut the tensor between such pieces."""
TINY = 1e-30  # shorter vectors count as this long, so that no quotient overflows


def length(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the Euclidean norm along `dim`, with that dimension kept at size 1.

    Divides by the largest entry first, so that squares neither overflow nor underflow.
    """
    largest = x.abs().amax(dim=dim, keepdim=True)
    return largest * torch.linalg.vector_norm(x / largest.clamp_min(TINY), dim=dim, keepdim=True)


@dataclass(frozen=True, slots=True)
class Constraint:
    """Set that weights, stacked matrices (K, m, n) in float32, stay in; the base class is the whole space."""

    plain: ClassVar[bool] = True
    """True if a step is W - lr D followed by `retract`, so that a rule may do the subtraction in its own kernel."""
    scope: ClassVar[Scope] = "matrix"
    """Finest piece that can be moved within the set alone."""

    @classmethod
    def build(cls, config: RuleConfig) -> "Constraint":
        """Return the set that a rule's config describes."""
        return cls()

    def with_axis(self, axis: int) -> "Constraint":
        """Return the set for tensors whose model dimension is `axis`, -1 or -2."""
        return self

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return state that the set needs from the initial weights; keys begin with `step_`."""
        return {}

    def project_start(self, weights: Tensor) -> None:
        """Project the initial weights into the set, in place."""

    def project_gradient(self, weights: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return the gradient that the rule gets. May project averages in `state` onto the current weights' tangent space,
        in place."""
        return grad

    def move(self, weights: Tensor, direction: Tensor, lr: Tensor, state: dict[str, Tensor]) -> None:
        """Move the weights within the set by a step of length lr along -D, in place."""
        weights.sub_(direction * lr)
        self.retract(weights, state)

    def retract(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        """Bring weights that have left the set back into it, in place."""
