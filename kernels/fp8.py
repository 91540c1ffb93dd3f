"""Matrix products in 8-bit floats: e4m3 (up to 448, 3 bits of mantissa) forward, e5m2 (up to 57344, 2 bits) for gradients.

A tensor is stored as round(x / s) with one scale s, as large as brings its greatest entry to the format's (Micikevicius et
al. 2022, arXiv 2209.05433); the product of two such is summed in float32 and multiplied by both scales. Where the greatest
entry comes from is the choice: a setting (static), this tensor (dynamic), or the previous pass with headroom (delayed).
Training alone is quantised: without gradients, in validation and sampling, the product is the plain one.

Shapes: N tokens, C inputs, M outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from configs.model import Model

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNED = 16  # cuBLAS wants the sizes of 8-bit operands to be multiples of this


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale that brings `largest` to the format's greatest number, 0-D float32; of 0 it is 1."""
    largest, greatest = largest.float(), torch.finfo(dtype).max
    return torch.where(largest > 0, largest, greatest) / greatest


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """round(x / scale) in the 8-bit `dtype`; what exceeds the format saturates."""
    greatest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-greatest, greatest).to(dtype)


def plain_product(A: Tensor, B: Tensor, scale_a: Tensor, scale_b: Tensor, *, out: torch.dtype) -> Tensor:
    """`product` in plain lines: dequantised to float32, then multiplied."""
    return ((A.float() * scale_a) @ (B.float() * scale_b).mT).to(out)


def product(A: Tensor, B: Tensor, scale_a: Tensor, scale_b: Tensor, *, out: torch.dtype, fast: bool = False) -> Tensor:
    """scale_a scale_b A B^T of 8-bit A (N, C) and B (M, C), both row-major -> (N, M) in dtype `out`.

    `fast` lets Hopper's tensor cores sum in less than float32.
    """
    return F.scaled_mm(A, B.mT, scale_a, ScalingType.TensorWise, scale_b, ScalingType.TensorWise, output_dtype=out,
                       use_fast_accum=fast)


def aligned(x: Tensor) -> Tensor:
    """Rows of zeros appended up to a multiple of ALIGNED: as a summed dimension they add nothing."""
    missing = -len(x) % ALIGNED
    return F.pad(x, (0, 0, 0, missing)) if missing else x


class Fp8Linear(torch.autograd.Function):
    """x W^T in e4m3. Gradients: by plain products where `grad_max` is None; else by e5m2 ones, scaled for entries up to
    `grad_max`, or, where that is 0, up to the greatest that comes."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_NC: Tensor, weight_MC: Tensor, scale_x: Tensor,
                scale_w: Tensor, grad_max: float | None) -> Tensor:
        """(N, C), (M, C) of one dtype -> (N, M) in that dtype."""
        x8, w8 = quantise(x_NC, scale_x, FORWARD), quantise(weight_MC, scale_w, FORWARD)
        ctx.grad_max, ctx.dtype = grad_max, x_NC.dtype
        ctx.save_for_backward(*((x_NC, weight_MC) if grad_max is None else (x8, w8, scale_x, scale_w)))
        return product(x8, w8, scale_x, scale_w, out=x_NC.dtype, fast=True)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_NM: Tensor) -> tuple[Tensor | None, ...]:
        """By x: g W, by W: g^T x."""
        if ctx.grad_max is None:
            x_NC, weight_MC = ctx.saved_tensors
            return grad_NM @ weight_MC, grad_NM.mT @ x_NC, None, None, None
        x8, w8, scale_x, scale_w = ctx.saved_tensors
        scale = scale_of(grad_NM.new_full((), ctx.grad_max) if ctx.grad_max else grad_NM.abs().amax(), BACKWARD)
        g8 = quantise(grad_NM, scale, BACKWARD)
        by_x = product(g8, w8.mT.contiguous(), scale, scale_w, out=ctx.dtype)
        by_w = product(aligned(g8).mT.contiguous(), aligned(x8).mT.contiguous(), scale, scale_x, out=torch.float32)
        return by_x, by_w.to(ctx.dtype), None, None, None


class Scaling(nn.Module):
    """The e4m3 scale of one tensor of each pass, for entries up to `static` (static), up to this tensor's greatest
    (dynamic), or up to `headroom` times the previous one's greatest (delayed; at first this one's).

    The previous one is no part of a checkpoint: a resumed run starts from its first tensor anew.
    """

    def __init__(self, kind: str, *, static: float, headroom: float) -> None:
        super().__init__()
        self.kind, self.static, self.headroom = kind, static, headroom
        self.register_buffer("previous", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """0-D float32; a delayed one remembers this tensor's greatest entry for the next pass."""
        if self.kind == "static":
            return scale_of(x.new_full((), self.static, dtype=torch.float32), FORWARD)
        now = x.abs().amax().float()
        if self.kind == "dynamic":
            return scale_of(now, FORWARD)
        scale = scale_of(torch.where(self.previous > 0, self.previous * self.headroom, now), FORWARD)
        self.previous.copy_(now)
        return scale


class Fp8Product(nn.Module):
    """A linear map's product, in place of F.linear, with the scales of `config.fp8_scales`.

    The speedrun's head has 8-bit `gradients` too, its MLP has not. C and M should be multiples of ALIGNED.
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
