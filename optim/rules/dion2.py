"""Dion2: Muon on the largest rows of its momentum, the others waiting for their turn."""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from configs.groups import Group
from optim.newton_schulz import orthogonalize
from optim.norms import Spectral
from optim.rules.base import Hyper, Rule, zeros_like_bank


@dataclass(frozen=True, slots=True)
class Dion2(Rule):
    """M <- M + g; S = the k = frac m rows of M with the largest sum of |.|; D_S = (m/n)^.5 polar(M_S), 0 elsewhere;
    M_S <- mu M_S. Of tall matrices, columns instead of rows: the shorter side is the one that is thinned out.

    Ahn et al. 2025, arXiv 2512.16928, with selection over the whole matrix and not within each rank's part.
    """

    rank_frac: float
    norm: Spectral

    @classmethod
    def build(cls, group: Group) -> "Dion2":
        """The rule that a group's configuration describes."""
        return cls(group.rank_frac, Spectral("rms", group.ns, group.ns_steps))

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The momentum M, of which steps are taken away."""
        return {"residual": zeros_like_bank(param)}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """The orthogonalised rows in their places: float32 (K, m, n)."""
        m, n = grad.shape[-2:]
        residual = state["residual"]
        total = residual.float() + grad.float()
        M = total.mT if m > n else total
        top = M.abs().sum(-1).topk(ceil(self.rank_frac * M.size(-2)), dim=-1).indices
        place = top.unsqueeze(-1).expand(-1, -1, M.size(-1))
        rows = M.gather(-2, place)
        kept = M.scatter(-2, place, rows * hyper.momentum)
        step = torch.zeros_like(M).scatter_(-2, place, orthogonalize(rows, self.norm.table, steps=self.norm.steps))
        residual.copy_(kept.mT if m > n else kept)
        return (step.mT if m > n else step) * self.norm.scale(m, n)
