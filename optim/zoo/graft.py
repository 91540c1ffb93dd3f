"""Grafting: the direction of one rule, with the length of another rule's step, tensor by tensor.

Agarwal et al. 2020, arXiv 2002.11803 (who write the rule that gives the length first). For rules A and B:

    A#B:  D = ||D_B||_F  D_A / ||D_A||_F        D_A, D_B: their directions;   W <- W - lr D

Both rules see the same gradients and keep their own state. Difference to Meta's Distributed Shampoo: lengths are taken over
whole matrices, not block by block.

State: that of A; and that of B, its names with the prefix `size_`. Shapes: K matrices m x n in one stack.
"""

import torch
from torch import Tensor

from optim.constraint import TINY, Scope
from optim.norms import Norm
from optim.rule import Hyper, Rule

PREFIX = "size_"  # keeps the state names of the two rules apart


class Grafted(Rule):
    """Direction of one rule with the Frobenius norm of another's (Agarwal et al. 2020)."""

    scope: Scope = "matrix"  # the two lengths need whole matrices

    def __init__(self, direction_rule: Rule, length_rule: Rule) -> None:
        super().__init__(direction_rule.config)
        self.direction_rule, self.length_rule = direction_rule, length_rule

    @property
    def compiles(self) -> bool:
        """True if both rules compile to one graph."""
        return self.direction_rule.compiles and self.length_rule.compiles

    @property
    def norm(self) -> Norm:
        """Norm of the rule that gives the direction."""
        return self.direction_rule.norm

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the state of both rules."""
        lengths = {PREFIX + key: tensor for key, tensor in self.length_rule.init_state(param).items()}
        return self.direction_rule.init_state(param) | lengths

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D = ||D_B||_F D_A / ||D_A||_F, float32 (K, m, n)."""
        A_Kmn = self.direction_rule.direction(param, grad, state, hyper).float()
        # The tensors themselves, not copies: the rule updates them in place.
        length_state = {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if key.startswith(PREFIX)}
        B_Kmn = self.length_rule.direction(param, grad, length_state, hyper).float()
        A_Kmn = A_Kmn / A_Kmn.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(TINY)  # so that no square over- or underflows
        length = torch.linalg.vector_norm(B_Kmn, dim=(-2, -1), keepdim=True)
        return A_Kmn * (length / torch.linalg.vector_norm(A_Kmn, dim=(-2, -1), keepdim=True).clamp_min(TINY))
