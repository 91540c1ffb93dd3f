"""The kernel of kernels/symmetric.py on CPUs, in Triton's interpreter; test_symmetric.py runs this file by itself."""

import pytest
import torch

import optim.newton_schulz as newton_schulz
from kernels import symmetric
from kernels.symmetric import symmetric_product
from optim.newton_schulz import orthogonalize


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(symmetric, "TILE", {"SIDE": 16, "INNER": 16})


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


SHAPES = [(1, 16, 16), (2, 37, 21), (2, 5, 50)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_gram_matrix(shape, dtype, bound):
    """Tiles off the diagonal are mirrored, so that the result is symmetric to the last bit."""
    X = gaussian(*shape, dtype=dtype)
    A, twin = symmetric_product(X, None, 1.0, 0.0), X.double() @ X.double().mT
    assert A.dtype == dtype and torch.equal(A, A.mT)
    torch.testing.assert_close(A.double(), twin, rtol=0, atol=bound * twin.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("b", "c"), [(-4.775, 2.0315), (1.0, 0.0)])
def test_quadratic(shape, b, c):
    X = gaussian(*shape)
    A = X @ X.mT
    twin = b * A.double() + c * A.double() @ A.double()
    torch.testing.assert_close(symmetric_product(A, A, c, b).double(), twin, rtol=0, atol=1e-6 * twin.abs().max().item())


def test_strides_are_followed():
    """Transposed and sliced inputs, as a tall bank's halves are."""
    X = gaussian(4, 20, 35).mT[::2]
    torch.testing.assert_close(symmetric_product(X, None, 1.0, 0.0), X @ X.mT, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 40, 24)])
def test_orthogonalize_by_the_kernel(shape, monkeypatch):
    G = gaussian(*shape)
    twin, calls = orthogonalize(G), []

    def counted(*arguments):
        calls.append(arguments)
        return symmetric_product(*arguments)

    monkeypatch.setattr(symmetric, "symmetric_product", counted)
    monkeypatch.setattr(symmetric, "has_kernel", lambda X: True)
    torch.testing.assert_close(newton_schulz.orthogonalize(G), twin, rtol=0, atol=1e-4)
    assert len(calls) == 10
