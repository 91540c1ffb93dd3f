"""The MLP with ReLU^2: its kernels equal their plain twins, in 8-bit floats too, and fit the GPUs."""


import pytest
import torch
from torch import Tensor

from kernels import mlp
from tests.kernels.machine_code import SHARED_BYTES, compile_kernel, needs_triton
from tests.kernels.twins import gaussian, relative_error

POINTERS = dict.fromkeys(("left_ptr", "right_ptr", "out_ptr", "y_ptr"), "*bf16")
POINTERS_8 = {"left_ptr": "*fp8e4nv", "right_ptr": "*fp8e4nv", "out_ptr": "*bf16", "out8_ptr": "*fp8e4nv"} | dict.fromkeys(
    ("left_scale_ptr", "right_scale_ptr", "out8_scale_ptr", "maxima_ptr"), "*fp32")


@needs_triton
@pytest.mark.parametrize("capability", [90, 89, 80])
@pytest.mark.parametrize("variant", ["forward", "backward", "8-bit"])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_kernel_fits_the_gpu(capability, variant, tmp_path, monkeypatch):
    """No spilled registers, shared memory within the limit, on Hopper its loads (TMA) and tensor cores (wgmma)."""
    if variant == "8-bit" and capability < 89:
        pytest.skip("no 8-bit floats before compute capability 8.9")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, tile = mlp.tile_kernel(), mlp.LARGE if capability == 90 else mlp.SMALL
    pointers = POINTERS_8 if variant == "8-bit" else POINTERS
    if variant == "forward":
        pointers = {name: kind for name, kind in pointers.items() if name != "y_ptr"}
    absent = {name: None for name in kernel.arg_names if name.endswith("_ptr") and name not in pointers}
    constants = absent | {"BACKWARD": variant == "backward", "ROWS": tile["ROWS"], "COLUMNS": tile["COLUMNS"],
                          "INNER": tile["INNER_BYTES"] // (1 if variant == "8-bit" else 2)}
    code = compile_kernel(kernel, capability, pointers | dict.fromkeys(("rows", "columns", "inner"), "i32"), constants,
                          num_warps=8, num_stages=tile["num_stages"])
    assert code.spilled_bytes == 0 and code.shared_bytes <= SHARED_BYTES[capability]
    if capability == 90:
        assert "wgmma.mma_async" in code.ptx and "cp.async.bulk.tensor" in code.ptx


@pytest.mark.parametrize(("capability", "tile"), [((8, 0), mlp.SMALL), ((8, 9), mlp.SMALL), ((9, 0), mlp.LARGE),
                                                  ((10, 0), mlp.LARGE), ((12, 0), mlp.SMALL)])
def test_tiles_follow_the_shared_memory(capability, tile, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert mlp.tile_sizes(torch.device("cuda")) is tile


@pytest.mark.parametrize(("dim", "hidden", "expected"), [(768, 3072, True), (100, 400, False), (96, 100, False)])
def test_sizes_that_the_kernel_loads(dim, hidden, expected):
    assert mlp.fits(dim, hidden) == expected


# ---- 8-bit floats, with plain products in place of the kernels ---------------------------------------------------------


@pytest.fixture
def plain_kernels(monkeypatch):
    def relu2_product_fp8(*arguments) -> tuple[Tensor, Tensor, Tensor]:
        y, y8 = mlp.plain_relu2_product_fp8(*arguments)
        return y, y8, y.float().amax(dim=1)

    monkeypatch.setattr(mlp, "relu2_product_fp8", relu2_product_fp8)
    monkeypatch.setattr(mlp, "relu2_product", mlp.plain_relu2_product)
    monkeypatch.setattr(mlp, "relu2_backward", mlp.plain_relu2_backward)


def operands() -> list[Tensor]:
    """Return x, W_up and W_down; a token is 10 times larger than the others, a neuron's weights 100 times smaller."""
    x, up, down = gaussian(48, 64), gaussian(96, 64, seed=1) / 8, gaussian(64, 96, seed=2) / 10
    x[3] *= 10
    up[5] /= 100
    return [t.requires_grad_() for t in (x, up, down)]


def test_8_bit_is_its_twin_and_near_the_exact_products(plain_kernels):
    """Rounding to 3 bits of mantissa has a relative error of about 0.026; rows keep it whatever their size."""
    x, up, down = leaves = operands()
    layer = mlp.Fp8ReLU2MLP(1.8)
    layer.scale.fill_(4.0)
    out = layer(x.view(2, 24, 64), up, down).view(48, 64)
    with torch.no_grad():
        assert relative_error(out, mlp.plain_fp8_mlp(*leaves, torch.tensor(4.0))) < 1e-6
        for token in (2, 3):
            assert 0.02 < relative_error(out[token], mlp.plain_relu2_mlp(*leaves)[token]) < 0.1
    gradients, twins = (torch.autograd.grad(y, leaves, gaussian(48, 64, seed=3))
                        for y in (out, mlp.plain_relu2_mlp(*leaves)))
    for name, g, t in zip(("x", "up", "down"), gradients, twins, strict=True):
        assert relative_error(g, t) < 0.06, name


def test_the_scale_of_the_hidden_layer_follows_the_previous_pass(plain_kernels):
    """At first 1; then for 1.8 times the largest entry of the pass before; a pass without gradients changes nothing."""
    layer, (x, up, down) = mlp.Fp8ReLU2MLP(1.8), operands()
    assert layer.scale == 1 and not layer.state_dict()
    for factor in (1.0, 2.0):
        layer(factor * x, up, down)
        (x8, scale_x), (up8, scale_up) = mlp.quantise_rows(factor * x.detach()), mlp.quantise_rows(up.detach())
        y, _ = mlp.plain_relu2_product_fp8(x8, up8, scale_x, scale_up, torch.ones(()), torch.float32)
        assert layer.scale.item() == pytest.approx(1.8 * y.amax().item() / 448)
    before = layer.scale.clone()
    with torch.no_grad():
        torch.testing.assert_close(layer(9 * x, up, down), mlp.plain_relu2_mlp(9 * x, up, down))
    assert layer.scale == before


def test_rows_are_quantised_by_their_own_largest_entry():
    x8, scale = mlp.quantise_rows(torch.tensor([[1.0, -2.0], [1e-6, 5e-7], [0.0, 0.0]]))
    assert x8.float().tolist() == [[224, -448], [448, 224], [0, 0]]
    assert scale.tolist() == pytest.approx([2 / 448, 1e-6 / 448, 1.0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_kernels_on_the_gpu(eight_bit):
    """bfloat16 at the speedrun's sizes, compared with float64 on the same device."""
    leaves = [t.bfloat16().cuda().requires_grad_() for t in
              (gaussian(500, 768), gaussian(3072, 768, seed=1) / 28, gaussian(768, 3072, seed=2) / 55)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out, twin = (mlp.Fp8ReLU2MLP(1.8).cuda() if eight_bit else mlp.relu2_mlp)(*leaves), mlp.plain_relu2_mlp(*exact)
    assert relative_error(out, twin) < (0.1 if eight_bit else 0.01)
    upstream = gaussian(500, 768, seed=3).bfloat16().cuda()
    for g, t in zip(torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(twin, exact, upstream.double()),
                    strict=True):
        assert relative_error(g, t) < (0.1 if eight_bit else 0.02)
