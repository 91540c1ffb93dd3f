"""Compile a small graph for a pretended GPU and print its tallies: `python -m tests.gpu_free.small_graph CAPABILITY`.

The loss is the sum of (f(g(x W^T)) V^T)^2, where f and g double their input by a Triton kernel: g as an operator that
torch.compile does not look into, f as one whose kernel Inductor launches itself. What it does can be told by hand.
"""

import json
import sys

from tests.gpu_free.pretend import pretend

N, C, M, V = 1024, 256, 512, 128  # tokens, inputs, hidden, outputs
CAPABILITY = sys.argv[1]
pretend(CAPABILITY)

# ruff: noqa: E402
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import wrap_triton

from kernels.traffic import declare_bytes, tensor_bytes
from tests.gpu_free.replay import Recorder

BLOCK = 1024


@triton.jit
def doubled_block(x_ptr, y_ptr, SIZE: tl.constexpr):
    """y = 2 x, in one block of SIZE numbers."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i))


@torch.library.custom_op("steepest::opaque_double", mutates_args=())
def opaque_double(x: Tensor) -> Tensor:
    """Return 2 x."""
    y = torch.empty_like(x)
    doubled_block[(x.numel() // BLOCK,)](x, y, SIZE=BLOCK)
    return y


@opaque_double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.triton_op("steepest::open_double", mutates_args=())
def open_double(x: Tensor) -> Tensor:
    """Return 2 x."""
    y = torch.empty_like(x)
    wrap_triton(doubled_block)[(x.numel() // BLOCK,)](x, y, SIZE=BLOCK)
    return y


for operator in (opaque_double, open_double):
    operator.register_autograd(lambda context, grad: 2 * grad)
declare_bytes("doubled_block", lambda tensors: 3 * tensor_bytes(tensors[0]))  # not true: to see that it is asked


def main() -> None:
    """Compile, run on FakeTensors, print."""
    def loss(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        return (open_double(opaque_double(x @ w_up.mT)) @ w_down.mT).square().sum()

    with FakeTensorMode(), torch.autograd.set_multithreading_enabled(False), Recorder("own") as recorder:
        x, w_up, w_down = (torch.empty(shape, device="cuda", requires_grad=True) for shape in ((N, C), (M, C), (V, M)))
        recorder.take()
        before, compiled = recorder.memory.now, torch.compile(loss, fullgraph=True, dynamic=False)
        compiled(x, w_up, w_down).backward()
        kinds = {tally.kind: tally.as_json() for tally in recorder.take()}
        print(json.dumps({"graphs": len(recorder.compiled), "peak_bytes": recorder.memory.peak - before,
                          "held_bytes": recorder.memory.now - before, **kinds}))


if __name__ == "__main__":
    main()
