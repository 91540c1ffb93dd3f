"""Softcapped cross-entropy: in plain lines, and fused into one visit to each row of logits, loss and gradient together.

In the kernel the row's log-sum-exp is accumulated block by block under a running maximum (Milakov & Gimelshein 2018,
arXiv 1805.02867), then the gradient (softmax(y) - onehot) dy/dz is written while the row is still in the cache; no float32
copy of the logits is made.

Shapes: N tokens, V padded vocabulary.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ASYMMETRIC = (23.0, 5.0, 7.5)  # height, shift and width of the speedrun's sigmoid, 2025
BLOCK = 4096  # columns of a row that the kernel reads at a time


def softcap(z: Tensor, kind: str, c: float) -> Tensor:
    """Logits bounded by c in absolute value, with slope 1 at 0; `asymmetric` lies in (0, 23) whatever c."""
    if kind == "tanh":
        return c * torch.tanh(z / c)
    if kind == "rational":
        return c * z * (z * z + c * c).rsqrt()
    if kind == "asymmetric":
        height, shift, width = ASYMMETRIC
        return height * torch.sigmoid((z + shift) / width)
    return z


def softcap_cross_entropy(z_NV: Tensor, targets_N: Tensor, kind: str, c: float) -> Tensor:
    """Summed cross-entropy in nats of the softcapped raw logits, 0-D, in float32 at least."""
    exact = torch.promote_types(z_NV.dtype, torch.float32)
    return F.cross_entropy(softcap(z_NV.to(exact), kind, c), targets_N, reduction="sum")


def fused_cross_entropy(z_NV: Tensor, targets_N: Tensor, kind: str, c: float) -> Tensor:
    """The same for each token, by the kernel: raw logits (N, V) and targets (N,) -> (N,) float32, 0 where ignored."""
    return FusedCrossEntropy.apply(z_NV, targets_N, kind, c, torch.is_grad_enabled() and z_NV.requires_grad)


class FusedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row; the gradient by the logits is made in the forward pass and only scaled in the backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z_NV: Tensor, targets_N: Tensor, kind: str, c: float,
                with_grad: bool) -> Tensor:
        """(N, V), (N,) -> (N,)."""
        loss_N, grad_NV = cross_entropy_and_grad(z_NV, targets_N, kind, c, with_grad)
        ctx.save_for_backward(grad_NV)
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        """The stored gradient, each row times its upstream gradient."""
        grad_NV, = ctx.saved_tensors
        return (grad_NV * upstream_N[:, None]).to(grad_NV.dtype), None, None, None, None


@torch.library.custom_op("steepest::cross_entropy_and_grad", mutates_args=())
def cross_entropy_and_grad(z_NV: Tensor, targets_N: Tensor, kind: str, c: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Each token's cross-entropy in nats, (N,) float32, and its gradient by the raw logits, (N, V) in their dtype; (0, V)
    unless `with_grad`. By the kernel: on CUDA, or in Triton's interpreter."""
    z_NV, targets_N = z_NV.contiguous(), targets_N.contiguous()
    rows, columns = z_NV.shape
    loss_N = torch.empty(rows, dtype=torch.float32, device=z_NV.device)
    grad_NV = z_NV.new_empty(rows if with_grad else 0, columns)
    name, numbers = family(kind, c)
    block = 1 << (min(BLOCK, columns) - 1).bit_length()
    row_kernel()[(rows,)](z_NV, targets_N, loss_N, grad_NV, columns, *numbers, FAMILY=name, WITH_GRAD=with_grad,
                          BLOCK=block, num_warps=8)
    return loss_N, grad_NV


@cross_entropy_and_grad.register_fake
def _(z_NV: Tensor, targets_N: Tensor, kind: str, c: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    return z_NV.new_empty(z_NV.size(0), dtype=torch.float32), z_NV.new_empty(z_NV.size(0) if with_grad else 0, z_NV.size(1))


def family(kind: str, c: float) -> tuple[str, tuple[float, float, float, float]]:
    """The kernel's family of a softcap, and its (height, shift, width, base).

    Of the sigmoids y = height sigmoid((z + shift) / width) + base is tanh one: c tanh(z / c) = 2c sigmoid(2z / c) - c.
    """
    if kind == "asymmetric":
        return "sigmoid", (*ASYMMETRIC, 0.0)
    if kind == "tanh":
        return "sigmoid", (2 * c, 0.0, c / 2, -c)
    return {"none": "identity", "rational": "rational"}[kind], (c, 0.0, 1.0, 0.0)


@functools.cache
def row_kernel() -> Callable:
    """The Triton kernel, one program a row; defined at first use, so that Triton stays an optional import."""
    global tl, cap  # a kernel finds its names among its module's
    import triton
    import triton.language as tl

    @triton.jit
    def cap(z, height, shift, width, base, FAMILY: tl.constexpr):
        """y and dy/dz."""
        if FAMILY == "sigmoid":
            s = tl.sigmoid((z + shift) / width)
            y, slope = height * s + base, height / width * s * (1 - s)
        elif FAMILY == "rational":
            r = height * tl.rsqrt(z * z + height * height)
            y, slope = z * r, r * r * r
        else:
            y, slope = z, tl.full(z.shape, 1.0, tl.float32)
        return y, slope

    @triton.jit
    def rows(z_ptr, targets_ptr, loss_ptr, grad_ptr, columns, height, shift, width, base,
             FAMILY: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets_ptr + row)
        counts = tl.where(target >= 0, 1.0, 0.0)
        top = tl.full((), float("-inf"), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        own = tl.full((), 0.0, tl.float32)
        for start in range(0, columns, BLOCK):
            index = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row * columns + index, mask=index < columns, other=0.0).to(tl.float32)
            y, _ = cap(z, height, shift, width, base, FAMILY)
            own += tl.sum(tl.where(index == target, y, 0.0))
            y = tl.where(index < columns, y, float("-inf"))
            higher = tl.maximum(top, tl.max(y))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(y - higher))
            top = higher
        log_total = top + tl.log(total)
        tl.store(loss_ptr + row, (log_total - own) * counts)
        if WITH_GRAD:
            for start in range(0, columns, BLOCK):
                index = start + tl.arange(0, BLOCK)
                z = tl.load(z_ptr + row * columns + index, mask=index < columns, other=0.0).to(tl.float32)
                y, slope = cap(z, height, shift, width, base, FAMILY)
                grad = (tl.exp(y - log_total) - tl.where(index == target, 1.0, 0.0)) * slope * counts
                tl.store(grad_ptr + row * columns + index, grad.to(grad_ptr.dtype.element_ty), mask=index < columns)

    return rows
