"""Grafting: the direction of one rule at the size of another, tensor by tensor."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.groups import Group
from optim.norms import Norm, Scope
from optim.rules.base import Hyper, Rule

TINY = 1e-30
SIZE = "size_"  # begins the state names of the rule that gives the size


@dataclass(frozen=True, slots=True)
class Grafted(Rule):
    """A#B: D = ||B||_F A / ||A||_F for the directions A of `way` and B of `size` (Agarwal et al. 2020, arXiv 2002.11803, who
    write the size first)."""

    way: Rule
    size: Rule
    scope: Scope = "matrix"

    @property
    def compiles(self) -> bool:
        """Where both do."""
        return self.way.compiles and self.size.compiles

    @property
    def norm(self) -> Norm:
        """The direction's."""
        return self.way.norm

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Both memories."""
        return self.way.init_state(param) | {SIZE + key: tensor for key, tensor in self.size.init_state(param).items()}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """The way's direction at the size's size: float32 (K, m, n)."""
        way = self.way.direction(param, grad, state, hyper).float()
        sizes = {key.removeprefix(SIZE): tensor for key, tensor in state.items() if key.startswith(SIZE)}
        size = self.size.direction(param, grad, sizes, hyper).float()
        way = way / way.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(TINY)  # so that no square over- or underflows
        lengths = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (size, way))
        return way * (next(lengths) / next(lengths).clamp_min(TINY))


def plain(group: Group, rule: str) -> Group:
    """The group with another rule and no graft."""
    return replace(group, rule=rule, graft="")
