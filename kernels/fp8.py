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

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from configs.model import Model
from kernels.cross_entropy import GRADIENT_8_BIT, Softcap, loss_and_grad, steepest_slope
from kernels.operators import triton_operator, wrap_triton

FORWARD, BACKWARD = torch.float8_e4m3fn, GRADIENT_8_BIT
ALIGNED = 16  # cuBLAS requires the sizes of 8-bit operands to be multiples of this
SIDE = 128  # rows and columns of a tile that is transposed at a time


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
    # Not F.scaled_mm: torch 2.11 cannot trace it.
    return torch._scaled_mm(A, B.mT, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)


# ---- Transposed copies --------------------------------------------------------------------------------------------------
#
# 8-bit tensor cores take the summed dimension as the contiguous one of both operands, so that the products of the backward
# pass need transposed copies.


def transpose(x_MN: Tensor, multiple: int = 1) -> Tensor:
    """Return a row-major x^T by the kernel, (M, N) -> (N, M') in the same 8-bit dtype: M' is M rounded up to `multiple`, by
    columns of zeros, which add nothing to a sum over them. The plain twin is F.pad(x, ...).mT.contiguous()."""
    if not torch.compiler.is_compiling():  # define_operators has done it before
        define_operator()
    return torch.ops.steepest.transpose(x_MN, multiple)


@functools.cache
def define_operator() -> None:
    """Define torch.ops.steepest.transpose, which launches the kernel on CUDA or in Triton's interpreter."""
    tile = tile_kernel()

    def transpose(x_MN: Tensor, multiple: int) -> Tensor:
        y_NM, (rows, columns) = output(x_MN, multiple), x_MN.shape
        grid = (-(-y_NM.size(1) // SIDE), -(-columns // SIDE))
        wrap_triton(tile)[grid](x_MN.contiguous(), y_NM, rows, columns, y_NM.size(1), SIDE=SIDE, num_warps=8)
        return y_NM

    def output(x_MN: Tensor, multiple: int) -> Tensor:
        return x_MN.new_empty(x_MN.size(1), -(-x_MN.size(0) // multiple) * multiple)

    triton_operator("steepest::transpose", transpose, shapes=output)


@functools.cache
def tile_kernel() -> Callable:
    """Return the Triton kernel, with one program for each tile. Defined at first use: Triton is optional."""
    global tl  # Triton looks up the names in a kernel among the globals of its module
    import triton
    import triton.language as tl

    @triton.jit
    def tile(x_ptr, y_ptr, rows, columns, padded_rows, SIDE: tl.constexpr):
        """One tile of y = x^T, SIDE x SIDE."""
        i = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)[:, None]
        j = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)[None, :]
        x = tl.load(x_ptr + i * columns + j, mask=(i < rows) & (j < columns), other=0.0)
        tl.store(y_ptr + tl.trans(j) * padded_rows + tl.trans(i), tl.trans(x),
                 mask=tl.trans((i < padded_rows) & (j < columns)))

    return tile


# ---- Head and loss in one function --------------------------------------------------------------------------------------


class Fp8Head(nn.Module):
    """`head_cross_entropy` in 8-bit floats, forward and backward, with the scales of the config."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.cap = Softcap(config.softcap, config.softcap_value)
        self.scale_x, self.scale_w = scalings(config, config.fp8_scales)
        # No entry of the gradient is larger than the weights of all losses times the steepest slope of the softcap.
        bound = (1 + sum(config.mtp_weights) + config.prefix_loss) * steepest_slope(self.cap)
        self.grad_scale = (config.fp8_grad_max or bound) / torch.finfo(BACKWARD).max

    def forward(self, x_NC: Tensor, weight_VC: Tensor, targets_KN: Tensor, weights_K: Tensor) -> Tensor:
        """(N, C), (V, C), (K, N), (K,) -> the summed loss in nats, 0-D float32."""
        scales = self.scale_x(x_NC), self.scale_w(weight_VC)
        return Fp8HeadCrossEntropy.apply(x_NC, weight_VC, *scales, targets_KN, weights_K, self.cap, self.grad_scale)


class Fp8HeadCrossEntropy(torch.autograd.Function):
    """HeadCrossEntropy with operands in e4m3. The kernel writes the gradient by the logits in e5m2: its scale is known in
    advance, because it holds for upstream factor 1. The factor is a part of the scales of the backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_NC: Tensor, weight_VC: Tensor, scale_x: Tensor, scale_w: Tensor,
                targets_KN: Tensor, weights_K: Tensor, cap: Softcap, grad_scale: float) -> Tensor:
        """(N, C), (V, C), two 0-D scales, (K, N), (K,) -> 0-D float32."""
        x8, w8 = quantise(x_NC, scale_x, FORWARD), quantise(weight_VC, scale_w, FORWARD)
        z_NV = product(x8, w8, scale_x, scale_w, dtype=x_NC.dtype, fast=True)
        loss_N, g8 = loss_and_grad(z_NV, targets_KN, weights_K, cap, with_grad=True, grad_scale=grad_scale)
        ctx.save_for_backward(x8, w8, g8, scale_x, scale_w)
        ctx.grad_scale, ctx.dtypes = grad_scale, (x_NC.dtype, weight_VC.dtype)
        return loss_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients g W by x, (N, C), and g^T x by W, (V, C)."""
        x8, w8, g8, scale_x, scale_w = ctx.saved_tensors
        scale_g, (x_dtype, weight_dtype) = upstream.float() * ctx.grad_scale, ctx.dtypes
        by_x = product(g8, transpose(w8), scale_g, scale_w, dtype=x_dtype)
        by_w = product(transpose(g8, ALIGNED), transpose(x8, ALIGNED), scale_g, scale_x, dtype=weight_dtype)
        return by_x, by_w, None, None, None, None, None, None


# ---- Linear maps --------------------------------------------------------------------------------------------------------


class Fp8Linear(torch.autograd.Function):
    """x W^T in e4m3, with gradients by plain products."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_NC: Tensor, weight_MC: Tensor, scale_x: Tensor,
                scale_w: Tensor) -> Tensor:
        """(N, C), (M, C) of the same dtype -> (N, M) in that dtype."""
        ctx.save_for_backward(x_NC, weight_MC)
        x8, w8 = quantise(x_NC, scale_x, FORWARD), quantise(weight_MC, scale_w, FORWARD)
        return product(x8, w8, scale_x, scale_w, dtype=x_NC.dtype, fast=True)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_NM: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients g W by x, (N, C), and g^T x by W, (M, C)."""
        x_NC, weight_MC = ctx.saved_tensors
        return grad_NM @ weight_MC, grad_NM.mT @ x_NC, None, None


class Fp8Product(nn.Module):
    """A replacement of F.linear in the MLP; C and M are multiples of ALIGNED. Settings for static scales are the head's:
    with them the MLP's scales are delayed, as in the speedrun."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.scale_x, self.scale_w = scalings(config, "delayed" if config.fp8_scales == "static" else config.fp8_scales)

    def forward(self, x: Tensor, weight_MC: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., C), (M, C), (M,) -> (..., M)."""
        if not torch.is_grad_enabled():
            return F.linear(x, weight_MC, bias)
        x_NC = x.reshape(-1, x.size(-1))
        y_NM = Fp8Linear.apply(x_NC, weight_MC, self.scale_x(x_NC), self.scale_w(weight_MC))
        y = y_NM.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


# ---- Scales -------------------------------------------------------------------------------------------------------------


class Scaling(nn.Module):
    """The e4m3 scale of a tensor that comes once per pass.

    `kind` static: for entries up to `static`; dynamic: up to the tensor's largest entry; delayed: up to `headroom` times the
    largest entry of the previous pass, or, in the first pass, of this one. Checkpoints do not contain the previous largest
    entry: a resumed run begins with a first pass.
    """

    def __init__(self, kind: str, *, static: float, headroom: float) -> None:
        super().__init__()
        self.kind, self.headroom = kind, headroom
        self.register_buffer("static", scale_of(torch.tensor(static), FORWARD), persistent=False)
        self.register_buffer("previous_max", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the scale of x, 0-D float32; delayed, also store the largest entry of x for the next pass."""
        if self.kind == "static":
            return self.static
        largest = x.abs().amax().float()
        if self.kind == "dynamic":
            return scale_of(largest, FORWARD)
        scale = scale_of(torch.where(self.previous_max > 0, self.previous_max * self.headroom, largest), FORWARD)
        self.previous_max.copy_(largest)
        return scale


def scalings(config: Model, kind: str) -> tuple[Scaling, Scaling]:
    """Return the scales of a product's input and of its weight."""
    return (Scaling(kind, static=config.fp8_x_max, headroom=config.fp8_x_headroom),
            Scaling(kind, static=config.fp8_weight_max, headroom=config.fp8_weight_headroom))


def reset_scales(model: nn.Module) -> None:
    """Forget the largest entries of earlier passes, in place: the next pass under delayed scales is a first one."""
    for module in model.modules():
        if isinstance(module, Scaling):
            module.previous_max.zero_()
