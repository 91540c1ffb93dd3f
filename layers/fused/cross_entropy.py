"""Softcapped cross-entropy in one visit to each row of logits: the loss and its gradient together.

The row's log-sum-exp is accumulated block by block under a running maximum (Milakov & Gimelshein 2018, arXiv 1805.02867),
then the gradient (softmax(y) - onehot) dy/dz is written while the row is still in the cache; no float32 copy of the logits
is made. `linear_nats` has the head's product inside and keeps no logits at all: for uncapped logits that is what
torch.nn.functional.linear_cross_entropy does with LinearCrossEntropyOptions, which suffices there; it knows no softcap.

Shapes: N tokens, C model dimension, V padded vocabulary.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from layers.head import ASYMMETRIC, softcap

KINDS = ("none", "tanh", "rational", "sigmoid", "asymmetric")  # of layers/head.py, those that the kernel knows
BLOCK = 4096  # columns of a row at a time


def plain_nats(z_NV: Tensor, targets_N: Tensor, kind: str, c: float) -> Tensor:
    """The twin: summed cross-entropy in nats of the softcapped raw logits, 0-D, at least float32."""
    exact = torch.promote_types(z_NV.dtype, torch.float32)
    return F.cross_entropy(softcap(z_NV.to(exact), kind, c), targets_N, reduction="sum")


def family(kind: str, c: float) -> tuple[str, tuple[float, float, float, float]]:
    """The kernel's family of a softcap, one of KINDS, and its (height, shift, width, base).

    Of the sigmoids y = height sigmoid((z + shift) / width) + base is tanh one: c tanh(z / c) = 2c sigmoid(2z / c) - c.
    """
    if kind == "asymmetric":
        return "sigmoid", (*ASYMMETRIC, 0.0)
    if kind in ("tanh", "sigmoid"):
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
    def rows(z_ptr, targets_ptr, nats_ptr, grad_ptr, columns, height, shift, width, base,
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
        tl.store(nats_ptr + row, (log_total - own) * counts)
        if WITH_GRAD:
            for start in range(0, columns, BLOCK):
                index = start + tl.arange(0, BLOCK)
                z = tl.load(z_ptr + row * columns + index, mask=index < columns, other=0.0).to(tl.float32)
                y, slope = cap(z, height, shift, width, base, FAMILY)
                grad = (tl.exp(y - log_total) - tl.where(index == target, 1.0, 0.0)) * slope * counts
                tl.store(grad_ptr + row * columns + index, grad.to(grad_ptr.dtype.element_ty), mask=index < columns)

    return rows


@torch.library.custom_op("steepest::nats_and_grad", mutates_args=())
def nats_and_grad(z_NV: Tensor, targets_N: Tensor, kind: str, c: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Each token's nats, (N,) float32, and their gradient by its raw logits, (N, V) in the logits' dtype; (0, V) unless
    `with_grad`. By the kernel: on CUDA, or in Triton's interpreter."""
    z_NV, targets_N = z_NV.contiguous(), targets_N.contiguous()
    rows, columns = z_NV.shape
    nats_N = torch.empty(rows, dtype=torch.float32, device=z_NV.device)
    grad_NV = z_NV.new_empty(rows if with_grad else 0, columns)
    name, numbers = family(kind, c)
    block = 1 << (min(BLOCK, columns) - 1).bit_length()
    row_kernel()[(rows,)](z_NV, targets_N, nats_N, grad_NV, columns, *numbers, FAMILY=name, WITH_GRAD=with_grad,
                          BLOCK=block, num_warps=8)
    return nats_N, grad_NV


@nats_and_grad.register_fake
def _(z_NV: Tensor, targets_N: Tensor, kind: str, c: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    del targets_N, kind, c
    return z_NV.new_empty(z_NV.size(0), dtype=torch.float32), z_NV.new_empty(z_NV.size(0) if with_grad else 0, z_NV.size(1))


class RowNats(torch.autograd.Function):
    """Nats of each row; the gradient by the logits is made in the forward pass and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z_NV: Tensor, targets_N: Tensor, kind: str, c: float,
                with_grad: bool) -> Tensor:
        """(N, V), (N,) -> (N,)."""
        nats_N, grad_NV = nats_and_grad(z_NV, targets_N, kind, c, with_grad)
        ctx.save_for_backward(grad_NV)
        return nats_N

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradient, each row times its upstream gradient."""
        grad_NV, = ctx.saved_tensors
        return (grad_NV * upstream_N[:, None]).to(grad_NV.dtype), None, None, None, None


def row_nats(z_NV: Tensor, targets_N: Tensor, kind: str, c: float) -> Tensor:
    """Cross-entropy in nats of each token: raw logits (N, V) and targets (N,) -> (N,) float32, 0 where ignored."""
    return RowNats.apply(z_NV, targets_N, kind, c, torch.is_grad_enabled() and z_NV.requires_grad)


class LinearNats(torch.autograd.Function):
    """Summed nats of softcap(h W^T); both gradients are gathered over chunks of tokens in the forward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor,
                cap_and_chunk: tuple[str, float, int]) -> Tensor:
        """(N, C), (V, C), (N,) -> 0-D float32. The weight's gradient is summed in float32 at least."""
        kind, c, chunk = cap_and_chunk
        weight = weight_VC.to(hidden_NC.dtype)
        grad_weight = torch.zeros_like(weight_VC, dtype=torch.promote_types(weight_VC.dtype, torch.float32))
        total = torch.zeros((), dtype=torch.float32, device=hidden_NC.device)
        grad_hidden = []
        for h, t in zip(hidden_NC.split(chunk), targets_N.split(chunk), strict=True):
            nats, grad_z = nats_and_grad(h @ weight.mT, t, kind, c, True)
            total += nats.sum()
            grad_hidden.append(grad_z @ weight)
            grad_weight += grad_z.mT @ h
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight.to(weight_VC.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times the upstream one."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return (grad_hidden * upstream).to(grad_hidden.dtype), (grad_weight * upstream).to(grad_weight.dtype), None, None


def linear_nats(hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, *, cap: tuple[str, float], chunk: int) -> Tensor:
    """Summed cross-entropy in nats of the head `weight_VC`, `chunk` tokens at a time: 0-D float32.

    `cap` is the softcap's kind and bound. The logits of one chunk, and their gradient, are all that ever exists; nothing is
    computed twice. Twin: `plain_nats(hidden @ weight.T, ...)`.
    """
    if torch.is_grad_enabled() and (hidden_NC.requires_grad or weight_VC.requires_grad):
        return LinearNats.apply(hidden_NC, weight_VC, targets_N, (*cap, chunk))
    weight = weight_VC.to(hidden_NC.dtype)
    parts = zip(hidden_NC.split(chunk), targets_N.split(chunk), strict=True)
    return sum(nats_and_grad(h @ weight.mT, t, *cap, False)[0].sum() for h, t in parts)
