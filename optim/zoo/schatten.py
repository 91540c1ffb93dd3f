"""Schatten norms: the l_p norm of the singular values, (s_1^p + ... + s_r^p)^(1/p), p from 1 to infinity."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optim.constraint import Scope

BISECTIONS = 56  # halve an interval to float64's resolution
NEGLIGIBLE = 1e-12  # of the largest entry: smaller ones count as zero


@dataclass(frozen=True, slots=True)
class Schatten:
    """The l_p norm of the singular values: nuclear at p = 1, Frobenius at 2, spectral at infinity; by SVD, in float64.

    The dual U diag((s / ||s||_q)^(q - 1)) V^T, 1/p + 1/q = 1, flattens the spectrum of G the more, the larger p: not at
    all at 2 (normalised SGD), wholly at infinity (Muon). Unit `rms` takes the power mean of the singular values in place
    of their sum, each in the RMS -> RMS unit: a flat spectrum has the same size for every p, `rms_operator`'s.
    """

    p: float
    unit: Literal["plain", "rms"] = "plain"
    scope: Scope = "matrix"

    def scale(self, m: int, n: int) -> float:
        """l_p norm of the singular values of a tensor of size 1."""
        return {"plain": 1.0, "rms": (m / n) ** 0.5 * min(m, n) ** (1 / self.p)}[self.unit]

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """scale U diag(dual of the singular values) V^T."""
        return _on_spectrum(lambda s: lp_dual(s, self.p) * self.scale(*G_Kmn.shape[-2:]), G_Kmn)

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Singular values projected onto the l_p ball of radius `scale`."""
        scale = self.scale(*W_Kmn.shape[-2:])
        return _on_spectrum(lambda s: lp_project(s / scale, self.p) * scale, W_Kmn)

    def size(self, W_Kmn: Tensor) -> Tensor:
        """||singular values||_p / scale."""
        size = lp_size(torch.linalg.svdvals(W_Kmn.double()), self.p).squeeze(-1)
        return (size / self.scale(*W_Kmn.shape[-2:])).to(W_Kmn.dtype)


def _on_spectrum(change: Callable[[Tensor], Tensor], W_Kmn: Tensor) -> Tensor:
    """U diag(change(s)) V^T for W = U diag(s) V^T."""
    U, s, Vh = torch.linalg.svd(W_Kmn.double(), full_matrices=False)
    return ((U * change(s).unsqueeze(-2)) @ Vh).to(W_Kmn.dtype)


# ---- The l_p norm of stacked vectors (..., r) without negative entries ----------------------------------------------------


def lp_size(s: Tensor, p: float) -> Tensor:
    """||s||_p: (..., r) -> (..., 1), safe against over- and underflow."""
    top = s.amax(dim=-1, keepdim=True)
    return top * torch.linalg.vector_norm(s / top.where(top > 0, 1), ord=p, dim=-1, keepdim=True)


def lp_dual(s: Tensor, p: float) -> Tensor:
    """The x with ||x||_p = 1 that maximises <s, x>: (s / ||s||_q)^(q - 1) with 1/p + 1/q = 1; zero where s is zero.

    p = 2 is s / ||s||; at infinity all entries are 1; at 1 only the largest remains. Zero entries stay zero.
    """
    power = math.inf if p == 1 else 1 / (p - 1)  # q - 1
    s = s / s.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    x = s.pow(power).where(s > NEGLIGIBLE, 0)
    return x / lp_size(x, p).clamp_min(1)


def lp_project(s: Tensor, p: float) -> Tensor:
    """The nearest x with ||x||_p <= 1, by bisection; float64 wanted.

    Outside the ball x + t x^(p - 1) = s for the multiplier t > 0 at which ||x||_p = 1; as x <= (s/t)^(1/(p - 1)), it is
    at most r^(1 - 1/p) max s. For p = 1 that is the projection onto the simplex: x = max(s - t, 0).
    """
    if p == math.inf:
        return s.clamp_max(1)

    def at(t: Tensor) -> Tensor:
        return _bisect(lambda x: x + t * x.pow(p - 1) < s, torch.zeros_like(s), s)

    most = s.size(-1) ** (1 - 1 / p) * s.amax(dim=-1, keepdim=True)
    x = at(_bisect(lambda t: lp_size(at(t), p) > 1, torch.zeros_like(most), most))
    return torch.where(lp_size(s, p) > 1, x / lp_size(x, p).clamp_min(1), s)


def _bisect(is_below: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where `is_below` turns from true to false, between `low` and `high`, for each entry."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = is_below(middle)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
