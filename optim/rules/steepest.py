"""Steepest descent: average the gradient, then step to the norm's dual.

With the norm it is Muon (spectral), Scion's LMOs, Signum (sign), normalised SGD (Frobenius) or modular duality's step
for a lookup table (row). Bernstein & Newhouse 2024, arXiv 2409.20325; Jordan et al. 2024.
"""

from dataclasses import dataclass

from torch import Tensor

from configs.groups import Group
from optim.norms import Norm, Row, build_norm
from optim.rules.average import Average
from optim.rules.base import Hyper, Rule


@dataclass(frozen=True, slots=True)
class Steepest(Rule):
    """D = dual(average of the gradients); equilibrated, its rows are first scaled to one length (nanochat's MuonEq), which
    leaves the span of the rows as it is and evens out the singular values that Newton-Schulz starts from.
    """

    norm: Norm
    average: Average
    equilibrate: bool = False

    @classmethod
    def build(cls, group: Group) -> "Steepest":
        """The rule that a group's configuration describes."""
        return cls(build_norm(group), Average.build(group), group.equilibrate)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The averages, if any."""
        return self.average.init_state(param)

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """dual(average): (K, m, n) -> (K, m, n)."""
        return self.dual(self.average.next(grad, state, hyper.momentum))

    def dual(self, average: Tensor) -> Tensor:
        """The norm's dual of an average, its rows made equally long before where the rule equilibrates."""
        return self.norm.dual(Row().dual(average) if self.equilibrate else average)
