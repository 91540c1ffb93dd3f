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

from configs.schema import Model

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNED = 16  # cuBLAS wants the sizes of 8-bit operands to be multiples of this


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale that brings `largest` to the format's greatest number, 0-D float32; of 0 it is 1."""
    largest = largest.float()
    return torch.where(largest > 0, largest, torch.finfo(dtype).max) / torch.finfo(dtype).max


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """round(x / scale) in the 8-bit `dtype`; what exceeds the format saturates."""
    greatest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-greatest, greatest).to(dtype)


def product(A: Tensor, B: Tensor, scale_a: Tensor, scale_b: Tensor, *, out: torch.dtype) -> Tensor:
    """scale_a scale_b A B^T of 8-bit A (N, C) and B (M, C), both row-major -> (N, M) in dtype `out`."""
    return F.scaled_mm(A, B.mT, scale_a, ScalingType.TensorWise, scale_b, ScalingType.TensorWise, output_dtype=out)


def plain_product(A: Tensor, B: Tensor, scale_a: Tensor, scale_b: Tensor, *, out: torch.dtype) -> Tensor:
    """The twin of `product`: dequantised to float32, then multiplied."""
    return ((A.float() * scale_a) @ (B.float() * scale_b).mT).to(out)


def aligned(x: Tensor) -> Tensor:
    """Rows of zeros appended up to a multiple of ALIGNED: as a summed dimension they add nothing."""
    missing = -len(x) % ALIGNED
    return F.pad(x, (0, 0, 0, missing)) if missing else x


class Fp8Linear(torch.autograd.Function):
    """x W^T in e4m3; the gradients by e5m2 products if `largest_grad` is given, else by plain ones."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_NC: Tensor, weight_MC: Tensor, scales: tuple[Tensor, Tensor],
                grad_scale: "GradientScale | None") -> Tensor:
        """(N, C), (M, C) of one dtype -> (N, M) in that dtype."""
        scale_x, scale_w = scales
        x8, w8 = quantise(x_NC, scale_x, FORWARD), quantise(weight_MC, scale_w, FORWARD)
        ctx.grad_scale, ctx.dtype = grad_scale, x_NC.dtype
        ctx.save_for_backward(*((x8, w8, scale_x, scale_w) if grad_scale else (x_NC, weight_MC)))
        return product(x8, w8, scale_x, scale_w, out=x_NC.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_NM: Tensor) -> tuple[Tensor | None, ...]:
        """By x: g W, by W: g^T x."""
        if ctx.grad_scale is None:
            x_NC, weight_MC = ctx.saved_tensors
            return grad_NM @ weight_MC, grad_NM.mT @ x_NC, None, None
        x8, w8, scale_x, scale_w = ctx.saved_tensors
        scale = ctx.grad_scale(grad_NM)
        g8 = quantise(grad_NM, scale, BACKWARD)
        by_x = product(g8, w8.mT.contiguous(), scale, scale_w, out=ctx.dtype)
        by_w = product(aligned(g8).mT.contiguous(), aligned(x8).mT.contiguous(), scale, scale_x, out=torch.float32)
        return by_x, by_w.to(ctx.dtype), None, None


class GradientScale:
    """Scale of a gradient: by its greatest entry, or by `largest` where that is set."""

    def __init__(self, largest: float | None) -> None:
        self.largest = largest

    def __call__(self, grad: Tensor) -> Tensor:
        """0-D float32."""
        return scale_of(grad.abs().amax() if self.largest is None else grad.new_tensor(self.largest), BACKWARD)


class Fp8Product(nn.Module):
    """A linear map's product, in place of F.linear, with the scales of `config.fp8_scales`.

    Head and MLP differ as in the speedrun: the head's gradients are 8-bit too, the MLP's are not.
    """

    def __init__(self, config: Model, *, gradients: bool) -> None:
        super().__init__()
        self.kind = config.fp8_scales
        self.static = (config.fp8_x_max, config.fp8_weight_max)
        self.headroom = (config.fp8_x_headroom, config.fp8_weight_headroom)
        self.grad_scale = GradientScale(config.fp8_grad_max) if gradients else None
        self.register_buffer("previous", torch.zeros(2), persistent=False)  # greatest |x| and |W| of the last pass

    def forward(self, x: Tensor, weight_MC: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., C), (M, C), (M,) -> (..., M)."""
        if not torch.is_grad_enabled():
            return F.linear(x, weight_MC, bias)
        y = Fp8Linear.apply(x.reshape(-1, x.size(-1)), weight_MC, self.scales(x.detach(), weight_MC.detach()),
                            self.grad_scale)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    @torch.no_grad()
    def scales(self, x: Tensor, weight_MC: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of input and weight, 0-D float32 each; delayed ones remember this pass's greatest entries for the next."""
        if self.kind == "static":
            scale_x, scale_w = scale_of(self.previous.new_tensor(self.static), FORWARD)
            return scale_x, scale_w
        now = torch.stack((x.abs().amax(), weight_MC.abs().amax())).float()
        largest = now
        if self.kind == "delayed":
            largest = torch.where(self.previous > 0, self.previous * self.previous.new_tensor(self.headroom), now)
            self.previous.copy_(now)
        scale_x, scale_w = scale_of(largest, FORWARD)
        return scale_x, scale_w
