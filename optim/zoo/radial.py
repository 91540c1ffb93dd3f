"""Control of the lengths of matrices and rows, as in the speedrun's track 3 (results 44 to 46). All off by default.

For a matrix W with direction D and R = W / ||W||_F:

    radial (constraint)   ||W||_F <- ||W||_F - lr <D, R>           after W <- W - lr D, by scaling
    radial_brake b        D <- D - b min(0, <D, R>) R              <D, R> < 0: the step would lengthen W
    row_floor f           D_i <- D_i max(1, f |W_i| / |D_i|)       each row i; a zero row of D stays zero

No state. Shapes: K matrices m x n in one stack, float32.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optim.constraint import TINY, Constraint, Scope, length


@dataclass(frozen=True, slots=True)
class Radial(Constraint):
    """Constraint under which the Frobenius norm of a matrix changes by the radial part of its step alone.

    The tangential part of a straight step makes W longer too, by Pythagoras; that growth is removed (results 44 to 46).
    """

    plain: ClassVar[bool] = False

    def move(self, weights: Tensor, direction: Tensor, lr: Tensor, state: dict[str, Tensor]) -> None:
        """Set W to W - lr D, scaled to the length ||W|| - lr <D, W> / ||W||, in place."""
        before = length(weights, (-2, -1))
        radial = (direction * (weights / before.clamp_min(TINY))).sum(dim=(-2, -1), keepdim=True)
        weights.sub_(direction * lr)
        # A zero matrix has no radial direction: it takes the straight step, or it could never grow.
        target = torch.where(before > 0, before - lr * radial, length(weights, (-2, -1))).clamp_min(TINY)
        weights.mul_(target / length(weights, (-2, -1)).clamp_min(TINY))


@dataclass(frozen=True, slots=True)
class Shape:
    """Change of a direction before the step: first the radial brake, then the row floor (results 44 to 46)."""

    radial_brake: float = 0.0
    """Share b of the radial part that is removed where a matrix's step would lengthen it; 0: off."""
    row_floor: float = 0.0
    """Least length f of a row of D, relative to the same row of W: no row moves by less than lr f of its length; 0: off."""

    @property
    def scope(self) -> Scope:
        """Smallest part of a tensor that can be changed alone: the brake needs whole matrices, the floor whole rows."""
        if self.radial_brake:
            return "matrix"
        return "row" if self.row_floor else "element"

    def __call__(self, weights: Tensor, direction: Tensor) -> Tensor:
        """Return the changed direction (K, m, n), a new tensor; `direction` itself if both are off."""
        if self.radial_brake:
            unit = weights / length(weights, (-2, -1)).clamp_min(TINY)
            outward = (direction * unit).sum(dim=(-2, -1), keepdim=True).clamp_max(0)
            direction = direction - self.radial_brake * outward * unit
        if self.row_floor:
            least, row_length = self.row_floor * length(weights, -1), length(direction, -1)
            direction = torch.where(row_length < least, direction / row_length.clamp_min(TINY) * least, direction)
        return direction
