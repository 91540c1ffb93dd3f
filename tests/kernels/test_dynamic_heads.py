"""Dynamic head composition: the kernels equal their plain twin, compile for GPUs, and are used where they fit."""

from dataclasses import replace

import pytest
import torch

import kernels
from configs.model import Model
from kernels import choose_paths, dynamic_heads
from kernels.dynamic_heads import fused_dynamic_heads
from model import GPT
from tests.kernels.machine_code import SHARED_BYTES, compile_kernel, needs_triton

CONFIG = Model(layers=2, dim=64, head_dim=16, document_mask=True, dynamic_heads=(1,), dynamic_window=20)


@needs_triton
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("window", [112, dynamic_heads.LONGEST_WINDOW])
@pytest.mark.parametrize("number", range(3), ids=["forward", "by_queries", "by_keys"])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_kernels_compile_for_gpus(number, window, capability, tmp_path, monkeypatch):
    """At the record's sizes, without a GPU: tensor cores, no spilled registers, and shared memory that exists."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = dynamic_heads.triton_kernels()[number]
    _, sizes = dynamic_heads.launch_sizes(torch.empty(1, 16_384, 6, 128, device="meta"), window)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    types = dict.fromkeys(kernel.arg_names, "*bf16") | {"first_ptr": "*i32", "T": "i32", "window": "i32"}
    types |= dict.fromkeys(("a_ptr", "logsum_ptr", "da_ptr"), "*fp32")
    code = compile_kernel(kernel, capability, types, sizes | {"scale": 0.1}, **options)
    assert "mma" in code.ptx and code.spilled_bytes == 0 and code.shared_bytes <= SHARED_BYTES[capability]


def build(config: Model) -> GPT:
    torch.manual_seed(0)
    return GPT(config, vocab_size=50, max_tokens=48, document_start=0, on_cuda=True, dtype=torch.bfloat16)


@pytest.mark.parametrize(("changes", "path"), [
    ({}, "triton"), ({"fused": "off"}, "plain"), ({"dynamic_heads": ()}, "plain"), ({"head_dim": 8}, "plain"),
    ({"dim": 96, "head_dim": 48}, "plain"), ({"dynamic_window": 242}, "plain"), ({"dynamic_window": 241}, "triton")])
def test_the_kernel_is_used_where_it_fits(changes, path, monkeypatch):
    monkeypatch.setattr(kernels, "device_paths", lambda device: kernels.Paths(dynamic_heads="triton"))
    config = replace(CONFIG, **changes)
    assert choose_paths(config, torch.device("cuda"), torch.bfloat16).dynamic_heads == path
    assert choose_paths(config, torch.device("cuda"), torch.float32).dynamic_heads == "plain"
    for block, layer in zip(build(config).blocks, range(2), strict=True):
        if layer in config.dynamic_heads:
            assert (block.attention.mix_heads is fused_dynamic_heads) == (path == "triton")


def test_nothing_of_the_size_of_attention_weights_is_saved():
    """For the backward pass: queries, keys, values, and numbers per head and token."""
    q, a = torch.empty(1, 256, 4, 16, device="meta", requires_grad=True), torch.empty(1, 256, 4, device="meta")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        fused_dynamic_heads((q, q, q), (a, a), first_BT=None, window=112, scale=0.1)
    assert saved and max(saved) == q.numel()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("window", [16, 112, 200])
def test_the_kernels_on_the_gpu(window):
    rng = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(2, 500, 6, 128, generator=rng).bfloat16().cuda().requires_grad_() for _ in range(4))
    a, b = (torch.randn(2, 500, 6, generator=rng).cuda().requires_grad_() for _ in range(2))
    options = {"first_BT": torch.arange(500, device="cuda")[None].expand(2, -1) // 90 * 90, "window": window, "scale": 0.1}
    results = []
    for function in (dynamic_heads.dynamic_heads, fused_dynamic_heads):
        y = function((q, k, v), (a, b), **options)
        results.append([y.detach(), *torch.autograd.grad(y, (q, k, v, a, b), dy)])
    for twin, result in zip(*results, strict=True):
        assert (result - twin).norm() < 0.01 * twin.norm()
