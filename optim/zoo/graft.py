"""Grafting: the direction of one rule at the length of another's, tensor by tensor."""

import torch
from torch import Tensor

from optim.constraint import TINY, Scope
from optim.norms import Norm
from optim.rule import Hyper, Rule

PREFIX = "size_"  # begins the state names of the rule that gives the length


class Grafted(Rule):
    """A#B: D = ||B||_F A / ||A||_F for the directions A of `way` and B of `size` (Agarwal et al. 2020, arXiv 2002.11803, who
    write the size first)."""

    scope: Scope = "matrix"

    def __init__(self, way: Rule, size: Rule) -> None:
        super().__init__(way.config)
        self.way, self.size = way, size

    @property
    def compiles(self) -> bool:
        """Where both do."""
        return self.way.compiles and self.size.compiles

    @property
    def norm(self) -> Norm:
        """The direction's."""
        return self.way.norm

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The state of both."""
        return self.way.init_state(param) | {PREFIX + key: tensor for key, tensor in self.size.init_state(param).items()}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """A's direction at the length of B's: float32 (K, m, n)."""
        way = self.way.direction(param, grad, state, hyper).float()
        sizes = {key.removeprefix(PREFIX): tensor for key, tensor in state.items() if key.startswith(PREFIX)}
        size = self.size.direction(param, grad, sizes, hyper).float()
        way = way / way.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(TINY)  # so that no square over- or underflows
        wanted = torch.linalg.vector_norm(size, dim=(-2, -1), keepdim=True)
        return way * (wanted / torch.linalg.vector_norm(way, dim=(-2, -1), keepdim=True).clamp_min(TINY))
