"""Schatten norms: the l_p norm of the singular values s, ||W|| = (s_1^p + ... + s_r^p)^(1/p), 1 <= p <= infinity.

Nuclear norm at p = 1, Frobenius at 2, spectral at infinity. For G = U diag(s) V^T, with 1/p + 1/q = 1:

    dual(G)    = U diag((s / ||s||_q)^(q - 1)) V^T
    project(W) = U diag(nearest point to s of the l_p ball) V^T
    size(W)    = ||s||_p

The larger p, the flatter the spectrum of the dual: unchanged at p = 2 (normalised SGD), constant at infinity (Muon).
Each of them takes an SVD, in float64. Shapes: K matrices m x n in one stack; r = min(m, n) singular values.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optim.constraint import Scope

BISECTIONS = 56  # float64 has 53 significant bits
NEGLIGIBLE = 1e-12  # singular values below this share of the largest are rounding; at p = infinity their power 0 would be 1


@dataclass(frozen=True, slots=True)
class Schatten:
    """Schatten norm: the l_p norm of the singular values, in one of two units."""

    p: float
    """Exponent, from 1 (nuclear norm) to infinity (spectral norm)."""
    unit: Literal["plain", "rms"] = "plain"
    """plain: the norm itself. rms: the power mean of the singular values instead of their sum, each over (m/n)^.5, so that
    a flat spectrum has the same size for every p: that of `rms_operator`."""
    scope: Scope = "matrix"
    """Smallest part of a tensor with a dual of its own."""

    def scale(self, m: int, n: int) -> float:
        """Return ||s||_p of an m x n matrix of size 1."""
        return {"plain": 1.0, "rms": (m / n) ** 0.5 * min(m, n) ** (1 / self.p)}[self.unit]

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """Return the matrix of size 1 that maximises <G, .>, (K, m, n)."""
        return _map_spectrum(lambda s: lp_dual(s, self.p) * self.scale(*G_Kmn.shape[-2:]), G_Kmn)

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Return the nearest matrix of size at most 1, (K, m, n)."""
        scale = self.scale(*W_Kmn.shape[-2:])
        return _map_spectrum(lambda s: lp_project(s / scale, self.p) * scale, W_Kmn)

    def size(self, W_Kmn: Tensor) -> Tensor:
        """Return ||s||_p / scale of each matrix, (K,)."""
        size_K = lp_size(torch.linalg.svdvals(W_Kmn.double()), self.p).squeeze(-1)
        return (size_K / self.scale(*W_Kmn.shape[-2:])).to(W_Kmn.dtype)


def _map_spectrum(function: Callable[[Tensor], Tensor], W_Kmn: Tensor) -> Tensor:
    """Return U diag(function(s)) V^T for W = U diag(s) V^T; `function` maps (K, r) to (K, r)."""
    U, s, Vh = torch.linalg.svd(W_Kmn.double(), full_matrices=False)
    return ((U * function(s).unsqueeze(-2)) @ Vh).to(W_Kmn.dtype)


# ---- The l_p norm of stacked vectors (..., r) without negative entries ----------------------------------------------------


def lp_size(s: Tensor, p: float) -> Tensor:
    """Return ||s||_p, (..., r) -> (..., 1)."""
    # Entries are divided by the largest first, so that no power over- or underflows.
    top = s.amax(dim=-1, keepdim=True)
    return top * torch.linalg.vector_norm(s / top.where(top > 0, 1), ord=p, dim=-1, keepdim=True)


def lp_dual(s: Tensor, p: float) -> Tensor:
    """Return the x with ||x||_p = 1 that maximises <s, x>: (s / ||s||_q)^(q - 1), 1/p + 1/q = 1.

    At p = 2 it is s / ||s||, at infinity all ones, at 1 the largest entry alone. Zero entries stay zero.
    """
    power = math.inf if p == 1 else 1 / (p - 1)  # q - 1
    s = s / s.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    x = s.pow(power).where(s > NEGLIGIBLE, 0)
    return x / lp_size(x, p).clamp_min(1)


def lp_project(s: Tensor, p: float) -> Tensor:
    """Return the nearest x with ||x||_p <= 1, by two nested bisections; s should be float64.

    Outside the ball, x + t x^(p - 1) = s with the multiplier t > 0 for which ||x||_p = 1. As x <= (s/t)^(1/(p - 1)), t is
    at most r^(1 - 1/p) max s. For p = 1 it is the projection onto the simplex, x = max(s - t, 0).
    """
    if p == math.inf:
        return s.clamp_max(1)

    def solve_x(t: Tensor) -> Tensor:
        return _bisect(lambda x: x + t * x.pow(p - 1) < s, torch.zeros_like(s), s)

    largest_t = s.size(-1) ** (1 - 1 / p) * s.amax(dim=-1, keepdim=True)
    x = solve_x(_bisect(lambda t: lp_size(solve_x(t), p) > 1, torch.zeros_like(largest_t), largest_t))
    return torch.where(lp_size(s, p) > 1, x / lp_size(x, p).clamp_min(1), s)


def _bisect(is_below: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return, for each entry, the point between `low` and `high` at which `is_below` turns from true to false."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = is_below(middle)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
