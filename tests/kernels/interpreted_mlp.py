"""The kernels of kernels/mlp.py on CPUs, in Triton's interpreter; test_interpreted.py runs this file by itself."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels
from configs.schema import Model
from kernels import mlp
from model import GPT
from tests.kernels.twins import gaussian


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles for each of four programs, at sizes that are fast in the interpreter."""
    monkeypatch.setattr(mlp, "SMALL", {"ROWS": 16, "COLUMNS": 32, "INNER_BYTES": 64, "num_stages": 1})


def assert_near(result: Tensor, twin: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Compare up to the rounding of `dtype`, relative to the largest entry."""
    bound = {torch.float32: 3e-6, torch.float16: 4e-3}[dtype] * twin.abs().max().item()
    torch.testing.assert_close(result.double(), twin.double(), rtol=0, atol=bound)


def operands(*shape: int, dtype: torch.dtype = torch.float32, hidden: int = 80) -> list[Tensor]:
    """Return x, W_up and W_down, whose products have entries of size 1."""
    c = shape[-1]
    return [(gaussian(*size, seed=i) / spread).to(dtype).requires_grad_() for i, (size, spread) in
            enumerate([(shape, 1), ((hidden, c), c**0.5), ((c, hidden), hidden**0.5)])]


@pytest.mark.parametrize("shape", [(35, 48), (2, 4, 16), (1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter reads bfloat16 operands as integers
def test_values_and_gradients(shape, dtype):
    """Edges of rows, columns and the summed dimension that are not multiples of the tile."""
    leaves = operands(*shape, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out, twin = mlp.relu2_mlp(*leaves), mlp.plain_relu2_mlp(*exact)
    upstream = gaussian(*shape, seed=3, dtype=dtype)
    assert out.dtype == dtype and out.shape == twin.shape
    assert_near(out, twin, dtype)
    for g, t in zip(torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(twin, exact, upstream.double()),
                    strict=True):
        assert g.dtype == dtype
        assert_near(g, t, dtype)


def test_the_products_are_their_twins():
    x, up, down = (t.detach() for t in operands(35, 48))
    y = mlp.relu2_product(x, up)
    assert_near(y, mlp.plain_relu2_product(x, up))
    assert_near(mlp.relu2_backward(x, down, y), mlp.plain_relu2_backward(x, down, y))


@pytest.mark.parametrize("scale", [0.5, 0.01])  # with the second the largest entries exceed the format
def test_the_8_bit_product_is_its_twin(scale):
    x, up, _ = (t.detach() for t in operands(35, 48))
    (x8, scale_x), (up8, scale_up) = mlp.quantise_rows(x), mlp.quantise_rows(up)
    arguments = x8, up8, scale_x, scale_up, torch.tensor(scale), torch.float32
    y, y8, maxima = mlp.relu2_product_fp8(*arguments)
    twin, twin8 = mlp.plain_relu2_product_fp8(*arguments)
    assert_near(y, twin)
    assert maxima.amax() == y.amax() and (maxima >= 0).all() and y8.dtype == mlp.FORWARD
    # The interpreter does not carry: it rounds 1.97 to 1 where GPUs round to 2, and numbers below the smallest normal to 0.
    carried = (torch.frexp(twin8.float()).mantissa == 0.5) | (twin8.float() < 2**-6)
    assert torch.equal(y8.float()[~carried], twin8.float()[~carried]) and carried.float().mean() < 0.8
    assert (twin8.float().max() == 448) == (scale < 0.1) and (y8.float() <= 448).all()


def test_the_model_fused_is_the_plain_model(monkeypatch):
    """Loss and gradients to float32's rounding."""
    monkeypatch.setattr(kernels, "KERNEL_DTYPE", torch.float32)
    config = Model(layers=1, dim=32, head_dim=16, mlp_dim=48, zero_init_projections=False)
    paths = kernels.Paths()._replace(relu2="triton")
    monkeypatch.setattr(kernels, "device_paths", lambda device: paths)
    models = []
    for fused in ("auto", "off"):
        torch.manual_seed(0)
        models.append(GPT(replace(config, fused=fused), vocab_size=50, max_tokens=16, on_cuda=True))
    assert [model.paths.relu2 for model in models] == ["triton", "plain"]
    tokens, targets = torch.randint(50, (2, 2, 8), generator=torch.Generator().manual_seed(1))
    loss, twin = (model(tokens, targets) for model in models)
    assert loss.item() == pytest.approx(twin.item(), rel=1e-6)
    for model in (loss, twin):
        model.backward()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_near(p.grad, q.grad)


def test_the_kernels_compile_into_one_graph():
    leaves = operands(24, 32)
    compiled = torch.compile(mlp.relu2_mlp, backend="aot_eager", fullgraph=True, dynamic=False)
    results = [torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, mlp.relu2_mlp)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
