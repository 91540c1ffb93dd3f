"""SWAN: the gradient with standardised rows, whitened; no state at all.

Ma et al. 2024, arXiv 2412.13148, algorithm 1:

    S = G, each row shifted to mean 0 and scaled to variance 1
    P = (S S^T)^(-1/2) S                         tall: S (S^T S)^(-1/2), the same polar factor from the smaller Gram matrix
    D = sqrt(m n) P / ||P||_F;   W <- W - lr D   RMS 1, as Adam's

The authors published no code. Difference to the paper: P is not computed by the coupled iteration on Y = X X^T and Z, but
by X <- X (3 - X^T X) / 2. In exact arithmetic they agree (X = Z X_0). But if S S^T is singular, as centred rows make it in
square and tall matrices, rounding errors of the coupled iteration grow by 2.25 per step, of this one by 1.5.

Shapes: K matrices m x n in one stack.
"""

import torch
from torch import Tensor

import configs.optim as configs
from optim.norms import TINY, Frobenius, Spectral
from optim.rule import Hyper, Rule

FLAT = 1e-5  # a row with a smaller standard deviation, relative to its largest entry, is constant up to rounding


class SWAN(Rule):
    """SWAN (Ma et al. 2024, algorithm 1)."""

    config: configs.SWAN
    norm = Spectral()

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D = sqrt(m n) P / ||P||_F, float32 (K, m, n); zero if all rows of G are constant."""
        return Frobenius("rms").dual(whiten(standardise_rows(grad.float()), steps=self.config.whiten_steps))


def standardise_rows(G_Kmn: Tensor) -> Tensor:
    """Return each row minus its mean, over its standard deviation, (K, m, n); constant rows become zero."""
    G = G_Kmn / G_Kmn.abs().amax(dim=-1, keepdim=True).clamp_min(TINY)
    G = G - G.mean(dim=-1, keepdim=True)
    deviation = G.square().mean(dim=-1, keepdim=True).sqrt()
    return torch.where(deviation > FLAT, G / deviation.clamp_min(FLAT), 0)


def whiten(S_Kmn: Tensor, *, steps: int) -> Tensor:
    """Return (S S^T)^(-1/2) S, float32 (K, m, n), by `steps` Newton-Schulz iterations X <- X (3 - X^T X) / 2."""
    tall = S_Kmn.size(-2) > S_Kmn.size(-1)
    X = S_Kmn.mT if tall else S_Kmn
    # ||S S^T||_F^(1/2) is at least the spectral norm of S, and much closer to it than ||S||_F, which saves iterations.
    X = X / (X @ X.mT).norm(dim=(-2, -1), keepdim=True).sqrt().clamp_min(TINY)
    for _ in range(steps):
        X = torch.baddbmm(X, X @ X.mT, X, beta=1.5, alpha=-0.5)
    return X.mT if tall else X
