"""Fused kernels and 8-bit products: that they are their twins, where they run, and what is refused."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import layers.fused as fused
from configs.schema import Model
from layers.fused import choose_paths, cross_entropy, linear_relu2, paths
from layers.fused.fp8 import BACKWARD, FORWARD, Fp8Linear, Fp8Product, Scaling, plain_product, product, quantise, scale_of
from model import GPT

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SMALL = Model(dim=32, head_dim=16, zero_init_projections=False)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(config: Model, **options) -> GPT:
    torch.manual_seed(0)
    return GPT(config, vocab_size=50, max_tokens=16, **options)


def error(found: Tensor, twin: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return ((found.double() - twin.double()).norm() / twin.double().norm()).item()


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@needs_triton
def test_kernels_in_tritons_interpreter():
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/layers/interpreted_fused.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_kernels_compile_for_gpus(tmp_path, monkeypatch):
    """Without a GPU at hand: to Hopper's PTX that keeps to registers and, for the product, uses the tensor cores."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bf16 = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr", "z_ptr", "grad_ptr"), "*bf16")
    types = bf16 | dict.fromkeys(("rows", "columns", "inner"), "i32") | {"targets_ptr": "*i64", "nats_ptr": "*fp32"}
    matrix = ptx(linear_relu2.tile_kernel(), types, linear_relu2.TILE)
    assert "wgmma.mma_async" in matrix and "local" not in matrix
    for name in ("identity", "rational", "sigmoid"):
        constants = {"FAMILY": name, "WITH_GRAD": True, "BLOCK": cross_entropy.BLOCK}
        assert "local" not in ptx(cross_entropy.row_kernel(), types, constants)


def ptx(kernel, types: dict[str, str], constants: dict) -> str:
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    return compiled(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3}).asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernels_on_the_gpu():
    """bfloat16 at the speedrun's widths, against float64 on the same device."""
    z = (8 * gaussian(64, 50304)).bfloat16().cuda().requires_grad_()
    targets = torch.arange(64).cuda()
    grad, = torch.autograd.grad(cross_entropy.row_nats(z, targets, "tanh", 15.0).sum(), z)
    twin, = torch.autograd.grad(cross_entropy.plain_nats(z.double(), targets, "tanh", 15.0), z)
    assert error(grad, twin) < 0.01
    x, w = (gaussian(*shape).bfloat16().cuda() for shape in ((500, 768), (3072, 768)))
    assert error(linear_relu2.linear_relu2(x, w), linear_relu2.plain_linear_relu2(x.double(), w)) < 0.01


# ---- Where they run --------------------------------------------------------------------------------------------------


def pretend(monkeypatch, capability: tuple[int, int], *, triton: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)


def test_cpus_take_the_plain_paths():
    assert paths(CPU) == ("plain", "plain", "plain", False, "device cpu")
    assert "loss plain" in paths(CPU).line() and "device cpu" in paths(CPU).line()


@pytest.mark.parametrize(("capability", "path", "fp8"), [((7, 5), "plain", False), ((8, 0), "triton", False),
                                                         ((8, 9), "triton", True), ((9, 0), "triton", True)])
def test_paths_follow_the_capability(capability, path, fp8, monkeypatch):
    pretend(monkeypatch, capability)
    here = paths(CUDA)
    assert (here.loss, here.head_loss, here.relu2, here.fp8) == (path, path, path, fp8)
    assert f"compute capability {capability[0]}.{capability[1]}" in here.line()


def test_without_triton_the_plain_paths_run_and_one_line_says_so(monkeypatch):
    pretend(monkeypatch, (9, 0), triton=False)
    here = paths(CUDA)
    assert here[:4] == ("plain", "plain", "plain", True) and "Triton not installed" in here.line()


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, ("triton", "plain", "triton")),
    ({"loss_chunk_tokens": 64}, ("triton", "triton", "triton")),
    ({"fused": "off", "loss_chunk_tokens": 64}, ("plain", "plain", "plain")),
    ({"biases": True, "loss_chunk_tokens": 64}, ("triton", "plain", "plain")),
    ({"activation": "gelu"}, ("triton", "plain", "plain")),
    ({"geometry": "sphere", "loss_chunk_tokens": 64}, ("triton", "plain", "plain")),
    ({"fp8": "head", "loss_chunk_tokens": 64}, ("triton", "plain", "triton")),
    ({"fp8": "head_mlp"}, ("triton", "plain", "plain"))])
def test_paths_follow_the_model(changes, expected, monkeypatch):
    pretend(monkeypatch, (9, 0))
    config = replace(SMALL, **changes)
    assert choose_paths(config, CUDA, torch.bfloat16)[:3] == expected
    assert choose_paths(config, CUDA, torch.float32)[:3] == ("plain", "plain", "plain")


def test_on_cpus_the_flag_changes_no_bit():
    tokens = torch.arange(32).view(2, 16)
    models = [build(replace(SMALL, fused=flag, loss_chunk_tokens=8)) for flag in ("auto", "off")]
    losses = [model(tokens, tokens) for model in models]
    assert torch.equal(*losses)
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss, model in zip(losses, models, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("fp8", ["head", "head_mlp"])
def test_8_bit_is_refused_where_the_device_has_none(fp8, monkeypatch):
    with pytest.raises(ValueError, match=f"fp8 {fp8} needs an NVIDIA GPU of compute capability 8.9 .* got device cpu"):
        build(replace(SMALL, fp8=fp8))
    pretend(monkeypatch, (8, 6))
    with pytest.raises(ValueError, match="got compute capability 8.6"):
        build(replace(SMALL, fp8=fp8), on_cuda=True)


@pytest.mark.parametrize(("changes", "message"), [
    ({"fp8": "head", "tied_head": True}, "needs a head of its own"),
    ({"fp8": "head", "geometry": "sphere"}, "belongs to geometry euclidean"),
    ({"fp8": "head", "fp8_scales": "delayed", "loss_chunk_tokens": 8}, "delayed"),
    ({"fp8_scales": "static"}, "no effect without --model.fp8"),
    ({"fp8": "head_mlp", "mlp_dim": 100}, "mlp_dim divisible by 16, got 100; nearest: 96"),
    ({"fp8": "head", "vocab_multiple": 1}, "vocab_multiple divisible by 16, got 1; nearest: 16"),
    ({"fp8_x_max": 0.0}, "fp8_x_max must be positive, got 0.0"), ({"fp8_grad_max": -1.0}, "fp8_grad_max"),
    ({"fp8_x_headroom": 0.5}, "fp8_x_headroom must be at least 1, got 0.5")])
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


# ---- 8-bit products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "greatest"), [(FORWARD, 448.0), (BACKWARD, 57344.0)])
def test_the_greatest_entry_is_the_formats_greatest(dtype, greatest):
    x = torch.tensor([-3.0, 1.0, 0.0])
    q = quantise(x, scale_of(x.abs().amax(), dtype), dtype)
    assert q.dtype == dtype and q.float()[0] == -greatest and q.float()[2] == 0
    assert scale_of(torch.zeros(()), dtype) == 1
    assert quantise(torch.tensor([1e9, -1e9]), torch.ones(()), dtype).float().tolist() == [greatest, -greatest]


@pytest.mark.parametrize(("dtype", "bits"), [(FORWARD, 3), (BACKWARD, 2)])
def test_rounding_is_the_formats(dtype, bits):
    """Entries over three decades: each within half a unit in the last of its mantissa's places."""
    x = torch.logspace(-2, 1, 1000)
    scale = scale_of(x.amax(), dtype)
    relative = (quantise(x, scale, dtype).float() * scale / x - 1).abs()
    assert 0.8 * 2.0 ** -(bits + 1) < relative.max() <= 2.0 ** -(bits + 1)


@pytest.mark.parametrize("shape", [(5, 64, 48), (16, 17, 5), (32, 16, 16)])
@pytest.mark.parametrize("left", [FORWARD, BACKWARD])
def test_the_product_is_its_twin(shape, left):
    n, c, m = shape
    A, B = gaussian(n, c).to(left), gaussian(m, c, seed=1).to(FORWARD)
    scales = torch.tensor(0.25), torch.tensor(3.0)
    torch.testing.assert_close(product(A, B, *scales, out=torch.float32), plain_product(A, B, *scales, out=torch.float32),
                               rtol=1e-5, atol=1e-4)


def run_linear(x: Tensor, weight: Tensor, upstream: Tensor, grad_max: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the gradients by x and weight."""
    scales = (scale_of(t.abs().amax(), FORWARD) for t in (x, weight))
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = Fp8Linear.apply(x, weight, *scales, grad_max)
    return y.detach(), *torch.autograd.grad(y, (x, weight), upstream)


@pytest.mark.parametrize("tokens", [48, 37])
@pytest.mark.parametrize(("grad_max", "unit"), [(None, 1.0), (0.0, 1e-6), (5e-6, 1e-6)])
def test_linear_is_near_the_exact_one_and_equal_to_its_twin(tokens, grad_max, unit):
    """Rounding 3 (2) bits of mantissa is an error of about .026 (.053) an entry, which products of random signs keep."""
    x, weight, upstream = gaussian(tokens, 64), gaussian(32, 64, seed=1) / 8, gaussian(tokens, 32, seed=2) * unit
    y, by_x, by_w = run_linear(x, weight, upstream, grad_max)
    sx, sw = (scale_of(t.abs().amax(), FORWARD) for t in (x, weight))
    x8, w8 = quantise(x, sx, FORWARD).float() * sx, quantise(weight, sw, FORWARD).float() * sw
    torch.testing.assert_close(y, x8 @ w8.mT, rtol=0, atol=1e-4)
    assert 0.02 < error(y, x @ weight.mT) < 0.05
    if grad_max is None:
        torch.testing.assert_close((by_x, by_w), (upstream @ weight, upstream.mT @ x))
        return
    sg = scale_of(torch.tensor(grad_max or upstream.abs().amax().item()), BACKWARD)
    g8 = quantise(upstream, sg, BACKWARD).float() * sg
    torch.testing.assert_close(by_x, g8 @ w8, rtol=0, atol=1e-5 * unit)
    torch.testing.assert_close(by_w, g8.mT @ x8, rtol=0, atol=1e-4 * unit)
    assert 0.04 < error(by_x, upstream @ weight) < 0.08 and 0.04 < error(by_w, upstream.mT @ x) < 0.08


def test_scales():
    """static: the setting; dynamic: this tensor; delayed: first this tensor, then the previous one with headroom."""
    first, second = torch.tensor([1.0, -4.0]), torch.tensor([100.0, 2.0])
    static, dynamic, delayed = (Scaling(kind, static=7.0, headroom=1.5) for kind in ("static", "dynamic", "delayed"))
    found = [[448 * scaling(x).item() for x in (first, second, first)] for scaling in (static, dynamic, delayed)]
    assert found == [pytest.approx(expected) for expected in ([7, 7, 7], [4, 100, 4], [4, 6, 150])]


@pytest.mark.parametrize("kind", ["static", "dynamic", "delayed"])
def test_training_is_quantised_and_validation_is_not(kind):
    linear = Fp8Product(Model(dim=32, head_dim=16, fp8="head", fp8_scales=kind, fp8_x_max=4.0), gradients=True)
    x, weight, bias = gaussian(3, 5, 32), gaussian(48, 32, seed=1), gaussian(48, seed=2)
    exact = F.linear(x, weight, bias)
    trained = linear(x, weight, bias)
    before = linear.scale_x.previous.clone()
    with torch.no_grad():
        assert torch.equal(linear(x * 9, weight, bias), F.linear(x * 9, weight, bias))
    assert torch.equal(linear.scale_x.previous, before) and (before > 0) == (kind == "delayed")
    assert trained.shape == (3, 5, 48) and 0.01 < error(trained, exact) < 0.2


@pytest.mark.parametrize("fp8", ["head", "head_mlp"])
@pytest.mark.parametrize("kind", ["dynamic", "delayed"])
def test_the_model_in_8_bit_points_the_plain_models_way(fp8, kind, monkeypatch):
    monkeypatch.setattr(fused, "paths", lambda device: fused.Paths("plain", "plain", "plain", True, "for the test"))
    config = replace(SMALL, fp8=fp8, fp8_scales=kind)
    model, plain = build(config), build(SMALL)
    assert list(model.state_dict()) == list(plain.state_dict()) and model.roles() == plain.roles()
    tokens, targets = torch.randint(50, (2, 2, 16), generator=torch.Generator().manual_seed(1))
    losses = [m(tokens, targets) for m in (model, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02) and losses[0] != losses[1]
    gradients = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (model, plain), strict=True)]
    for name, a, b in zip(model.roles(), *gradients, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98, name
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))


def test_8_bit_compiles_into_one_graph():
    """The delayed scales' memory moves from pass to pass there too."""
    config = Model(dim=32, head_dim=16, fp8="head", fp8_scales="delayed")
    x, weight = gaussian(5, 32).requires_grad_(), gaussian(48, 32, seed=1).requires_grad_()
    plain = Fp8Product(config, gradients=True)
    compiled = torch.compile(Fp8Product(config, gradients=True), backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        losses = [linear(x, weight).square().sum() for linear in (compiled, plain)]
        for a, b in zip(*(torch.autograd.grad(loss, (x, weight)) for loss in losses), strict=True):
            torch.testing.assert_close(a, b)
