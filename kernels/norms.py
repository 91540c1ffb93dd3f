"""RMS norm and unit vector, by one derivative in closed form.

Shapes: C is the last dimension, the model's or a head's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    if x.device.type != "cpu":
        return F.rms_norm(x, (x.size(-1),))
    return Normalise.apply(x, 1 / x.size(-1), torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension; zero vectors stay zero."""
    return Normalise.apply(x, 1.0, torch.finfo(torch.float32).tiny)


class Normalise(torch.autograd.Function):
    """y = x r with r = (s |x|^2 + eps)^-1/2 along the last dimension, and its derivative r (g - s y <g, y>), in float32.

    s = 1 / C is the RMS norm, s = 1 the unit vector. In closed form it takes half the time of autograd's on CPUs.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, s: float, eps: float) -> Tensor:
        """(..., C) -> (..., C)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        r = length.square_().mul_(s).add_(eps).rsqrt_()
        y = (x * r).to(x.dtype)
        ctx.save_for_backward(y, r)
        ctx.s = s
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient without (s = 1) or with less of (s < 1) its radial part, times r."""
        y, r = ctx.saved_tensors
        radial = (grad * y).sum(dim=-1, keepdim=True, dtype=r.dtype)
        return torch.addcmul(grad.to(r.dtype), y.to(r.dtype), radial, value=-ctx.s).mul_(r).to(grad.dtype), None, None
