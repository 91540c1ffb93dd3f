"""SWAN: the gradient standardised and whitened, with no memory at all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import Group
from optim.norms import Norm, Spectral
from optim.rules.base import Hyper, Rule

TINY = torch.finfo(torch.float32).tiny
FLAT = 1e-5  # a row that varies less than this, relative to its largest entry, is constant up to rounding


@dataclass(frozen=True, slots=True)
class SWAN(Rule):
    """D = sqrt(m n) P / ||P||_F, P = (S S^T)^(-1/2) S, with S the gradient whose rows are shifted to mean 0 and scaled to
    variance 1. Ma et al. 2024, arXiv 2412.13148, algorithm 1. D has RMS 1, like Adam's.

    For tall matrices S (S^T S)^(-1/2), which is the same polar factor: the smaller Gram matrix is inverted.
    """

    steps: int
    norm: Norm = Spectral()

    @classmethod
    def build(cls, group: Group) -> "SWAN":
        """The rule that a group's configuration describes."""
        return cls(group.whiten_steps)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """None."""
        return {}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """sqrt(m n) P / ||P||_F, zero where all rows of G are constant: float32 (K, m, n)."""
        whitened = whiten(standardise_rows(grad.float()), steps=self.steps)
        size = whitened.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY)
        return whitened * ((grad.size(-2) * grad.size(-1)) ** 0.5 / size)


def standardise_rows(G_Kmn: Tensor) -> Tensor:
    """Each row minus its mean, over its standard deviation; a constant row becomes zero."""
    G = G_Kmn / G_Kmn.abs().amax(dim=-1, keepdim=True).clamp_min(TINY)
    G = G - G.mean(dim=-1, keepdim=True)
    deviation = G.square().mean(dim=-1, keepdim=True).sqrt()
    return torch.where(deviation > FLAT, G / deviation.clamp_min(FLAT), 0)


def whiten(S_Kmn: Tensor, *, steps: int) -> Tensor:
    """(S S^T)^(-1/2) S by the coupled Newton-Schulz iteration Y <- Y (3 - Z Y) / 2, Z <- (3 - Z Y) Z / 2, whose Z goes to
    Y_0^(-1/2) for Y_0 = S S^T / ||S S^T||_F (Higham 2008, equation 6.35); float32, as bfloat16 does not converge.
    """
    tall = S_Kmn.size(-2) > S_Kmn.size(-1)
    S = S_Kmn.mT if tall else S_Kmn
    Y = S @ S.mT
    size = Y.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY)
    Y, identity = Y / size, torch.eye(Y.size(-1), device=Y.device)
    Z = identity.expand_as(Y)
    for _ in range(steps):
        T = 1.5 * identity - 0.5 * (Z @ Y)
        Y, Z = Y @ T, T @ Z
    P = Z @ S / size.sqrt()
    return P.mT if tall else P
