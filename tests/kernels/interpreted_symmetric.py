"""The kernel of kernels/symmetric.py on CPUs, in Triton's interpreter; test_interpreted.py runs this file by itself."""

import pytest
import torch

from kernels import symmetric
from kernels.symmetric import gram_polynomial, symmetric_product
from tests.kernels.twins import gaussian


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(symmetric, "TILE", {"SIDE": 16, "INNER": 16})


SHAPES = [(1, 16, 16), (2, 37, 21), (2, 5, 50)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_gram_matrix(shape, dtype, bound):
    """Tiles off the diagonal are copies, symmetric to the bit; a tile on the diagonal is symmetric up to rounding."""
    X = gaussian(*shape, dtype=dtype)
    A, twin = symmetric_product(X, None, 1.0, 0.0), X.double() @ X.double().mT
    tile = torch.arange(A.size(-1)) // symmetric.TILE["SIDE"]
    off_diagonal = tile[:, None] != tile
    assert A.dtype == dtype and torch.equal(A[:, off_diagonal], A.mT[:, off_diagonal])
    torch.testing.assert_close(A.double(), twin, rtol=0, atol=bound * twin.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("b", "c"), [(-4.775, 2.0315), (1.0, 0.0)])
def test_quadratic(shape, b, c):
    X = gaussian(*shape)
    A = X @ X.mT
    twin = b * A.double() + c * A.double() @ A.double()
    torch.testing.assert_close(symmetric_product(A, A, c, b).double(), twin, rtol=0, atol=1e-6 * twin.abs().max().item())


def test_strided_inputs():
    """Transposed and sliced inputs, like the halves of a bank of tall matrices."""
    X = gaussian(4, 20, 35).mT[::2]
    torch.testing.assert_close(symmetric_product(X, None, 1.0, 0.0), X @ X.mT, rtol=0, atol=1e-4)


class OnGPU(torch.Tensor):
    """A CPU tensor whose is_cuda is True."""

    is_cuda = True


def test_the_polynomial_by_the_kernel(monkeypatch):
    monkeypatch.setattr(symmetric, "uses_kernel", lambda X: True)
    X, b, c = gaussian(2, 24, 40), -4.775, 2.0315
    twin = gram_polynomial(X, b, c)
    result, calls = gram_polynomial(X.as_subclass(OnGPU), b, c), []
    torch.testing.assert_close(torch.Tensor(result), twin, rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(symmetric, "symmetric_product", lambda *arguments: calls.append(arguments) or arguments[0])
    gram_polynomial(X.as_subclass(OnGPU), b, c)
    assert len(calls) == 2
