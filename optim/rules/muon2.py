"""Muon^2: Adam's second moment before the orthogonalization."""

from dataclasses import dataclass

from torch import Tensor

from configs.groups import Group
from optim.norms import Norm, Scope
from optim.rules.average import absorb_square
from optim.rules.base import Hyper, Rule, zeros_like_bank
from optim.rules.steepest import Steepest


@dataclass(frozen=True, slots=True)
class Muon2(Rule):
    """D = dual(average / (sqrt(v) + eps)) with v <- b2 v + (1 - b2) g^2, element by element.

    arXiv 2604.09967, and the speedrun's track 3, result 7, whose order and defaults are these. No bias correction: the
    dual ignores a common factor. As the average is taken before the division, the present v serves all of it.
    """

    muon: Steepest
    beta2: float
    eps: float
    scope: Scope = "matrix"

    @classmethod
    def build(cls, group: Group) -> "Muon2":
        """The rule that a group's configuration describes."""
        return cls(Steepest.build(group), group.beta2, group.eps)

    @property
    def norm(self) -> Norm:
        """Muon's."""
        return self.muon.norm

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The averages of the gradient, and of its square."""
        return self.muon.init_state(param) | {"square": zeros_like_bank(param)}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """dual(average / (sqrt(v) + eps)): float32 (K, m, n)."""
        grad = grad.float()
        absorb_square(state["square"], grad, self.beta2)
        average = self.muon.average.next(grad, state, hyper.momentum)
        return self.muon.dual(average.float() / state["square"].float().sqrt().add_(self.eps).clamp_min_(1e-30))
