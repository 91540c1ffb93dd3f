"""Symmetric products with half of the work: the kernel equals its plain twin and is used where it pays."""

import importlib.util

import pytest
import torch

from kernels import symmetric
from kernels.symmetric import device_has_kernel, gram_polynomial, symmetric_product, uses_kernel
from tests.kernels.machine_code import SHARED_BYTES, compile_kernel, needs_triton
from tests.kernels.twins import gaussian


@needs_triton
@pytest.mark.parametrize("capability", [90, 89, 80])
@pytest.mark.parametrize("with_y", [True, False])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_kernel_fits_the_gpu(capability, with_y, tmp_path, monkeypatch):
    """Compiled without a GPU: no spilled registers, shared memory within the limit, tensor cores on Hopper."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = symmetric.tile_kernel(), symmetric.TILE | {"alpha": 0.5, "beta": -1.5}
    constants |= {} if with_y else {"y_ptr": None}
    types = dict.fromkeys(("x_ptr", "y_ptr", "out_ptr"), "*bf16") | {"m": "i32", "n": "i32"}
    code = compile_kernel(kernel, capability, types, constants, num_warps=8, num_stages=3)
    assert code.spilled_bytes == 0 and code.shared_bytes <= SHARED_BYTES[capability]
    assert capability < 90 or "wgmma.mma_async" in code.ptx


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_tensors_take_the_plain_products(dtype):
    X = gaussian(2, 300, 20).to(dtype)
    assert not uses_kernel(X)
    A = X.double() @ X.double().mT
    torch.testing.assert_close(gram_polynomial(X.double(), -2.0, 0.5), -2 * A + 0.5 * A @ A)
    assert gram_polynomial(X, -2.0, 0.5).dtype == dtype


@pytest.mark.parametrize(("capability", "triton", "expected"), [((7, 5), True, False), ((8, 0), True, True),
                                                                ((9, 0), True, True), ((9, 0), False, False)])
def test_devices_with_the_kernel(capability, triton, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    assert device_has_kernel(torch.device("cuda")) == expected
    assert not device_has_kernel(torch.device("cpu")) and not device_has_kernel(torch.device("mps"))


@pytest.mark.parametrize(("shape", "dtype", "expected"), [((1, 256, 8), torch.bfloat16, True),
                                                          ((1, 255, 800), torch.bfloat16, False),
                                                          ((1, 256, 8), torch.float32, False)])
def test_the_kernel_is_used_for_large_matrices_in_bfloat16(shape, dtype, expected, monkeypatch):
    monkeypatch.setattr(symmetric, "device_has_kernel", lambda device: True)
    assert uses_kernel(torch.empty(shape, dtype=dtype)) == expected


def test_the_choice_compiles_into_one_graph():
    X = gaussian(1, 256, 16).bfloat16()
    compiled = torch.compile(lambda X: gram_polynomial(X, 0.5, 0.1), backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), gram_polynomial(X, 0.5, 0.1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [(12, 768, 768), (3, 768, 3072), (2, 300, 700)])
def test_the_kernel_on_the_gpu(shape):
    X = gaussian(*shape).bfloat16().cuda()
    A = symmetric_product(X, None, 1.0, 0.0)
    twin = X.double() @ X.double().mT
    assert ((A.double() - twin).norm() / twin.norm()).item() < 0.005
    result, twin = symmetric_product(A, A, 0.5, -2.0).double(), -2 * A.double() + 0.5 * A.double() @ A.double()
    assert ((result - twin).norm() / twin.norm()).item() < 0.005
