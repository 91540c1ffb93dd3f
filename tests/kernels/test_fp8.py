"""8-bit products, compared with their plain twins. The head's, with the loss's kernel, are in interpreted_fused.py."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from configs.presets import PRESETS
from configs.schema import Model
from kernels.cross_entropy import softcap as softcap_of
from kernels.fp8 import (
    BACKWARD,
    FORWARD,
    Fp8Head,
    Fp8Linear,
    Fp8Product,
    Scaling,
    plain_product,
    product,
    quantise,
    reset_scales,
    scale_of,
)
from tests.kernels.twins import gaussian, relative_error


@pytest.mark.parametrize(("dtype", "format_max"), [(FORWARD, 448.0), (BACKWARD, 57344.0)])
def test_the_largest_entry_becomes_the_largest_number_of_the_format(dtype, format_max):
    x = torch.tensor([-3.0, 1.0, 0.0])
    q = quantise(x, scale_of(x.abs().amax(), dtype), dtype)
    assert q.dtype == dtype and q.float()[0] == -format_max and q.float()[2] == 0
    assert scale_of(torch.zeros(()), dtype) == 1
    assert quantise(torch.tensor([1e9, -1e9]), torch.ones(()), dtype).float().tolist() == [format_max, -format_max]


@pytest.mark.parametrize(("dtype", "bits"), [(FORWARD, 3), (BACKWARD, 2)])
def test_rounding_is_the_formats(dtype, bits):
    """Each of 1000 entries over three decades is rounded by at most half a unit of the mantissa's last bit."""
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
    fast, plain = (multiply(A, B, *scales, dtype=torch.float32) for multiply in (product, plain_product))
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-4)


def test_the_8_bit_linear_map_equals_its_twin_and_is_near_the_exact_product():
    """Rounding to 3 bits of mantissa has a relative error of about 0.026, which sums of random signs keep."""
    x, weight = gaussian(37, 64).requires_grad_(), (gaussian(32, 64, seed=1) / 8).requires_grad_()
    upstream, (sx, sw) = gaussian(37, 32, seed=2), (scale_of(t.detach().abs().amax(), FORWARD) for t in (x, weight))
    y = Fp8Linear.apply(x, weight, sx, sw)
    x8, w8 = quantise(x, sx, FORWARD).float() * sx, quantise(weight, sw, FORWARD).float() * sw
    torch.testing.assert_close(y, x8 @ w8.mT, rtol=0, atol=1e-4)
    assert 0.02 < relative_error(y, x @ weight.mT) < 0.05
    torch.testing.assert_close(torch.autograd.grad(y, (x, weight), upstream), (upstream @ weight, upstream.mT @ x))


def test_scales():
    """static: the setting; dynamic: this tensor; delayed: at first this tensor, then the previous one times the headroom."""
    first, second = torch.tensor([1.0, -4.0]), torch.tensor([100.0, 2.0])
    static, dynamic, delayed = (Scaling(kind, static=7.0, headroom=1.5) for kind in ("static", "dynamic", "delayed"))
    largest = [[448 * scaling(x).item() for x in (first, second, first)] for scaling in (static, dynamic, delayed)]
    assert largest == [pytest.approx(expected) for expected in ([7, 7, 7], [4, 100, 4], [4, 6, 150])]


def test_scales_start_anew():
    """After the warm-up's random tokens the first real pass is scaled by its own entries."""
    module, x = torch.nn.ModuleList([Scaling("delayed", static=7.0, headroom=1.5)]), torch.tensor([1.0, -4.0])
    first = module[0](x * 100)
    reset_scales(module)
    assert [448 * scale.item() for scale in (first, module[0](x), module[0](x))] == pytest.approx([400, 4, 6])


@pytest.mark.parametrize("kind", ["static", "dynamic", "delayed"])
def test_training_is_quantised_and_validation_is_not(kind):
    """Under static scales, whose settings are the head's, those of linear maps are delayed."""
    linear = Fp8Product(Model(dim=32, head_dim=16, fp8="head_mlp", fp8_scales=kind))
    x, weight, bias = gaussian(3, 5, 32), gaussian(48, 32, seed=1), gaussian(48, seed=2)
    exact = F.linear(x, weight, bias)
    trained = linear(x, weight, bias)
    before = linear.scale_x.previous_max.clone()
    with torch.no_grad():
        assert torch.equal(linear(x * 9, weight, bias), F.linear(x * 9, weight, bias))
    assert torch.equal(linear.scale_x.previous_max, before) and (before > 0) == (kind != "dynamic")
    assert trained.shape == (3, 5, 48) and 0.01 < relative_error(trained, exact) < 0.2


@pytest.mark.parametrize(("softcap", "slope"), [("tanh", 1.0), ("none", 1.0), ("rational", 1.0), ("asymmetric", 23 / 30)])
def test_the_gradients_scale_is_a_bound_or_the_setting(softcap, slope):
    config = Model(dim=32, head_dim=16, fp8="head", softcap=softcap, mtp_weights=(0.5, 0.25), prefix_loss=0.25)
    largest = torch.finfo(BACKWARD).max
    assert Fp8Head(config).grad_scale * largest == pytest.approx(2 * slope)
    assert Fp8Head(replace(config, fp8_grad_max=96.0)).grad_scale == pytest.approx(0.75 / 448)
    z = torch.linspace(-40, 40, 100_001, dtype=torch.float64, requires_grad=True)
    slopes, = torch.autograd.grad(softcap_of(z, softcap, 15.0).sum(), z)
    assert slopes.max().item() == pytest.approx(slope, rel=1e-6)


def test_the_speedrun_has_the_records_scales():
    model = PRESETS["speedrun"]().model
    head = Fp8Head(model)
    assert (model.fp8, model.fp8_scales) == ("auto", "static")
    assert head.scale_x(torch.ones(1)).item() == pytest.approx(100 / 448)
    assert head.scale_w(torch.ones(1)).item() == pytest.approx(1.6 / 448)
    assert head.grad_scale == pytest.approx(0.75 / 448)


def test_8_bit_compiles_into_one_graph():
    """The stored largest entry of delayed scales changes from pass to pass in a compiled graph too."""
    config = Model(dim=32, head_dim=16, fp8="head_mlp", fp8_scales="delayed")
    x, weight = gaussian(5, 32).requires_grad_(), gaussian(48, 32, seed=1).requires_grad_()
    plain = Fp8Product(config)
    compiled = torch.compile(Fp8Product(config), backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        losses = [linear(x, weight).square().sum() for linear in (compiled, plain)]
        for a, b in zip(*(torch.autograd.grad(loss, (x, weight)) for loss in losses), strict=True):
            torch.testing.assert_close(a, b)
