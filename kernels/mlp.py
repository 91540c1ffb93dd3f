"""The MLP with ReLU^2, W_down max(W_up x, 0)^2: plain lines, and a Triton kernel for the products around the hidden layer.

Only y = max(W_up x, 0)^2 is saved for the backward pass: its root is max(W_up x, 0), all that the gradient needs (speedrun,
2025). With the output's gradient g, the gradient before the activation is p = 2 sqrt(y) (g W_down). The kernel multiplies
the product's tiles by the factor, so that g W_down itself, as large as y, is never stored. Forward and backward are the same
loop over tiles with another last line. The other products are cuBLAS's.

In 8-bit floats (`Fp8ReLU2MLP`) both products of the forward pass are in e4m3, the backward pass is as above. Each tensor is
quantised where it is computed, so that no pass over memory is added: tokens and weights row by row, each with its own
largest entry; y within the kernel, whose scale must be known before and therefore comes from the previous pass.

Shapes: N tokens, C model dimension, M hidden width, P programs.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.fp8 import FORWARD, plain_product, product, quantise, scale_of
from kernels.operators import triton_operator, wrap_triton

# Tiles of the output, ROWS x COLUMNS, and the stages of the pipeline of loads, each INNER_BYTES of the summed dimension:
# LARGE for the data-centre GPUs Hopper and Blackwell with 227 KB of shared memory, SMALL for all others (Ada has 99 KB).
LARGE = {"ROWS": 128, "COLUMNS": 256, "INNER_BYTES": 128, "num_stages": 3}
SMALL = {"ROWS": 128, "COLUMNS": 128, "INNER_BYTES": 128, "num_stages": 3}
ALIGNED = 16  # sizes must be multiples of it: the hardware loads tiles whose rows begin at multiples of 16 bytes


def plain_relu2_mlp(x: Tensor, up_MC: Tensor, down_CM: Tensor) -> Tensor:
    """Return W_down max(W_up x, 0)^2, the plain twin: (..., C), (M, C), (C, M) -> (..., C)."""
    return F.linear(F.relu(F.linear(x, up_MC)).square(), down_CM)


def relu2_mlp(x: Tensor, up_MC: Tensor, down_CM: Tensor) -> Tensor:
    """Compute `plain_relu2_mlp` by the kernels; all of one dtype."""
    return ReLU2MLP.apply(x.reshape(-1, x.size(-1)), up_MC, down_CM).view(x.shape)


class ReLU2MLP(torch.autograd.Function):
    """W_down max(W_up x, 0)^2, which saves its inputs and y for the backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_NC: Tensor, up_MC: Tensor, down_CM: Tensor) -> Tensor:
        """(N, C), (M, C), (C, M) -> (N, C)."""
        y_NM = relu2_product(x_NC, up_MC)
        ctx.save_for_backward(x_NC, up_MC, down_CM, y_NM)
        return y_NM @ down_CM.mT

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream_NC: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients by x, W_up and W_down."""
        return gradients(upstream_NC, *ctx.saved_tensors)


def gradients(upstream_NC: Tensor, x_NC: Tensor, up_MC: Tensor, down_CM: Tensor, y_NM: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients by x, (N, C), W_up, (M, C), and W_down, (C, M), from the gradient of the output, (N, C)."""
    p_NM = relu2_backward(upstream_NC, down_CM, y_NM)
    return p_NM @ up_MC, p_NM.mT @ x_NC, upstream_NC.mT @ y_NM


def plain_relu2_product(x_NC: Tensor, up_MC: Tensor) -> Tensor:
    """Return y = max(x W^T, 0)^2, the plain twin of `relu2_product`: (N, C), (M, C) -> (N, M)."""
    return F.relu(x_NC @ up_MC.mT).square()


def relu2_product(x_NC: Tensor, up_MC: Tensor) -> Tensor:
    """Compute `plain_relu2_product` by the kernel, summed in float32. On CUDA, or in Triton's interpreter."""
    define_operators()
    return torch.ops.steepest.relu2_product(x_NC.contiguous(), up_MC.contiguous())


def plain_relu2_backward(upstream_NC: Tensor, down_CM: Tensor, y_NM: Tensor) -> Tensor:
    """Return p = 2 sqrt(y) (upstream W_down), the plain twin of `relu2_backward`: (N, C), (C, M), (N, M) -> (N, M)."""
    # The root halves the relative rounding error of y, so that it is as exact as a stored max(W_up x, 0).
    return 2 * y_NM.sqrt() * (upstream_NC @ down_CM)


def relu2_backward(upstream_NC: Tensor, down_CM: Tensor, y_NM: Tensor) -> Tensor:
    """Compute `plain_relu2_backward` by the kernel, summed in float32."""
    define_operators()
    return torch.ops.steepest.relu2_backward(upstream_NC.contiguous(), down_CM.contiguous(), y_NM)


# ---- In 8-bit floats -----------------------------------------------------------------------------------------------------


class Fp8ReLU2MLP(nn.Module):
    """`relu2_mlp` with both products of the forward pass in e4m3, in training; validation is exact.

    The scale of y is for entries up to `headroom` times the largest of the previous pass, and 1 in the first, which covers
    y up to 448. Checkpoints do not contain it: a resumed run begins with a first pass.
    """

    def __init__(self, headroom: float) -> None:
        super().__init__()
        self.headroom = headroom
        self.register_buffer("scale", torch.ones(()), persistent=False)
        self.register_buffer("one", torch.ones(()), persistent=False)

    def forward(self, x: Tensor, up_MC: Tensor, down_CM: Tensor) -> Tensor:
        """(..., C), (M, C), (C, M) -> (..., C)."""
        if not torch.is_grad_enabled():
            return relu2_mlp(x, up_MC, down_CM)
        out_NC, maxima = Fp8Products.apply(x.reshape(-1, x.size(-1)), up_MC, down_CM, self.scale, self.one)
        with torch.no_grad():
            self.scale.copy_(scale_of(maxima.amax() * self.headroom, FORWARD))
        return out_NC.view(x.shape)


class Fp8Products(torch.autograd.Function):
    """W_down max(W_up x, 0)^2 in e4m3, with the gradients of ReLU2MLP: rounding counts as the identity."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_NC: Tensor, up_MC: Tensor, down_CM: Tensor, scale: Tensor,
                one: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C), (M, C), (C, M), the scale of y and 1, 0-D each -> (N, C), and the largest y of each program, (P,)."""
        (x8_NC, scale_N), (up8_MC, scale_M), (down8_CM, scale_C) = map(quantise_rows, (x_NC, up_MC, down_CM))
        y_NM, y8_NM, maxima_P = relu2_product_fp8(x8_NC, up8_MC, scale_N, scale_M, scale, x_NC.dtype)
        out_NC = product(y8_NM, down8_CM, scale, one, dtype=x_NC.dtype, fast=True)
        ctx.save_for_backward(x_NC, up_MC, down_CM, y_NM)
        ctx.mark_non_differentiable(maxima_P)
        # cuBLAS takes one scale for each operand; the scales of W_down's rows become those of the output's columns.
        return (out_NC * scale_C).to(x_NC.dtype), maxima_P

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream_NC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients by x, W_up and W_down."""
        return *gradients(upstream_NC, *ctx.saved_tensors), None, None


def quantise_rows(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in e4m3, (N, C), and the scale of each row, for its own largest entry: (N,) float32."""
    scale_N = scale_of(x_NC.abs().amax(dim=1), FORWARD)
    return quantise(x_NC, scale_N[:, None], FORWARD), scale_N


def plain_fp8_mlp(x_NC: Tensor, up_MC: Tensor, down_CM: Tensor, scale: Tensor) -> Tensor:
    """Return what Fp8ReLU2MLP computes in training, with `scale` for y: the plain twin, (N, C) -> (N, C)."""
    (x8_NC, scale_N), (up8_MC, scale_M), (down8_CM, scale_C) = map(quantise_rows, (x_NC, up_MC, down_CM))
    _, y8_NM = plain_relu2_product_fp8(x8_NC, up8_MC, scale_N, scale_M, scale, x_NC.dtype)
    return plain_product(y8_NM, down8_CM, scale, scale_C[:, None], dtype=x_NC.dtype)


def plain_relu2_product_fp8(x8_NC: Tensor, up8_MC: Tensor, scale_N: Tensor, scale_M: Tensor, scale: Tensor,
                            dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return y and its e4m3 copy, the plain twin of `relu2_product_fp8`: (N, C), (M, C) -> (N, M) twice."""
    y_NM = F.relu(plain_product(x8_NC, up8_MC, scale_N[:, None], scale_M[:, None], dtype=torch.float32)).square().to(dtype)
    return y_NM, quantise(y_NM, scale, FORWARD)


def relu2_product_fp8(x8_NC: Tensor, up8_MC: Tensor, scale_N: Tensor, scale_M: Tensor, scale: Tensor,
                      dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `plain_relu2_product_fp8` by the kernel; also return the largest y of each program, (P,) float32."""
    define_operators()
    return torch.ops.steepest.relu2_product_fp8(x8_NC, up8_MC, scale_N, scale_M, scale, dtype)


# ---- The kernel ----------------------------------------------------------------------------------------------------------


def fits(dim: int, hidden: int) -> bool:
    """True if the kernel can load matrices of these sizes."""
    return dim % ALIGNED == 0 and hidden % ALIGNED == 0


def tile_sizes(device: torch.device) -> dict[str, int]:
    """Return the tiles for a device."""
    has_large = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return LARGE if has_large else SMALL


def program_count(out_NM: Tensor) -> int:
    """Return the number of programs that compute `out_NM`: one for each multiprocessor, and not more than tiles."""
    tile, device = tile_sizes(out_NM.device), out_NM.device
    count = -(-out_NM.size(0) // tile["ROWS"]) * -(-out_NM.size(1) // tile["COLUMNS"])
    return min(count, torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4)


@torch.compiler.assume_constant_result  # not traced, but called at once: operators must exist before their graph
def define_operators() -> None:
    """Define the operators that launch the kernel in torch.ops.steepest, at the first call."""
    import triton

    kernel = tile_kernel()

    def launch(left: Tensor, right: Tensor, out_NM: Tensor, *others: Tensor | None, BACKWARD: bool) -> None:
        # The kernel keeps its descriptors in memory that Triton asks for at each launch.
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=left.device))
        tile, inner = tile_sizes(left.device), left.size(1)
        wrap_triton(kernel)[(program_count(out_NM),)](
            left, right, out_NM, *others, len(left), out_NM.size(1), inner, BACKWARD=BACKWARD, ROWS=tile["ROWS"],
            COLUMNS=tile["COLUMNS"], INNER=tile["INNER_BYTES"] // left.itemsize, num_warps=8, num_stages=tile["num_stages"])

    def relu2_product(x_NC: Tensor, up_MC: Tensor) -> Tensor:
        y_NM = shape_of_product(x_NC, up_MC)
        launch(x_NC, up_MC, y_NM, *(None,) * 6, BACKWARD=False)
        return y_NM

    def relu2_backward(upstream_NC: Tensor, down_CM: Tensor, y_NM: Tensor) -> Tensor:
        p_NM = shape_of_gradient(upstream_NC, down_CM, y_NM)
        launch(upstream_NC, down_CM, p_NM, y_NM, *(None,) * 5, BACKWARD=True)
        return p_NM

    def relu2_product_fp8(x8_NC: Tensor, up8_MC: Tensor, scale_N: Tensor, scale_M: Tensor, scale: Tensor,
                          dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        y_NM, y8_NM, maxima_P = shapes_fp8(x8_NC, up8_MC, scale_N, scale_M, scale, dtype)
        launch(x8_NC, up8_MC, y_NM, None, y8_NM, scale_N, scale_M, scale, maxima_P, BACKWARD=False)
        return y_NM, y8_NM, maxima_P

    def shape_of_product(x_NC: Tensor, up_MC: Tensor) -> Tensor:
        return x_NC.new_empty(len(x_NC), len(up_MC))

    def shape_of_gradient(upstream_NC: Tensor, down_CM: Tensor, y_NM: Tensor) -> Tensor:
        del upstream_NC, down_CM
        return torch.empty_like(y_NM)

    def shapes_fp8(x8_NC: Tensor, up8_MC: Tensor, scale_N: Tensor, scale_M: Tensor, scale: Tensor,
                   dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        y_NM = x8_NC.new_empty(len(x8_NC), len(up8_MC), dtype=dtype)
        return y_NM, torch.empty_like(y_NM, dtype=FORWARD), scale_N.new_empty(program_count(y_NM))

    triton_operator("steepest::relu2_product", relu2_product, shapes=shape_of_product)
    triton_operator("steepest::relu2_backward", relu2_backward, shapes=shape_of_gradient)
    triton_operator("steepest::relu2_product_fp8", relu2_product_fp8, shapes=shapes_fp8)


@functools.cache
def tile_kernel() -> Callable:
    """Return the Triton kernel, each of whose P programs computes every P-th tile. Defined at first use: Triton is
    optional."""
    global tl  # Triton looks up the names in a kernel among the globals of its module
    import triton
    import triton.language as tl

    @triton.jit
    def relu2_tiles(left_ptr, right_ptr, out_ptr, y_ptr, out8_ptr, left_scale_ptr, right_scale_ptr, out8_scale_ptr,
                    maxima_ptr, rows, columns, inner, BACKWARD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    INNER: tl.constexpr):
        """Tiles of out = max(left right^T, 0)^2, or, BACKWARD, of out = 2 sqrt(y) (left right).

        With out8, the product is multiplied by a scale a row and one a column, out is also stored in e4m3, and the largest
        entry of this program's tiles in `maxima`.
        """
        # Descriptors: Hopper's TMA loads whole tiles by them, with zeros beyond the edges; elsewhere they become pointers.
        left = tl.make_tensor_descriptor(left_ptr, [rows, inner], [inner, 1], [ROWS, INNER])
        if BACKWARD:
            right = tl.make_tensor_descriptor(right_ptr, [inner, columns], [columns, 1], [INNER, COLUMNS])
        else:
            right = tl.make_tensor_descriptor(right_ptr, [columns, inner], [inner, 1], [COLUMNS, INNER])
        HALF: tl.constexpr = COLUMNS // 2
        out = tl.make_tensor_descriptor(out_ptr, [rows, columns], [columns, 1], [ROWS, HALF])
        if y_ptr is not None:
            y = tl.make_tensor_descriptor(y_ptr, [rows, columns], [columns, 1], [ROWS, HALF])
        if out8_ptr is not None:
            out8 = tl.make_tensor_descriptor(out8_ptr, [rows, columns], [columns, 1], [ROWS, HALF])
            out8_scale = tl.load(out8_scale_ptr)
        largest = 0.0
        across = tl.cdiv(columns, COLUMNS)
        for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0), flatten=True):
            i, j = (tile // across) * ROWS, (tile % across) * COLUMNS
            total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for k in range(0, inner, INNER):
                if BACKWARD:
                    total = tl.dot(left.load([i, k]), right.load([k, j]), total, input_precision="ieee")
                else:
                    total = tl.dot(left.load([i, k]), right.load([j, k]).T, total, input_precision="ieee")
            # Two halves, one after the other: a whole tile in float32 and its results do not fit the registers.
            halves = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, HALF)), (0, 2, 1)))
            for half in tl.static_range(2):
                part, at = halves[half], j + half * HALF
                if out8_ptr is not None:
                    row, column = i + tl.arange(0, ROWS), at + tl.arange(0, HALF)
                    part *= tl.load(left_scale_ptr + row, mask=row < rows, other=0.0)[:, None]
                    part *= tl.load(right_scale_ptr + column, mask=column < columns, other=0.0)[None, :]
                if BACKWARD:
                    result = (2 * tl.sqrt(y.load([i, at]).to(tl.float32)) * part).to(out_ptr.dtype.element_ty)
                else:
                    part = tl.maximum(part, 0.0)
                    result = (part * part).to(out_ptr.dtype.element_ty)
                out.store([i, at], result)
                if out8_ptr is not None:
                    exact = result.to(tl.float32)
                    out8.store([i, at], tl.minimum(exact / out8_scale, 448.0).to(tl.float8e4nv))
                    largest = tl.maximum(largest, tl.max(tl.max(exact, axis=1), axis=0))
        if out8_ptr is not None:
            tl.store(maxima_ptr + tl.program_id(0), largest)

    return relu2_tiles
