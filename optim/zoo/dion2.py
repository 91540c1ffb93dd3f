"""Dion2: Muon on the largest rows of its momentum, the others waiting for their turn."""

from math import ceil

import torch
from torch import Tensor

import configs.optim as configs
from optim.newton_schulz import orthogonalize, unit_length
from optim.norms import Spectral
from optim.rule import Hyper, Rule, zeros_like_bank


class Dion2(Rule):
    """M <- M + g; S = the k = frac m rows of M with the largest sum of |.|; D_S = (m/n)^.5 polar(M_S), 0 elsewhere;
    M_S <- mu M_S. Of tall matrices, columns instead of rows: the shorter side is the one that is thinned out.

    Ahn et al. 2025, arXiv 2512.16928, with selection over the whole matrix and not within each rank's part.
    """

    config: configs.Dion2

    @property
    def norm(self) -> Spectral:
        """The RMS -> RMS operator norm."""
        return Spectral("rms_operator", self.config.ns, self.config.ns_steps)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The momentum M, of which steps are taken away."""
        return {"residual": zeros_like_bank(param)}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """The orthogonalised rows in their places: float32 (K, m, n)."""
        m, n = grad.shape[-2:]
        residual = state["residual"]
        total = residual.float() + grad.float()
        M = total.mT if m > n else total
        top = M.abs().sum(-1).topk(ceil(self.config.rank_frac * M.size(-2)), dim=-1).indices
        place = top.unsqueeze(-1).expand(-1, -1, M.size(-1))
        rows = M.gather(-2, place)
        kept = M.scatter(-2, place, rows * hyper.momentum)
        step = torch.zeros_like(M).scatter_(-2, place, orthogonalize(rows, self.config.ns, steps=self.config.ns_steps))
        residual.copy_(kept.mT if m > n else kept)
        return (step.mT if m > n else step) * unit_length("rms_operator", m, n)
