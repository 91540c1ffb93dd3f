"""Symmetric matrix products with half of the work: only tiles on and below the diagonal are computed.

X X^T is symmetric, so that tile (j, i) is the transpose of tile (i, j); the kernel computes one of them and stores both.
Newton-Schulz spends its time in A = X X^T and in b A + c A^2. Both are beta Y + alpha X X^T with a symmetric Y, since
A^2 = A A^T (speedrun, 2025).

Shapes: K stacked matrices, m rows, n columns.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.operators import triton_operator, wrap_triton

TILE = {"SIDE": 128, "INNER": 64}
LEAST_ROWS = 256  # two tiles per side; smaller products run in one wave of programs, and half the work takes as long


# Constant during a run: with this mark torch.compile does not trace the queries, which would break the graph.
@torch.compiler.assume_constant_result
def device_has_kernel(device: torch.device) -> bool:
    """True if the device can run the kernel: CUDA of compute capability 8.0 or later, with Triton installed."""
    return (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
            and importlib.util.find_spec("triton") is not None)


def uses_kernel(X_Kmn: Tensor) -> bool:
    """True if the kernel is used for this tensor: large matrices in bfloat16 on a device that can run it."""
    return X_Kmn.dtype == torch.bfloat16 and X_Kmn.size(-2) >= LEAST_ROWS and device_has_kernel(X_Kmn.device)


def gram_polynomial(X_Kmn: Tensor, b: float, c: float) -> Tensor:
    """Return b A + c A^2 of the Gram matrix A = X X^T: (K, m, n) -> (K, m, m); by the kernel, or by its plain twin below."""
    if X_Kmn.is_cuda and uses_kernel(X_Kmn):
        A_Kmm = symmetric_product(X_Kmn, None, 1.0, 0.0)
        return symmetric_product(A_Kmm, A_Kmm, c, b)
    A_Kmm = X_Kmn @ X_Kmn.mT
    return torch.baddbmm(A_Kmm, A_Kmm, A_Kmm, beta=b, alpha=c)


@functools.cache
def tile_kernel() -> Callable:
    """Return the Triton kernel, with one program for each tile. Defined at first use: Triton is optional."""
    global tl  # Triton looks up the names in a kernel among the globals of its module
    import triton
    import triton.language as tl

    @triton.jit
    def tile(x_ptr, y_ptr, out_ptr, m, n, alpha: tl.constexpr, beta: tl.constexpr,
             SIDE: tl.constexpr, INNER: tl.constexpr):
        """One tile of out = alpha x x^T + beta y, SIDE x SIDE, and its mirror image."""
        # Programs above the diagonal return at once: their tile is the transpose of one below.
        if tl.program_id(1) > tl.program_id(0):
            return
        batch = tl.program_id(2).to(tl.int64)
        x_ptr, out_ptr = x_ptr + batch * m * n, out_ptr + batch * m * m
        # This tile of X X^T: the product of rows i and rows j of X.
        i = tl.program_id(0) * SIDE + tl.arange(0, SIDE)[:, None]
        j = tl.program_id(1) * SIDE + tl.arange(0, SIDE)[:, None]
        total = tl.zeros((SIDE, SIDE), dtype=tl.float32)
        for start in range(0, n, INNER):
            k = start + tl.arange(0, INNER)[None, :]
            left = tl.load(x_ptr + i * n + k, mask=(i < m) & (k < n), other=0.0)
            right = tl.load(x_ptr + j * n + k, mask=(j < m) & (k < n), other=0.0)
            total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
        # alpha X X^T + beta Y, stored at (i, j) and, transposed, at (j, i). Programs on the diagonal store their tile twice.
        j = tl.trans(j)
        inside = (i < m) & (j < m)
        total = alpha * total
        if y_ptr is not None:
            total += beta * tl.load(y_ptr + batch * m * m + i * m + j, mask=inside, other=0.0).to(tl.float32)
        out = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + i * m + j, out, mask=inside)
        tl.store(out_ptr + tl.trans(j) * m + tl.trans(i), tl.trans(out), mask=tl.trans(inside))

    return tile


def symmetric_product(X_Kmn: Tensor, Y_Kmm: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Return beta Y + alpha X X^T with a symmetric Y (None: 0): (K, m, n), (K, m, m) -> (K, m, m), summed in float32.

    Runs the kernel: on CUDA, or in Triton's interpreter.
    """
    define_operator()
    Y_Kmm = None if Y_Kmm is None else Y_Kmm.contiguous()
    return torch.ops.steepest.symmetric_product(X_Kmn.contiguous(), Y_Kmm, alpha, beta)


@torch.compiler.assume_constant_result  # not traced, but called at once: the operator must exist before its graph
def define_operator() -> None:
    """Define torch.ops.steepest.symmetric_product, at the first call."""
    kernel = tile_kernel()

    def symmetric_product(X_Kmn: Tensor, Y_Kmm: Tensor | None, alpha: float, beta: float) -> Tensor:
        out_Kmm, (count, m, n) = shape(X_Kmn, Y_Kmm, alpha, beta), X_Kmn.shape
        tiles = -(-m // TILE["SIDE"])
        wrap_triton(kernel)[(tiles, tiles, count)](X_Kmn, Y_Kmm, out_Kmm, m, n, alpha, beta, **TILE, num_warps=8,
                                                   num_stages=3)
        return out_Kmm

    def shape(X_Kmn: Tensor, Y_Kmm: Tensor | None, alpha: float, beta: float) -> Tensor:
        del Y_Kmm, alpha, beta
        return X_Kmn.new_empty(X_Kmn.size(0), X_Kmn.size(1), X_Kmn.size(1))

    triton_operator("steepest::symmetric_product", symmetric_product, shapes=shape)
