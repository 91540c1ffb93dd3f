"""Look-ups in a table whose gradient is added row by row into the table's `.grad`.

Autograd's gradient of a look-up is dense: a new table of zeros with a few rows written, in float32 for a table in bfloat16,
which is then added to `.grad`. For the speedrun's tables that is twenty times the bytes of the rows themselves. Here the
ids are sorted, so that equal ones stand side by side; one program sums the rows of each distinct id in float32 and adds the
sum to its row of `.grad`, which is read and written once. Nothing has the table's size, and no sum depends on the order in
which programs run: the result is the same to the bit each time.

Shapes: V rows, C columns, N ids.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.operators import triton_operator, wrap_triton
from kernels.symmetric import device_has_kernel
from kernels.traffic import declare_bytes, tensor_bytes

TILE = {"ROWS": 16, "COLUMNS": 256}  # rows of one id that a program sums at a time


def rows(table_VC: Tensor, ids: Tensor, *, sparse: bool = False) -> Tensor:
    """Return the rows of the table by id, (V, C), (...) -> (..., C), in the table's dtype.

    On CUDA, while `.grad` of the table exists, the backward pass adds to it in place and gives autograd nothing: hooks on
    the table's gradient are not called, and torch.autograd.grad does not see it. Otherwise this is F.embedding, on CPUs
    with a sparse gradient if `sparse` (large tables) and `.grad` exists, to which autograd adds its rows in place.
    """
    into_grad = torch.is_grad_enabled() and table_VC.grad is not None
    if into_grad and table_VC.is_cuda and device_has_kernel(table_VC.device):
        return RowsIntoGrad.apply(table_VC, table_VC.grad, ids)
    # Inductor cannot compile sparse gradients.
    sparse = sparse and into_grad and table_VC.device.type == "cpu" and not torch.compiler.is_compiling()
    return F.embedding(ids, table_VC, sparse=sparse)


class RowsIntoGrad(torch.autograd.Function):
    """Rows of a table, whose gradient the backward pass adds into a buffer of the table's shape."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, table_VC: Tensor, grad_VC: Tensor, ids: Tensor) -> Tensor:
        """(V, C) twice, (...) -> (..., C)."""
        ctx.save_for_backward(ids)
        # Not saved for backward: other tables' gradients, in the same bank, change before this one is read.
        ctx.grad_VC = grad_VC
        return F.embedding(ids, table_VC)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[None, None, None]:
        """Add the gradient (..., C) to the buffer."""
        ids, = ctx.saved_tensors
        # In a compiled graph, tables that are looked up by the same ids share one sort.
        ids_N, order_N = ids.flatten().int().sort(stable=True)
        add_rows(ctx.grad_VC, ids_N, order_N, upstream.reshape(-1, upstream.size(-1)))
        return None, None, None


def plain_add_rows(grad_VC: Tensor, ids_N: Tensor, order_N: Tensor, upstream_NC: Tensor) -> None:
    """Add row `order_N[n]` of `upstream_NC` to row `ids_N[n]` of `grad_VC`, in place: the plain twin of `add_rows`."""
    total_VC = torch.zeros_like(grad_VC, dtype=torch.float32).index_add_(0, ids_N, upstream_NC[order_N].float())
    grad_VC.copy_(grad_VC + total_VC)


def add_rows(grad_VC: Tensor, ids_N: Tensor, order_N: Tensor, upstream_NC: Tensor) -> None:
    """Compute `plain_add_rows` by the kernel, for ids in ascending order: (V, C), (N,), (N,), (N, C). On CUDA, or in
    Triton's interpreter."""
    define_operator()
    torch.ops.steepest.add_rows(grad_VC, ids_N, order_N, upstream_NC.contiguous())


@torch.compiler.assume_constant_result  # not traced, but called at once: the operator must exist before its graph
def define_operator() -> None:
    """Define torch.ops.steepest.add_rows, at the first call."""
    kernel = run_kernel()

    def add_rows(grad_VC: Tensor, ids_N: Tensor, order_N: Tensor, upstream_NC: Tensor) -> None:
        count, columns = upstream_NC.shape
        grid = (count, -(-columns // TILE["COLUMNS"]))
        wrap_triton(kernel)[grid](grad_VC, ids_N, order_N, upstream_NC, count, columns, **TILE, num_warps=4)

    triton_operator("steepest::add_rows", add_rows, shapes=lambda *tensors: None, mutates=("grad_VC",))


@functools.cache
def run_kernel() -> Callable:
    """Return the Triton kernel, with one program for each id and block of columns. Defined at first use: Triton is
    optional."""
    global tl  # Triton looks up the names in a kernel among the globals of its module
    import triton
    import triton.language as tl

    # Of the table's gradient each row that is met is read and written once; at most as many rows as there are ids.
    declare_bytes("add_run", lambda tensors: sum(map(tensor_bytes, tensors[1:]))
                  + 2 * tensors[3].numel() * tensors[0].element_size())

    @triton.jit
    def add_run(grad_ptr, ids_ptr, order_ptr, upstream_ptr, count, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Add all rows of one id, of which this program's is the first; the programs of later ones return at once."""
        first = tl.program_id(0)
        this_id = tl.load(ids_ptr + first)
        if tl.load(ids_ptr + first - 1, mask=first > 0, other=-1) == this_id:
            return
        j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        grad_ptr += this_id.to(tl.int64) * columns + j
        grad = tl.load(grad_ptr, mask=j < columns, other=0.0)
        total = tl.zeros((COLUMNS,), dtype=tl.float32)
        start = first
        while start < count:
            n = start + tl.arange(0, ROWS)
            same = tl.load(ids_ptr + n, mask=n < count, other=-1) == this_id
            row = tl.load(order_ptr + n, mask=same, other=0)
            upstream = tl.load(upstream_ptr + row[:, None] * columns + j[None, :],
                               mask=same[:, None] & (j < columns)[None, :], other=0.0)
            total += tl.sum(upstream.to(tl.float32), axis=0)
            start = tl.where(tl.min(same.to(tl.int32), axis=0) == 1, start + ROWS, count)
        tl.store(grad_ptr, (grad.to(tl.float32) + total).to(grad_ptr.dtype.element_ty), mask=j < columns)

    return add_run
