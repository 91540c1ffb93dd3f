"""Symmetric matrix products at half the work: each tile on or below the diagonal is computed once and stored twice.

Newton-Schulz spends its time in X X^T and b A + c A^2 with A symmetric. Both are one map, beta Y + alpha X X^T with Y
symmetric, since A^2 = A A^T (speedrun, 2025). Shapes: K stacked matrices, m rows, n columns.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

TILE = {"SIDE": 128, "INNER": 64}
LEAST_ROWS = 256  # two tiles a side: below, a whole product is one wave of work and there is nothing to save


@torch.compiler.assume_constant_result
def capable(device: torch.device) -> bool:
    """Whether the device runs the kernel: CUDA of compute capability 8.0 or later, with Triton installed."""
    return (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
            and importlib.util.find_spec("triton") is not None)


def has_kernel(X_Kmn: Tensor) -> bool:
    """Whether the half-work kernel serves this tensor: large matrices in bfloat16 on a capable device."""
    return X_Kmn.dtype == torch.bfloat16 and X_Kmn.size(-2) >= LEAST_ROWS and capable(X_Kmn.device)


def gram_polynomial(X_Kmn: Tensor, b: float, c: float) -> Tensor:
    """b A + c A^2 of the Gram matrix A = X X^T: (K, m, n) -> (K, m, m)."""
    if X_Kmn.is_cuda and has_kernel(X_Kmn):
        A_Kmm = symmetric_product(X_Kmn, None, 1.0, 0.0)
        return symmetric_product(A_Kmm, A_Kmm, c, b)
    A_Kmm = X_Kmn @ X_Kmn.mT
    return torch.baddbmm(A_Kmm, A_Kmm, A_Kmm, beta=b, alpha=c)


@functools.cache
def tile_kernel() -> Callable:
    """The Triton kernel, one program a tile; defined at first use, so that Triton stays an optional import."""
    global tl  # a kernel finds its names among its module's
    import triton
    import triton.language as tl

    @triton.jit
    def tile(x_ptr, y_ptr, out_ptr, m, n, alpha, beta, WITH_Y: tl.constexpr, SIDE: tl.constexpr, INNER: tl.constexpr):
        if tl.program_id(1) > tl.program_id(0):
            return
        batch = tl.program_id(2).to(tl.int64)
        x_ptr, out_ptr = x_ptr + batch * m * n, out_ptr + batch * m * m
        i = tl.program_id(0) * SIDE + tl.arange(0, SIDE)[:, None]
        j = tl.program_id(1) * SIDE + tl.arange(0, SIDE)[:, None]
        total = tl.zeros((SIDE, SIDE), dtype=tl.float32)
        for start in range(0, n, INNER):
            k = start + tl.arange(0, INNER)[None, :]
            left = tl.load(x_ptr + i * n + k, mask=(i < m) & (k < n), other=0.0)
            right = tl.load(x_ptr + j * n + k, mask=(j < m) & (k < n), other=0.0)
            total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
        j = tl.trans(j)
        inside = (i < m) & (j < m)
        total = alpha * total
        if WITH_Y:
            total += beta * tl.load(y_ptr + batch * m * m + i * m + j, mask=inside, other=0.0).to(tl.float32)
        out = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + i * m + j, out, mask=inside)
        tl.store(out_ptr + tl.trans(j) * m + tl.trans(i), tl.trans(out), mask=tl.trans(inside))

    return tile


@torch.library.custom_op("steepest::symmetric_product", mutates_args=())
def symmetric_product(X_Kmn: Tensor, Y_Kmm: Tensor | None, alpha: float, beta: float) -> Tensor:
    """beta Y + alpha X X^T, Y symmetric (None: 0): (K, m, n), (K, m, m) -> (K, m, m), summed in float32.

    By the kernel: on CUDA, or in Triton's interpreter.
    """
    X_Kmn, Y_Kmm = X_Kmn.contiguous(), None if Y_Kmm is None else Y_Kmm.contiguous()
    count, m, n = X_Kmn.shape
    out_Kmm = X_Kmn.new_empty(count, m, m)
    tiles = -(-m // TILE["SIDE"])
    tile_kernel()[(tiles, tiles, count)](X_Kmn, out_Kmm if Y_Kmm is None else Y_Kmm, out_Kmm, m, n, alpha, beta,
                                         WITH_Y=Y_Kmm is not None, **TILE, num_warps=8, num_stages=3)
    return out_Kmm


@symmetric_product.register_fake
def _(X_Kmn: Tensor, Y_Kmm: Tensor | None, alpha: float, beta: float) -> Tensor:
    del Y_Kmm, alpha, beta
    return X_Kmn.new_empty(X_Kmn.size(0), X_Kmn.size(1), X_Kmn.size(1))
