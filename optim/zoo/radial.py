"""What the speedrun's track 3 does to the lengths of matrices and rows (results 44 to 46): a pin, a brake and a floor.

Stacks of matrices (K, m, n), float32. All of it reads the weights; all of it is off in plain groups.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.constraint import TINY, Constraint, Scope, length


@dataclass(frozen=True, slots=True)
class Radial(Constraint):
    """Each matrix's Frobenius norm changes by the radial part of its step alone: |W| <- |W| - lr <D, W> / |W|. What a
    straight step adds to that, by leaving the sphere tangentially, is taken back (speedrun track 3, results 44 to 46)."""

    plain: ClassVar[bool] = False

    def move(self, weights: Tensor, direction: Tensor, lr: Tensor, state: dict[str, Tensor]) -> None:
        """W - lr D at the length that the radial part says."""
        before = length(weights, (-2, -1))
        inward = (direction * (weights / before.clamp_min(TINY))).sum(dim=(-2, -1), keepdim=True)
        weights.sub_(direction * lr)
        wanted = torch.where(before > 0, before - lr * inward, length(weights, (-2, -1))).clamp_min(TINY)
        weights.mul_(wanted / length(weights, (-2, -1)).clamp_min(TINY))


@dataclass(frozen=True, slots=True)
class Shape:
    """First the brake, then the floor, as in the speedrun's track 3 (results 44 to 46).

    radial_brake b: where a matrix's step would lengthen it, <D, W> < 0, its radial part <D, W> W / |W|^2 is taken 1 - b
    times.
    row_floor f: each row of D has at least f times the length of the weights' row, so that no row's step is less than the
    share lr f of it; a row of D that is zero stays zero.
    """

    radial_brake: float = 0.0
    row_floor: float = 0.0

    @property
    def scope(self) -> Scope:
        """How finely a tensor may be cut: the brake needs whole matrices, the floor whole rows."""
        if self.radial_brake:
            return "matrix"
        return "row" if self.row_floor else "element"

    def __call__(self, weights: Tensor, direction: Tensor) -> Tensor:
        """The direction to be subtracted: itself where both are off, else a new tensor."""
        if self.radial_brake:
            radius = weights / length(weights, (-2, -1)).clamp_min(TINY)
            outward = (direction * radius).sum(dim=(-2, -1), keepdim=True).clamp_max(0)
            direction = direction - self.radial_brake * outward * radius
        if self.row_floor:
            least, have = self.row_floor * length(weights, -1), length(direction, -1)
            direction = torch.where(have < least, direction / have.clamp_min(TINY) * least, direction)
        return direction
