"""Dion: an orthonormal update of rank r, by one power iteration per step, with error feedback.

Ahn et al. 2025, arXiv 2504.05295, algorithm 1. For a matrix with m >= n (wide matrices are transposed):

    M <- M + G                                    residual: what earlier steps left out, plus the new gradient
    P  = qr(M Q);  R = M^T P                      power iteration from the last step's Q
    M <- M - (1 - mu) P R^T                       error feedback: remove what this step uses
    Q <- R, each column divided by its length
    D  = (m/n)^.5 P Q^T                           m/n of the matrix as it is stored;   W <- W - lr D

r = ceil(rank_frac min(m, n)). Differences to the public code (microsoft/dion): always a Householder QR, never the
randomised Cholesky QR; r is not rounded to a multiple; columns of R that are only rounding errors are dropped: they leave
their column of Q as it is and give no step.

State: `residual` M (K, m, n), in the dtype of the weights; `right` Q (K, b, r), float32.
Shapes: K matrices m x n in one stack; a the longer, b the shorter of m and n; r the rank.
"""

from math import ceil

import torch
from torch import Tensor

import configs.optim as configs
from optim.norms import TINY, Spectral
from optim.rule import Hyper, Rule, zeros_like_bank

ROUNDING = 1e-6  # a column of R so much shorter than the longest is float32 rounding, not gradient


class Dion(Rule):
    """Dion (Ahn et al. 2025, algorithm 1)."""

    config: configs.Dion
    norm = Spectral("rms_operator")

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return M = 0 and a Gaussian Q."""
        side = min(param.shape[-2:])
        # A fixed seed and one Q for every matrix: the start does not depend on which rank owns a matrix.
        start_br = torch.randn(side, ceil(self.config.rank_frac * side), generator=torch.Generator().manual_seed(0))
        return {"residual": zeros_like_bank(param), "right": start_br.to(param.device).repeat(param.size(0), 1, 1)}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D = (m/n)^.5 P Q^T, float32 (K, m, n)."""
        m, n = grad.shape[-2:]
        residual_Kmn, right_Kbr = state["residual"], state["right"]
        total_Kmn = residual_Kmn.float() + grad.float()
        # The power iteration works on M / max |M_ij|, so that no product overflows; P and Q do not depend on that scale.
        scale = total_Kmn.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(TINY)
        M_Kab = (total_Kmn / scale).mT if m < n else total_Kmn / scale
        P_Kar = torch.linalg.qr(M_Kab @ right_Kbr).Q
        R_Kbr = M_Kab.mT @ P_Kar
        # Error feedback.
        used_Kab = P_Kar @ R_Kbr.mT
        residual_Kmn.copy_(total_Kmn - (1 - hyper.momentum) * scale * (used_Kab.mT if m < n else used_Kab))
        # Columns of rounding errors, also those of a zero gradient, must not be scaled up to length 1.
        length = R_Kbr.norm(dim=-2, keepdim=True)
        is_gradient = length > ROUNDING * length.amax(dim=-1, keepdim=True)
        Q_Kbr = torch.where(is_gradient, R_Kbr / length.clamp_min(TINY), 0)
        right_Kbr.copy_(torch.where(is_gradient, Q_Kbr, right_Kbr))
        step_Kab = P_Kar @ Q_Kbr.mT * (m / n) ** 0.5
        return step_Kab.mT if m < n else step_Kab
