"""The l_p norm of vectors, (|x_1|^p + ... + |x_r|^p)^(1/p): its dual and its projection, for a stack of vectors (..., r).

For singular values, and so for entries that are not negative; p may be anything from 1 to infinity.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

BISECTIONS = 56  # halve an interval to float64's resolution
NEGLIGIBLE = 1e-12  # of the largest entry: smaller ones count as zero


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
