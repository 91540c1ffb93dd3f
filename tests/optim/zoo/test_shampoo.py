"""Test Shampoo: its limit without memory, a slow float64 reference, and both kinds of roots."""

import pytest
import torch
from torch import Tensor

from configs.optim import Shampoo
from optim.newton_schulz import orthogonalize_svd
from optim.zoo.shampoo import inverse_root_newton, matrix_power
from tests.optim.oracle import SHAPES, directions, gaussian


def well_separated(shape: tuple[int, ...]) -> Tensor:
    """Return matrices with evenly spaced singular values from 1 to 4, whose singular vectors are unique."""
    U, S, Vh = torch.linalg.svd(gaussian(*shape), full_matrices=False)
    return (U * torch.linspace(4, 1, S.size(-1))) @ Vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("root", ["eigh", "newton"])
@pytest.mark.parametrize("sides", ["both", "smaller"])
def test_shampoo_without_memory_is_the_polar_factor(shape, root, sides):
    """(G G^T)^-1/4 G (G^T G)^-1/4 = U V^T = (G G^T)^-1/2 G (Bernstein & Newhouse 2024)."""
    G = well_separated(shape)
    step, = directions(Shampoo(averaging="none", gram_beta=0, eps=0, root=root, sides=sides), [G])
    torch.testing.assert_close(step, orthogonalize_svd(G), rtol=0, atol=5e-5)


def power64(A: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    return vectors @ torch.diag(values.clamp_min(1e-300) ** p) @ vectors.T


def reference_shampoo(grads: list[Tensor], *, beta: float, mu: float, every: int) -> list[Tensor]:
    m, n = grads[0].shape
    L, R, M, steps = torch.zeros(m, m).double(), torch.zeros(n, n).double(), torch.zeros(m, n).double(), []
    for t, G in enumerate(grads, start=1):
        L, R = beta * L + (1 - beta) * G @ G.T, beta * R + (1 - beta) * G.T @ G
        if (t - 1) % every == 0:
            roots = [power64(A / (1 - beta**t) + 1e-4 * torch.linalg.eigvalsh(A / (1 - beta**t))[-1]
                           * torch.eye(len(A)).double(), -0.25) for A in (L, R)]
        M = mu * M + (1 - mu) * G
        steps.append(roots[0] @ (mu * M + (1 - mu) * G) @ roots[1])
    return steps


@pytest.mark.parametrize("every", [1, 4])
def test_shampoo_matches_its_formula(every):
    grads = [gaussian(1, 8, 12, seed=i) for i in range(20)]
    steps = directions(Shampoo(gram_beta=0.9, momentum=0.9, eps=1e-4, every_steps=every), grads)
    expected = reference_shampoo([g[0].double() for g in grads], beta=0.9, mu=0.9, every=every)
    for step, exact in zip(steps, expected, strict=True):
        torch.testing.assert_close(step[0].double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("exponent", [-0.25, -0.5])
def test_roots_agree_with_float64(exponent):
    G = gaussian(3, 10, 14)
    A = G @ G.mT * torch.tensor([1e-12, 1.0, 1e12]).view(3, 1, 1)
    for root in (matrix_power, inverse_root_newton):
        for P, gram in zip(root(A, exponent, eps=1e-6), A.double(), strict=True):
            lifted = gram + 1e-6 * torch.linalg.eigvalsh(gram)[-1] * torch.eye(10).double()
            torch.testing.assert_close(P.double(), power64(lifted, exponent), rtol=2e-3, atol=1e-3 * P.abs().max().item())
        assert not root(torch.zeros(1, 4, 4), exponent, eps=0.0).any()
