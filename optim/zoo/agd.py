"""Automatic gradient descent (AGD): normalised gradients, with a step length computed from the gradient norms.

Bernstein et al. 2023, arXiv 2304.05187, algorithm 1. For the L matrices W (m x n) of a group, with gradients G:

    S   = (1 / L) sum over the matrices of (m/n)^.5 ||G||_F      gradient summary
    eta = log((1 + sqrt(1 + 4 S)) / 2)
    D   = (eta / L) (m/n)^.5 G / ||G||_F                         zero where G is zero
    W  <- W - lr D

lr is the paper's gain: leave it at 1, there is nothing to tune. The public code (jxbz/agd) refuses vectors; here a vector
is a matrix of one row. L counts the matrices that have a weight or a gradient.

State: nothing per matrix. Shared by the group: `length` = eta / L, a scalar. Shapes: K matrices m x n in one stack.
"""

import torch
from torch import Tensor

import configs.optim as configs
from optim.norms import Frobenius
from optim.rule import Hyper, Rule

LARGE = 1e37  # upper bound of S, so that 4 S is still finite in float32


class AGD(Rule):
    """Automatic gradient descent (Bernstein et al. 2023, algorithm 1)."""

    config: configs.AGD
    norm = Frobenius()

    def init_shared(self) -> dict[str, Tensor]:
        """Return the scalar `length`, eta / L of the present step."""
        return {"length": torch.zeros(())}

    def sums(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return this stack's sum of (m/n)^.5 ||G||_F and its number of matrices, (2,)."""
        # ||G||_F as <dual(G), G>: the squares of large entries would overflow.
        norm_K = (self.norm.dual(grad.float()) * grad).sum(dim=(-2, -1))
        # Zero matrices that only fill the stack up to the world size must not count as layers.
        counts_K = (norm_K > 0) | param.flatten(1).any(1)
        return torch.stack([(norm_K * _scale(grad)).sum().clamp_max(LARGE), counts_K.float().sum()])

    def update_shared(self, sums: Tensor, hyper: Hyper) -> None:
        """Set `length` to eta / L, from the sums over the whole group."""
        layers = sums[1].clamp_min(1)
        summary = (sums[0] / layers).clamp_max(LARGE)
        hyper.shared["length"].copy_(torch.log((1 + (1 + 4 * summary).sqrt()) / 2) / layers)

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D = (eta / L) (m/n)^.5 G / ||G||_F, float32 (K, m, n)."""
        return self.norm.dual(grad.float()) * (_scale(grad) * hyper.shared["length"])


def _scale(grad: Tensor) -> float:
    return (grad.size(-2) / grad.size(-1)) ** 0.5
