"""Automatic gradient descent: every layer's normalised gradient, and a step length that the gradients themselves give."""

import torch
from torch import Tensor

import configs.optim as configs
from optim.norms import Frobenius
from optim.rule import Hyper, Rule

LARGE = 1e37  # four times it is a float32


class AGD(Rule):
    """D = eta / L (m/n)^.5 G / ||G||_F for each of the group's L matrices, eta = log((1 + sqrt(1 + 4 S)) / 2) with the
    gradient summary S, the mean over the group of (m/n)^.5 ||G||_F. Bernstein et al. 2023, arXiv 2304.05187, algorithm 1.

    There is nothing to tune: lr is the paper's gain, 1. L counts the matrices that have a weight or a gradient.
    """

    config: configs.AGD
    norm = Frobenius()

    def init_shared(self) -> dict[str, Tensor]:
        """eta / L of this step."""
        return {"length": torch.zeros(())}

    def sums(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Sum of (m/n)^.5 ||G||_F, and the number of matrices."""
        size = (self.norm.dual(grad.float()) * grad).sum(dim=(-2, -1))
        alive = (size > 0) | param.flatten(1).any(1)
        return torch.stack([(size * _scale(grad)).sum().clamp_max(LARGE), alive.float().sum()])

    def update_shared(self, sums: Tensor, hyper: Hyper) -> None:
        """eta / L from the group's sums."""
        layers = sums[1].clamp_min(1)
        summary = (sums[0] / layers).clamp_max(LARGE)
        hyper.shared["length"].copy_(torch.log((1 + (1 + 4 * summary).sqrt()) / 2) / layers)

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """eta / L (m/n)^.5 G / ||G||_F, zero where G is: float32 (K, m, n)."""
        return self.norm.dual(grad.float()) * (_scale(grad) * hyper.shared["length"])


def _scale(grad: Tensor) -> float:
    return (grad.size(-2) / grad.size(-1)) ** 0.5
