"""SWAN: the gradient standardised and whitened, with no memory at all."""

import torch
from torch import Tensor

import configs.optim as configs
from optim.norms import TINY, Frobenius, Spectral
from optim.rule import Hyper, Rule

FLAT = 1e-5  # a row that varies less than this, relative to its largest entry, is constant up to rounding


class SWAN(Rule):
    """D = sqrt(m n) P / ||P||_F, P = (S S^T)^(-1/2) S, with S the gradient whose rows are shifted to mean 0 and scaled to
    variance 1. Ma et al. 2024, arXiv 2412.13148, algorithm 1. D has RMS 1, like Adam's.

    For tall matrices P = S (S^T S)^(-1/2), which is the polar factor too: the smaller Gram matrix is inverted.
    """

    config: configs.SWAN
    norm = Spectral()

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """sqrt(m n) P / ||P||_F, zero where all rows of G are constant: float32 (K, m, n)."""
        whitened = whiten(standardise_rows(grad.float()), steps=self.config.whiten_steps)
        return Frobenius("rms").dual(whitened)


def standardise_rows(G_Kmn: Tensor) -> Tensor:
    """Each row minus its mean, over its standard deviation; a constant row becomes zero."""
    G = G_Kmn / G_Kmn.abs().amax(dim=-1, keepdim=True).clamp_min(TINY)
    G = G - G.mean(dim=-1, keepdim=True)
    deviation = G.square().mean(dim=-1, keepdim=True).sqrt()
    return torch.where(deviation > FLAT, G / deviation.clamp_min(FLAT), 0)


def whiten(S_Kmn: Tensor, *, steps: int) -> Tensor:
    """(S S^T)^(-1/2) S by Newton-Schulz, X <- X (3 - X^T X) / 2 from X_0 = S / ||S S^T||_F^(1/2); in float32.

    The paper's coupled iteration on Y = X X^T and Z, X = Z X_0, is the same in exact arithmetic; but where S S^T is
    singular, as centred rows make it for square and tall matrices, its errors grow by 2.25 a step, here by 1.5.
    """
    tall = S_Kmn.size(-2) > S_Kmn.size(-1)
    X = S_Kmn.mT if tall else S_Kmn
    X = X / (X @ X.mT).norm(dim=(-2, -1), keepdim=True).sqrt().clamp_min(TINY)
    for _ in range(steps):
        X = torch.baddbmm(X, X @ X.mT, X, beta=1.5, alpha=-0.5)
    return X.mT if tall else X
