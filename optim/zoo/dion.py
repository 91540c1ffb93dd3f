"""Dion: orthonormal momentum of low rank, by one power iteration a step, with error feedback."""

from math import ceil

import torch
from torch import Tensor

import configs.optim as configs
from optim.norms import TINY, Spectral
from optim.rule import Hyper, Rule, zeros_like_bank

ROUNDING = 1e-6  # a direction this much weaker than the strongest is float32's rounding, not the gradient


class Dion(Rule):
    """M <- M + g; P = qr(M Q); R = M^T P; M <- M - (1 - mu) P R^T; D = (m/n)^.5 P Q^T with Q <- R, columns at length 1.

    Ahn et al. 2025, arXiv 2504.05295, algorithm 1: what the step of rank r = frac min(m, n) leaves out stays in M. Wide
    matrices are transposed. Columns of R without content leave Q as it is and give no step.
    """

    config: configs.Dion
    norm = Spectral("rms_operator")

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The residual M, and Q, float32 (K, min(m, n), r): one Gaussian start for all, whichever rank owns a matrix."""
        side = min(param.shape[-2:])
        start = torch.randn(side, ceil(self.config.rank_frac * side), generator=torch.Generator().manual_seed(0))
        return {"residual": zeros_like_bank(param), "right": start.to(param.device).repeat(param.size(0), 1, 1)}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """(m/n)^.5 P Q^T: float32 (K, m, n)."""
        m, n = grad.shape[-2:]
        residual, right = state["residual"], state["right"]
        total = residual.float() + grad.float()
        scale = total.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(TINY)
        M = (total / scale).mT if m < n else total / scale
        P = torch.linalg.qr(M @ right).Q
        R = M.mT @ P
        taken = P @ R.mT
        residual.copy_(total - (1 - hyper.momentum) * scale * (taken.mT if m < n else taken))
        length = R.norm(dim=-2, keepdim=True)
        found = length > ROUNDING * length.amax(dim=-1, keepdim=True)
        Q = torch.where(found, R / length.clamp_min(TINY), 0)
        right.copy_(torch.where(found, Q, right))
        step = P @ Q.mT * (m / n) ** 0.5
        return step.mT if m < n else step
