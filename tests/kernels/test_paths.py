"""Fused kernels: they equal their plain twins, run where the device allows, and refuse impossible settings."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from configs.model import SPHERE_NEEDS
from configs.schema import Model
from kernels import Paths, choose_paths, cross_entropy, device_paths, fp8
from kernels.cross_entropy import Softcap
from model import GPT
from tests.kernels.machine_code import compile_kernel, needs_triton
from tests.kernels.twins import gaussian, relative_error

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = Model(dim=32, head_dim=16, zero_init_projections=False)


def build(config: Model, **options) -> GPT:
    torch.manual_seed(0)
    return GPT(config, vocab_size=50, max_tokens=16, **options)


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_kernels_compile_for_gpus(tmp_path, monkeypatch):
    """Compile for Hopper without a GPU: no spilled registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr", "z_ptr"), "*bf16") | {
        "targets_ptr": "*i64", "weights_ptr": "*fp32", "loss_ptr": "*fp32"}
    types |= dict.fromkeys(("rows", "columns", "inner", "count", "padded_rows"), "i32")
    for kind, gradient in (("none", "*bf16"), ("rational", "*bf16"), ("tanh", "*bf16"), ("asymmetric", "*fp8e5")):
        family, numbers = cross_entropy.softcap_family(kind, 15.0)
        constants = dict(zip(("height", "shift", "inverse_width", "base"), numbers, strict=True)) | {
            "inverse_scale": 0.1, "FAMILY": family, "TERMS": 4, "WITH_GRAD": True, "BLOCK": cross_entropy.BLOCK}
        rows = compile_kernel(cross_entropy.row_kernel(), 90, types | {"grad_ptr": gradient}, constants,
                              num_warps=cross_entropy.WARPS)
        assert rows.spilled_bytes == 0 and "f64" not in rows.ptx
        assert ("cvt.rn.satfinite.e5m2x2" in rows.ptx) == (gradient == "*fp8e5")
    transposed = compile_kernel(fp8.tile_kernel(), 90, types | {"x_ptr": "*fp8e5", "y_ptr": "*fp8e5"}, {"SIDE": fp8.SIDE},
                                num_warps=8).ptx
    assert "ld.global.v4" in transposed and "st.global.v4" in transposed  # 16 bytes at a time


@needs_triton
def test_compiled_graphs_depend_on_the_source_of_the_kernels():
    """PyTorch finds the kernels of an operator in its source, for the keys of its caches of compiled graphs."""
    from torch._library.triton import get_triton_kernels_for_op

    for module, name, kernel in ((cross_entropy, "loss_and_grad", cross_entropy.row_kernel()),
                                 (fp8, "transpose", fp8.tile_kernel())):
        module.define_operator()
        assert get_triton_kernels_for_op(f"steepest::{name}") == [kernel]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernels_on_the_gpu():
    """bfloat16 at the speedrun's sizes, compared with float64 on the same device."""
    z = (8 * gaussian(64, 50304)).bfloat16().cuda().requires_grad_()
    targets, weights, cap = torch.arange(-2, 126).view(2, 64).cuda(), torch.tensor([1, 0.5]).cuda(), Softcap("tanh", 15.0)
    twin, = torch.autograd.grad(cross_entropy.softcap_cross_entropy(z.double(), targets.clamp_min(-1), weights, cap), z)
    for scale, error in ((0.0, 0.01), (2e-5, 0.1)):
        _, grad = cross_entropy.loss_and_grad(z.detach(), targets, weights, cap, with_grad=True, grad_scale=scale)
        assert relative_error(grad.float() * (scale or 1), twin) < error
    g8 = torch.randn(70, 50).to(torch.float8_e5m2).cuda()
    assert torch.equal(fp8.transpose(g8).float(), g8.float().mT)


# ---- Where they run --------------------------------------------------------------------------------------------------


def pretend_cuda(monkeypatch, capability: tuple[int, int], *, triton: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)


def test_cpus_take_the_plain_paths():
    assert device_paths(CPU) == Paths(reason="device cpu")
    assert "loss plain" in device_paths(CPU).line() and "device cpu" in device_paths(CPU).line()


@pytest.mark.parametrize(("capability", "path", "products"), [
    ((7, 5), "plain", "none"), ((8, 0), "triton", "none"), ((8, 9), "triton", "head_mlp"), ((9, 0), "triton", "head_mlp")])
def test_paths_follow_the_capability(capability, path, products, monkeypatch):
    pretend_cuda(monkeypatch, capability)
    here = device_paths(CUDA)
    assert (here.loss, here.relu2, here.fp8) == (path, path, products)
    assert f"compute capability {capability[0]}.{capability[1]}" in here.line()


def test_without_triton_the_plain_paths_run_and_one_line_says_so(monkeypatch):
    pretend_cuda(monkeypatch, (9, 0), triton=False)
    here = device_paths(CUDA)
    assert here[:3] == ("plain", "plain", "head_mlp") and "Triton not installed" in here.line()


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, ("triton", "triton")), ({"fused": "off"}, ("plain", "plain")), ({"biases": True}, ("triton", "plain")),
    ({"activation": "gelu"}, ("triton", "plain")), ({"geometry": "sphere"}, ("triton", "plain")),
    ({"fp8": "head"}, ("triton", "triton")), ({"fp8": "head_mlp"}, ("triton", "triton")),
    ({"mlp_dim": 100}, ("triton", "plain"))])
def test_paths_follow_the_model(changes, expected, monkeypatch):
    pretend_cuda(monkeypatch, (9, 0))
    config = replace(SMALL, **changes)
    assert choose_paths(config, CUDA, torch.bfloat16)[:2] == expected
    assert choose_paths(replace(config, fp8="none"), CUDA, torch.float32)[:2] == ("plain", "plain")


@pytest.mark.parametrize(("capability", "changes", "dtype", "products"), [
    ((9, 0), {}, torch.bfloat16, "head_mlp"), ((8, 9), {}, torch.bfloat16, "head_mlp"), ((8, 6), {}, torch.bfloat16, "none"),
    ((9, 0), {}, torch.float32, "none"), ((9, 0), {"fused": "off"}, torch.bfloat16, "none"),
    ((9, 0), {"tied_head": True}, torch.bfloat16, "none"), ((9, 0), {"biases": True}, torch.bfloat16, "none")])
def test_automatic_8_bit_products_need_the_device_and_the_model(capability, changes, dtype, products, monkeypatch):
    pretend_cuda(monkeypatch, capability)
    paths = choose_paths(replace(SMALL, fp8="auto", **changes), CUDA, dtype)
    assert paths.fp8 == products and f"8-bit products {products} (compute capability" in paths.line()


def test_automatic_8_bit_products_change_nothing_on_cpus():
    tokens = torch.arange(32).view(2, 16)
    models = [build(replace(SMALL, fp8=products)) for products in ("auto", "none")]
    assert models[0].paths == models[1].paths and models[0].fp8_head is None
    assert torch.equal(*(model(tokens, tokens) for model in models))


def test_on_cpus_fused_changes_nothing():
    tokens = torch.arange(32).view(2, 16)
    models = [build(replace(SMALL, fused=flag)) for flag in ("auto", "off")]
    losses = [model(tokens, tokens) for model in models]
    assert torch.equal(*losses)
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss, model in zip(losses, models, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("products", ["head", "head_mlp"])
def test_8_bit_is_refused_where_the_device_has_none(products, monkeypatch):
    with pytest.raises(ValueError, match=f"fp8 {products} needs an NVIDIA GPU of compute capability 8.9 .* got device cpu"):
        build(replace(SMALL, fp8=products))
    pretend_cuda(monkeypatch, (8, 6))
    with pytest.raises(ValueError, match="got compute capability 8.6"):
        build(replace(SMALL, fp8=products), on_cuda=True)


@pytest.mark.parametrize(("changes", "dtype"), [({"fused": "off"}, torch.bfloat16), ({}, torch.float32)])
def test_8_bit_is_refused_without_the_fused_loss(changes, dtype, monkeypatch):
    pretend_cuda(monkeypatch, (9, 0))
    with pytest.raises(ValueError, match="--model.fp8 head needs the fused loss"):
        choose_paths(replace(SMALL, fp8="head", **changes), CUDA, dtype)


@pytest.mark.parametrize(("changes", "message"), [
    ({"fp8": "head", "tied_head": True}, "needs a head of its own"),
    ({"fp8": "head", "geometry": "sphere"} | SPHERE_NEEDS, "fp8 head needs a head without biases and scales"),
    ({"fp8": "head_mlp", "biases": True}, "fp8 head_mlp needs a head without biases"),
    ({"fp8": "head_mlp", "mlp_dim": 100}, "mlp_dim divisible by 16, got 100; nearest: 96"),
    ({"fp8": "head", "vocab_multiple": 1}, "vocab_multiple divisible by 16, got 1; nearest: 16"),
    ({"fp8_x_max": 0.0}, "fp8_x_max must be positive, got 0.0"), ({"fp8_grad_max": -1.0}, "fp8_grad_max"),
    ({"fp8_x_headroom": 0.5}, "fp8_x_headroom must be at least 1, got 0.5")])
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
