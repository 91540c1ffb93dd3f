"""Dion2: Muon on the largest rows of its momentum; the other rows wait for a later step.

Ahn et al. 2025, arXiv 2512.16928. For a matrix with m <= n (in tall matrices, columns take the place of rows):

    M   <- M + G
    S    = the k rows of M with the largest sum of absolute values, k = ceil(rank_frac m)
    D_S  = (m/n)^.5 polar(M_S);  D = 0 elsewhere         m/n of the matrix as it is stored;   W <- W - lr D
    M_S <- mu M_S                                        rows that were used decay, the others stay

polar(A) = U V^T for A = U S V^T. Difference to the public code (microsoft/dion): rows are selected in the whole matrix, not
within each rank's part, so that the result does not depend on the world size.

State: `residual` M (K, m, n), in the dtype of the weights.
Shapes: K matrices m x n in one stack; b the shorter, a the longer of m and n; k the selected rows.
"""

from math import ceil

import torch
from torch import Tensor

import configs.optim as configs
from optim.newton_schulz import orthogonalize, unit_length
from optim.norms import Spectral
from optim.rule import Hyper, Rule, zeros_like_bank


class Dion2(Rule):
    """Dion2 (Ahn et al. 2025)."""

    config: configs.Dion2

    @property
    def norm(self) -> Spectral:
        """RMS -> RMS operator norm, orthogonalised as configured."""
        return Spectral("rms_operator", self.config.ns, self.config.ns_steps)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the residual M = 0."""
        return {"residual": zeros_like_bank(param)}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D, float32 (K, m, n): the orthogonalised rows in their places, zero elsewhere."""
        m, n = grad.shape[-2:]
        residual_Kmn = state["residual"]
        total_Kmn = residual_Kmn.float() + grad.float()
        M_Kba = total_Kmn.mT if m > n else total_Kmn
        # Rows of the shorter side: Newton-Schulz then multiplies k x k matrices in place of b x b.
        selected_Kk = M_Kba.abs().sum(-1).topk(ceil(self.config.rank_frac * M_Kba.size(-2)), dim=-1).indices
        index_Kka = selected_Kk.unsqueeze(-1).expand(-1, -1, M_Kba.size(-1))
        rows_Kka = M_Kba.gather(-2, index_Kka)
        decayed_Kba = M_Kba.scatter(-2, index_Kka, rows_Kka * hyper.momentum)
        polar_Kka = orthogonalize(rows_Kka, self.config.ns, steps=self.config.ns_steps)
        step_Kba = torch.zeros_like(M_Kba).scatter_(-2, index_Kka, polar_Kka)
        residual_Kmn.copy_(decayed_Kba.mT if m > n else decayed_Kba)
        return (step_Kba.mT if m > n else step_Kba) * unit_length("rms_operator", m, n)
