"""The MLP's first half, max(x W^T, 0)^2: plain lines, and one Triton kernel that does not store the pre-activation x W^T.

Only the result is saved for the backward pass, which the next layer saves anyway: its root is max(x W^T, 0), all that the
gradient needs (speedrun, 2025). The loop over tiles resembles that of kernels/symmetric.py. The two differ in grid, operands
and epilogue; what they share is five lines, and each is readable alone.

Shapes: N tokens, C inputs, M outputs.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = {"ROWS": 128, "COLUMNS": 128, "INNER": 64}  # fits the registers of Hopper: a test compiles it without spills


def plain_linear_relu2(x: Tensor, weight_MC: Tensor) -> Tensor:
    """Return max(x W^T, 0)^2, the plain twin: (..., C), (M, C) -> (..., M)."""
    return F.relu(F.linear(x, weight_MC.to(x.dtype))).square()


def linear_relu2(x: Tensor, weight_MC: Tensor, bias: None = None) -> Tensor:
    """Compute `plain_linear_relu2` by the kernel, with the signature of F.linear; the weight is cast to x's dtype."""
    assert bias is None  # `choose_paths` gives models with biases the plain path
    y_NM = LinearReLU2.apply(x.reshape(-1, x.size(-1)), weight_MC.to(x.dtype))
    return y_NM.view(*x.shape[:-1], -1)


class LinearReLU2(torch.autograd.Function):
    """max(x W^T, 0)^2, which saves x, W and the result for the backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_NC: Tensor, weight_MC: Tensor) -> Tensor:
        """(N, C), (M, C) -> (N, M)."""
        y_NM = linear_relu2_forward(x_NC, weight_MC)
        ctx.save_for_backward(x_NC, weight_MC, y_NM)
        return y_NM

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients p W by x, (N, C), and p^T x by W, (M, C), with p = 2 max(x W^T, 0) upstream."""
        x_NC, weight_MC, y_NM = ctx.saved_tensors
        # The root halves the relative rounding error of y, so that it is as exact as a stored max(x W^T, 0).
        p_NM = 2 * y_NM.sqrt() * upstream_NM
        return p_NM @ weight_MC, p_NM.mT @ x_NC


@torch.library.custom_op("steepest::linear_relu2", mutates_args=())
def linear_relu2_forward(x_NC: Tensor, weight_MC: Tensor) -> Tensor:
    """(N, C), (M, C) of the same dtype -> (N, M), summed in float32. Runs on CUDA, or in Triton's interpreter."""
    x_NC, weight_MC = x_NC.contiguous(), weight_MC.contiguous()
    (rows, inner), columns = x_NC.shape, len(weight_MC)
    y_NM = x_NC.new_empty(rows, columns)
    grid = (-(-rows // TILE["ROWS"]), -(-columns // TILE["COLUMNS"]))  # rounded up: tiles at the edges are masked
    tile_kernel()[grid](x_NC, weight_MC, y_NM, rows, columns, inner, **TILE, num_warps=8, num_stages=3)
    return y_NM


@linear_relu2_forward.register_fake
def _(x_NC: Tensor, weight_MC: Tensor) -> Tensor:
    return x_NC.new_empty(x_NC.size(0), weight_MC.size(0))


@functools.cache
def tile_kernel() -> Callable:
    """Return the Triton kernel, with one program for each tile of the output. Defined at first use: Triton is optional."""
    global tl  # Triton looks up the names in a kernel among the globals of its module
    import triton
    import triton.language as tl

    @triton.jit
    def tile(x_ptr, w_ptr, y_ptr, rows, columns, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr):
        """One tile of y = max(x w^T, 0)^2, ROWS x COLUMNS."""
        # int64: offsets i * columns can exceed 2^31. j stands as a column to index rows of W, and is transposed for y.
        i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        j = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, inner, INNER):
            k = start + tl.arange(0, INNER)[None, :]
            x = tl.load(x_ptr + i * inner + k, mask=(i < rows) & (k < inner), other=0.0)
            w = tl.load(w_ptr + j * inner + k, mask=(j < columns) & (k < inner), other=0.0)
            total = tl.dot(x, tl.trans(w), total, input_precision="ieee")  # no TF32: float32 inputs stay exact
        r = tl.maximum(total, 0.0)
        j = tl.trans(j)
        tl.store(y_ptr + i * columns + j, (r * r).to(y_ptr.dtype.element_ty), mask=(i < rows) & (j < columns))

    return tile
