"""What may change a direction before it is subtracted: a brake on the growth of a matrix, a floor under the step of a row.

Both read the weights; both are off in plain groups. Stacks of matrices (K, m, n), float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.groups import Group
from optim.norms import Scope

TINY = 1e-30  # shorter vectors count as this long, so that no quotient overflows


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

    @classmethod
    def build(cls, group: Group) -> "Shape":
        """What a group's configuration describes."""
        return cls(group.radial_brake, group.row_floor)

    @property
    def scope(self) -> Scope:
        """How finely a tensor may be cut: the brake needs whole matrices, the floor whole rows."""
        if self.radial_brake:
            return "matrix"
        return "row" if self.row_floor else "element"

    def __call__(self, weights: Tensor, direction: Tensor) -> Tensor:
        """The direction to be subtracted: itself where both are off, else a new tensor."""
        if self.radial_brake:
            direction = self._brake(weights, direction)
        return self._raise(weights, direction) if self.row_floor else direction

    def _brake(self, weights: Tensor, direction: Tensor) -> Tensor:
        radius = weights / length(weights, (-2, -1)).clamp_min(TINY)
        outward = (direction * radius).sum(dim=(-2, -1), keepdim=True).clamp_max(0)
        return direction - self.radial_brake * outward * radius

    def _raise(self, weights: Tensor, direction: Tensor) -> Tensor:
        least, have = self.row_floor * length(weights, -1), length(direction, -1)
        return torch.where(have < least, direction / have.clamp_min(TINY) * least, direction)


def length(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Euclidean norm along `dim`, kept, whose squares neither over- nor underflow."""
    largest = x.abs().amax(dim=dim, keepdim=True)
    return largest * torch.linalg.vector_norm(x / largest.clamp_min(TINY), dim=dim, keepdim=True)
