"""8-bit products, compared with their plain twins and in the model."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from configs.schema import Model
from kernels.fp8 import BACKWARD, FORWARD, Fp8Linear, Fp8Product, Scaling, plain_product, product, quantise, scale_of
from model import GPT

SMALL = Model(dim=32, head_dim=16, zero_init_projections=False)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(config: Model, **options) -> GPT:
    torch.manual_seed(0)
    return GPT(config, vocab_size=50, max_tokens=16, **options)


def relative_error(result: Tensor, twin: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return ((result.double() - twin.double()).norm() / twin.double().norm()).item()


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


def run_linear(x: Tensor, weight: Tensor, upstream: Tensor, grad_max: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the gradients by x and weight."""
    scales = (scale_of(t.abs().amax(), FORWARD) for t in (x, weight))
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = Fp8Linear.apply(x, weight, *scales, grad_max)
    return y.detach(), *torch.autograd.grad(y, (x, weight), upstream)


@pytest.mark.parametrize("tokens", [48, 37])
@pytest.mark.parametrize(("grad_max", "unit"), [(None, 1.0), (0.0, 1e-6), (5e-6, 1e-6)])
def test_8_bit_linear_equals_its_twin_and_is_near_the_exact_product(tokens, grad_max, unit):
    """Rounding to 3 (2) bits of mantissa has a relative error of about 0.026 (0.053), which sums of random signs keep."""
    x, weight, upstream = gaussian(tokens, 64), gaussian(32, 64, seed=1) / 8, gaussian(tokens, 32, seed=2) * unit
    y, by_x, by_w = run_linear(x, weight, upstream, grad_max)
    sx, sw = (scale_of(t.abs().amax(), FORWARD) for t in (x, weight))
    x8, w8 = quantise(x, sx, FORWARD).float() * sx, quantise(weight, sw, FORWARD).float() * sw
    torch.testing.assert_close(y, x8 @ w8.mT, rtol=0, atol=1e-4)
    assert 0.02 < relative_error(y, x @ weight.mT) < 0.05
    if grad_max is None:
        torch.testing.assert_close((by_x, by_w), (upstream @ weight, upstream.mT @ x))
        return
    sg = scale_of(torch.tensor(grad_max or upstream.abs().amax().item()), BACKWARD)
    g8 = quantise(upstream, sg, BACKWARD).float() * sg
    torch.testing.assert_close(by_x, g8 @ w8, rtol=0, atol=1e-5 * unit)
    torch.testing.assert_close(by_w, g8.mT @ x8, rtol=0, atol=1e-4 * unit)
    assert 0.04 < relative_error(by_x, upstream @ weight) < 0.08 and 0.04 < relative_error(by_w, upstream.mT @ x) < 0.08


def test_scales():
    """static: the setting; dynamic: this tensor; delayed: at first this tensor, then the previous one times the headroom."""
    first, second = torch.tensor([1.0, -4.0]), torch.tensor([100.0, 2.0])
    static, dynamic, delayed = (Scaling(kind, static=7.0, headroom=1.5) for kind in ("static", "dynamic", "delayed"))
    largest = [[448 * scaling(x).item() for x in (first, second, first)] for scaling in (static, dynamic, delayed)]
    assert largest == [pytest.approx(expected) for expected in ([7, 7, 7], [4, 100, 4], [4, 6, 150])]


@pytest.mark.parametrize("kind", ["static", "dynamic", "delayed"])
def test_training_is_quantised_and_validation_is_not(kind):
    linear = Fp8Product(Model(dim=32, head_dim=16, fp8="head", fp8_scales=kind, fp8_x_max=4.0), gradients=True)
    x, weight, bias = gaussian(3, 5, 32), gaussian(48, 32, seed=1), gaussian(48, seed=2)
    exact = F.linear(x, weight, bias)
    trained = linear(x, weight, bias)
    before = linear.scale_x.previous_max.clone()
    with torch.no_grad():
        assert torch.equal(linear(x * 9, weight, bias), F.linear(x * 9, weight, bias))
    assert torch.equal(linear.scale_x.previous_max, before) and (before > 0) == (kind == "delayed")
    assert trained.shape == (3, 5, 48) and 0.01 < relative_error(trained, exact) < 0.2


@pytest.mark.parametrize("fp8", ["head", "head_mlp"])
@pytest.mark.parametrize("kind", ["dynamic", "delayed"])
def test_gradients_of_the_8_bit_model_are_near_the_plain_ones(fp8, kind, monkeypatch):
    monkeypatch.setattr(kernels, "device_paths", lambda device: kernels.Paths("plain", "plain", True, "for the test"))
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
    """The stored largest entry of delayed scales changes from pass to pass in a compiled graph too."""
    config = Model(dim=32, head_dim=16, fp8="head", fp8_scales="delayed")
    x, weight = gaussian(5, 32).requires_grad_(), gaussian(48, 32, seed=1).requires_grad_()
    plain = Fp8Product(config, gradients=True)
    compiled = torch.compile(Fp8Product(config, gradients=True), backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        losses = [linear(x, weight).square().sum() for linear in (compiled, plain)]
        for a, b in zip(*(torch.autograd.grad(loss, (x, weight)) for loss in losses), strict=True):
            torch.testing.assert_close(a, b)
