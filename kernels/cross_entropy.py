"""Softcapped cross-entropy of logits: plain lines, and a Triton kernel that computes loss and gradient of a row together.

With raw logits z, softcapped logits y = softcap(z) and target t, the loss of a token is logsumexp(y) - y_t, in nats, and its
gradient dL/dz_j = (softmax(y)_j - [j = t]) dy_j/dz_j. The kernel reads a row of z twice. The first pass needs no row maximum
in advance: it sums exp(y - running maximum) block by block and rescales the sum when the maximum grows (Milakov & Gimelshein
2018, arXiv 1805.02867). The second pass writes the gradient, which needs the finished logsumexp; the row is still in the
cache then. So neither y nor softmax(y) nor a float32 copy of z is stored; the gradient is, in the dtype of z.

Both compute in float32. Raw logits keep the rounding of their dtype: bfloat16 has 8 significant bits, and only multiples of
1/16 between 8 and 16.

Shapes: N tokens, V vocabulary size (padded).
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ASYMMETRIC = (23.0, 5.0, 7.5)  # height, shift and width of the speedrun's sigmoid, 2025
BLOCK = 4096  # columns of a row that the kernel reads at a time; a power of two, not tuned yet


def softcap(z: Tensor, kind: str, c: float) -> Tensor:
    """Return bounded logits, elementwise.

    tanh: c tanh(z/c) and rational: c z / sqrt(z^2 + c^2) have slope 1 at 0 and lie between -c and c. asymmetric:
    23 sigmoid((z + 5) / 7.5) lies between 0 and 23 and does not use c. none: z.
    """
    if kind == "tanh":
        return c * torch.tanh(z / c)
    if kind == "rational":
        return c * z * (z * z + c * c).rsqrt()
    if kind == "asymmetric":
        height, shift, width = ASYMMETRIC
        return height * torch.sigmoid((z + shift) / width)
    return z


def softcap_cross_entropy(z_NV: Tensor, targets_N: Tensor, kind: str, c: float) -> Tensor:
    """Return the summed cross-entropy in nats of raw logits, 0-D, in float32 or their own dtype if that is higher.

    The plain twin of `fused_cross_entropy(...).sum()`; of negative targets it takes only -100.
    """
    exact = torch.promote_types(z_NV.dtype, torch.float32)
    return F.cross_entropy(softcap(z_NV.to(exact), kind, c), targets_N, reduction="sum")


def fused_cross_entropy(z_NV: Tensor, targets_N: Tensor, kind: str, c: float) -> Tensor:
    """Return each token's cross-entropy in nats, by the kernel: raw logits (N, V), targets (N,) -> (N,) float32.

    A negative target is ignored: its loss and gradient are 0.
    """
    # Asked here: within `forward` gradients are always off, and ctx.needs_input_grad is true even under no_grad.
    return FusedCrossEntropy.apply(z_NV, targets_N, kind, c, torch.is_grad_enabled() and z_NV.requires_grad)


class FusedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row, whose gradient by the logits is computed in the forward pass and scaled in the backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z_NV: Tensor, targets_N: Tensor, kind: str, c: float,
                with_grad: bool) -> Tensor:
        """(N, V), (N,) -> (N,) float32."""
        loss_N, grad_NV = cross_entropy_and_grad(z_NV, targets_N, kind, c, with_grad)
        ctx.save_for_backward(grad_NV)
        return loss_N

    # To autograd the stored gradient is a constant: without this mark second derivatives would be silently wrong.
    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        """Return the stored gradient, each row times its upstream gradient: (N,) -> (N, V)."""
        grad_NV, = ctx.saved_tensors
        # Compiled, this is one pass; in eager mode the product is a float32 temporary (N, V).
        return (grad_NV * upstream_N[:, None]).to(grad_NV.dtype), None, None, None, None


# A custom operator: torch.compile takes it as one call, whose shapes `register_fake` gives, and does not trace the kernel.
@torch.library.custom_op("steepest::cross_entropy_and_grad", mutates_args=())
def cross_entropy_and_grad(z_NV: Tensor, targets_N: Tensor, kind: str, c: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Return each token's cross-entropy in nats, (N,) float32, and its gradient by the raw logits, (N, V) in their dtype.

    Without `with_grad` the gradient is empty, (0, V). Runs the kernel: on CUDA, or in Triton's interpreter.
    """
    z_NV, targets_N = z_NV.contiguous(), targets_N.contiguous()
    rows, columns = z_NV.shape
    loss_N = torch.empty(rows, dtype=torch.float32, device=z_NV.device)
    grad_NV = z_NV.new_empty(rows if with_grad else 0, columns)
    family, coefficients = softcap_family(kind, c)
    block = 1 << (min(BLOCK, columns) - 1).bit_length()  # tl.arange needs a power of two
    row_kernel()[(rows,)](z_NV, targets_N, loss_N, grad_NV, columns, *coefficients, FAMILY=family, WITH_GRAD=with_grad,
                          BLOCK=block, num_warps=8)
    return loss_N, grad_NV


@cross_entropy_and_grad.register_fake
def _(z_NV: Tensor, targets_N: Tensor, kind: str, c: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    return z_NV.new_empty(z_NV.size(0), dtype=torch.float32), z_NV.new_empty(z_NV.size(0) if with_grad else 0, z_NV.size(1))


def softcap_family(kind: str, c: float) -> tuple[str, tuple[float, float, float, float]]:
    """Return the kernel's family of a softcap and its coefficients (height, shift, width, base).

    tanh and asymmetric are one family, y = height sigmoid((z + shift) / width) + base: c tanh(z/c) = 2c sigmoid(2z/c) - c.
    """
    if kind == "asymmetric":
        return "sigmoid", (*ASYMMETRIC, 0.0)
    if kind == "tanh":
        return "sigmoid", (2 * c, 0.0, c / 2, -c)
    return {"none": "identity", "rational": "rational"}[kind], (c, 0.0, 1.0, 0.0)


@functools.cache
def row_kernel() -> Callable:
    """Return the Triton kernel, with one program for each row. Defined at first use: Triton is optional."""
    global tl, softcap_and_slope  # Triton looks up the names in a kernel among the globals of its module
    import triton
    import triton.language as tl

    @triton.jit
    def softcap_and_slope(z, height, shift, width, base, FAMILY: tl.constexpr):
        """y = softcap(z) and dy/dz."""
        if FAMILY == "sigmoid":
            s = tl.sigmoid((z + shift) / width)
            y, slope = height * s + base, height / width * s * (1 - s)
        elif FAMILY == "rational":
            # y = z r with r = c / sqrt(z^2 + c^2), and dy/dz = r^3
            r = height * tl.rsqrt(z * z + height * height)
            y, slope = z * r, r * r * r
        else:
            y, slope = z, tl.full(z.shape, 1.0, tl.float32)
        return y, slope

    @triton.jit
    def rows(z_ptr, targets_ptr, loss_ptr, grad_ptr, columns, height, shift, width, base,
             FAMILY: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr):
        """Loss of one row and, WITH_GRAD, its gradient by z."""
        row = tl.program_id(0).to(tl.int64)  # row * columns exceeds 2^31 from 42,700 rows of 50,304 columns on
        target = tl.load(targets_ptr + row)
        counts = tl.where(target >= 0, 1.0, 0.0)
        # First pass: logsumexp(y), and y at the target.
        running_max = tl.full((), float("-inf"), tl.float32)
        exp_sum = tl.full((), 0.0, tl.float32)
        y_target = tl.full((), 0.0, tl.float32)
        for start in range(0, columns, BLOCK):
            index = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row * columns + index, mask=index < columns, other=0.0).to(tl.float32)
            y, _ = softcap_and_slope(z, height, shift, width, base, FAMILY)
            y_target += tl.sum(tl.where(index == target, y, 0.0))
            y = tl.where(index < columns, y, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(y))
            exp_sum = exp_sum * tl.exp(running_max - new_max) + tl.sum(tl.exp(y - new_max))
            running_max = new_max
        log_sum = running_max + tl.log(exp_sum)
        tl.store(loss_ptr + row, (log_sum - y_target) * counts)
        # Second pass: the gradient by z.
        if WITH_GRAD:
            for start in range(0, columns, BLOCK):
                index = start + tl.arange(0, BLOCK)
                z = tl.load(z_ptr + row * columns + index, mask=index < columns, other=0.0).to(tl.float32)
                y, slope = softcap_and_slope(z, height, shift, width, base, FAMILY)
                grad = (tl.exp(y - log_sum) - tl.where(index == target, 1.0, 0.0)) * slope * counts
                tl.store(grad_ptr + row * columns + index, grad.to(grad_ptr.dtype.element_ty), mask=index < columns)

    return rows
