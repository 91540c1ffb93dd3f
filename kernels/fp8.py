"""Matrix products in 8-bit floats (Micikevicius et al. 2022, arXiv 2209.05433), for training only.

Two formats: e4m3 has 3 bits of mantissa and reaches 448; e5m2 has 2 bits and reaches 57,344. Weights and activations use
e4m3, for its smaller rounding errors. Gradients use e5m2, since they spread over more orders of magnitude: its smallest
number above 0 is 2^-32 of the largest, that of e4m3 is 2^-18, below which gradients would become 0.

A tensor is stored as round(x / s) with one scale s for all entries, which maps the largest entry to the largest number of
the format. A product is summed in float32 and multiplied by both scales. The largest entry is a setting (static), that of
this tensor (dynamic), or that of the previous pass times a headroom (delayed: rounding need not wait for a maximum).
Validation and sampling compute without gradients, and use the plain product.

Shapes: N tokens, C inputs, M outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from configs.model import Model

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNED = 16  # cuBLAS requires the sizes of 8-bit operands to be multiples of this


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scale that maps `largest`, 0-D, to the largest number of `dtype`: 0-D float32; 1 if `largest` is 0."""
    largest, format_max = largest.float(), torch.finfo(dtype).max
    return torch.where(largest > 0, largest, format_max) / format_max  # on the device: an `if` would wait for it


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return round(x / scale) in the 8-bit `dtype`; entries beyond the format's largest number become that number."""
    format_max = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-format_max, format_max).to(dtype)  # else e5m2 gives inf


def plain_product(A: Tensor, B: Tensor, scale_a: Tensor, scale_b: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Compute `product` by its plain twin: dequantise to float32, then multiply."""
    return ((A.float() * scale_a) @ (B.float() * scale_b).mT).to(dtype)


def product(A: Tensor, B: Tensor, scale_a: Tensor, scale_b: Tensor, *, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """Return scale_a scale_b A B^T of 8-bit A (N, C) and B (M, C), both row-major: (N, M) in `dtype`.

    `fast` lets Hopper's tensor cores sum with fewer bits than float32.
    """
    return F.scaled_mm(A, B.mT, scale_a, ScalingType.TensorWise, scale_b, ScalingType.TensorWise, output_dtype=dtype,
                       use_fast_accum=fast)


def pad_rows(x: Tensor) -> Tensor:
    """Append rows of zeros up to a multiple of ALIGNED; in a sum over rows they add nothing."""
    missing = -len(x) % ALIGNED
    return F.pad(x, (0, 0, 0, missing)) if missing else x


class Fp8Linear(torch.autograd.Function):
    """x W^T in e4m3, with plain or 8-bit gradients.

    `grad_max` None: gradients by plain products. Else by e5m2, scaled for gradient entries up to `grad_max`, or, if that is
    0, up to the largest entry of this gradient.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_NC: Tensor, weight_MC: Tensor, scale_x: Tensor,
                scale_w: Tensor, grad_max: float | None) -> Tensor:
        """(N, C), (M, C) of the same dtype -> (N, M) in that dtype."""
        x8, w8 = quantise(x_NC, scale_x, FORWARD), quantise(weight_MC, scale_w, FORWARD)
        ctx.grad_max, ctx.dtype = grad_max, x_NC.dtype
        saved = (x_NC, weight_MC) if grad_max is None else (x8, w8, scale_x, scale_w)
        ctx.save_for_backward(*saved)
        return product(x8, w8, scale_x, scale_w, dtype=x_NC.dtype, fast=True)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_NM: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients g W by x, (N, C), and g^T x by W, (M, C)."""
        if ctx.grad_max is None:
            x_NC, weight_MC = ctx.saved_tensors
            return grad_NM @ weight_MC, grad_NM.mT @ x_NC, None, None, None
        x8, w8, scale_x, scale_w = ctx.saved_tensors
        largest = grad_NM.new_full((), ctx.grad_max) if ctx.grad_max else grad_NM.abs().amax()
        scale = scale_of(largest, BACKWARD)
        g8 = quantise(grad_NM, scale, BACKWARD)
        # Copies, since 8-bit tensor cores take the summed dimension as the contiguous one of both operands.
        by_x = product(g8, w8.mT.contiguous(), scale, scale_w, dtype=ctx.dtype)
        by_w = product(pad_rows(g8).mT.contiguous(), pad_rows(x8).mT.contiguous(), scale, scale_x, dtype=torch.float32)
        return by_x, by_w.to(ctx.dtype), None, None, None


class Scaling(nn.Module):
    """The e4m3 scale of a tensor that comes once per pass.

    `kind` static: for entries up to `static`; dynamic: up to the tensor's largest entry; delayed: up to `headroom` times the
    largest entry of the previous pass, or, in the first pass, of this one. Checkpoints do not contain the previous largest
    entry: a resumed run begins with a first pass.
    """

    def __init__(self, kind: str, *, static: float, headroom: float) -> None:
        super().__init__()
        self.kind, self.static, self.headroom = kind, static, headroom
        self.register_buffer("previous_max", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the scale of x, 0-D float32; delayed, also store the largest entry of x for the next pass."""
        if self.kind == "static":
            return scale_of(x.new_full((), self.static, dtype=torch.float32), FORWARD)
        largest = x.abs().amax().float()
        if self.kind == "dynamic":
            return scale_of(largest, FORWARD)
        scale = scale_of(torch.where(self.previous_max > 0, self.previous_max * self.headroom, largest), FORWARD)
        self.previous_max.copy_(largest)
        return scale


class Fp8Product(nn.Module):
    """A replacement of F.linear in 8-bit floats, with the scales of `config.fp8_scales`; C and M are multiples of ALIGNED.

    With `gradients` the backward pass is in 8-bit floats too: in the speedrun the head's is, the MLP's is not.
    """

    def __init__(self, config: Model, *, gradients: bool) -> None:
        super().__init__()
        self.scale_x = Scaling(config.fp8_scales, static=config.fp8_x_max, headroom=config.fp8_x_headroom)
        self.scale_w = Scaling(config.fp8_scales, static=config.fp8_weight_max, headroom=config.fp8_weight_headroom)
        self.grad_max = config.fp8_grad_max if gradients else None

    def forward(self, x: Tensor, weight_MC: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., C), (M, C), (M,) -> (..., M)."""
        if not torch.is_grad_enabled():
            return F.linear(x, weight_MC, bias)
        x_NC = x.reshape(-1, x.size(-1))
        y_NM = Fp8Linear.apply(x_NC, weight_MC, self.scale_x(x_NC), self.scale_w(weight_MC), self.grad_max)
        y = y_NM.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
