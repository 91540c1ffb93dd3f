"""Look-ups whose gradients are added row by row: the kernel equals its plain twin, and CPUs keep autograd's gradients."""


import pytest
import torch
import torch.nn.functional as F

from kernels import embedding
from kernels.embedding import rows
from tests.kernels.machine_code import SHARED_BYTES, compile_kernel, needs_triton


@needs_triton
@pytest.mark.parametrize("capability", [90, 89, 80])
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_kernel_fits_the_gpu(capability, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"grad_ptr": dtype, "upstream_ptr": dtype, "ids_ptr": "*i32", "order_ptr": "*i64"} | dict.fromkeys(
        ("count", "columns"), "i32")
    code = compile_kernel(embedding.run_kernel(), capability, types, embedding.TILE, num_warps=4)
    assert code.spilled_bytes == 0 and code.shared_bytes <= SHARED_BYTES[capability]


@pytest.mark.parametrize("sparse", [False, True])
def test_on_cpus_autograd_adds_the_gradient(sparse):
    """The first time a dense gradient is made; then, with `sparse`, rows are added to it in place."""
    table, ids = torch.nn.Parameter(torch.randn(9, 4)), torch.tensor([[1, 8, 1]])
    for count in (1, 2):
        y = rows(table, ids, sparse=sparse)
        assert torch.equal(y, F.embedding(ids, table))
        y.sum().backward()
        assert table.grad.layout == torch.strided and table.grad[:, 0].tolist() == [0, 2 * count, *[0] * 6, count]
    with torch.no_grad():
        rows(table, ids, sparse=sparse)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_on_the_gpu(dtype):
    """The speedrun's sizes: two passes through a compiled look-up, compared with autograd's gradient in float64."""
    table = torch.nn.Parameter(torch.zeros(50304, 768, dtype=dtype, device="cuda"))
    table.grad = torch.zeros_like(table)
    view, twin = table.grad, torch.zeros(50304, 768, dtype=torch.float64, device="cuda")
    look_up = torch.compile(rows, fullgraph=True, dynamic=False)
    for _ in range(2):
        ids = (torch.rand(16384, device="cuda") ** 4 * 50304).long()
        upstream = torch.randn(16384, 768, device="cuda", dtype=dtype)
        look_up(table, ids).backward(upstream)
        twin.index_add_(0, ids, upstream.double())
    assert table.grad is view
    assert ((view.double() - twin).norm() / twin.norm()).item() < (0.005 if dtype == torch.bfloat16 else 1e-6)
