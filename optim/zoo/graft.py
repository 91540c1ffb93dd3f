"""Grafting: the direction of one rule, with the length of another rule's step, tensor by tensor.

Agarwal et al. 2020, arXiv 2002.11803 (who write the rule that gives the length first). For rules A and B:

    A#B:  D = ||D_B||_F  D_A / ||D_A||_F

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
    """Rule `way`#`size` (Agarwal et al. 2020): the direction comes from `way`, its Frobenius norm from `size`."""

    scope: Scope = "matrix"  # the two lengths need whole matrices

    def __init__(self, way: Rule, size: Rule) -> None:
        super().__init__(way.config)
        self.way, self.size = way, size

    @property
    def compiles(self) -> bool:
        """True if both rules compile to one graph."""
        return self.way.compiles and self.size.compiles

    @property
    def norm(self) -> Norm:
        """Norm of the rule that gives the direction."""
        return self.way.norm

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the state of both rules."""
        return self.way.init_state(param) | {PREFIX + key: tensor for key, tensor in self.size.init_state(param).items()}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D = ||D_B||_F D_A / ||D_A||_F, float32 (K, m, n)."""
        way_Kmn = self.way.direction(param, grad, state, hyper).float()
        # The tensors themselves, not copies: the rule updates them in place.
        size_state = {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if key.startswith(PREFIX)}
        size_Kmn = self.size.direction(param, grad, size_state, hyper).float()
        way_Kmn = way_Kmn / way_Kmn.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(TINY)  # so that squares stay finite
        length = torch.linalg.vector_norm(size_Kmn, dim=(-2, -1), keepdim=True)
        return way_Kmn * (length / torch.linalg.vector_norm(way_Kmn, dim=(-2, -1), keepdim=True).clamp_min(TINY))
