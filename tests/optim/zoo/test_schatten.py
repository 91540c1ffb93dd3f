"""Test Schatten norms and their limits, and the l_p norms of vectors against closed forms.

The closed forms are: projection onto the simplex by sorting (p = 1), scaling (p = 2), clipping (infinity), and the equation
of the multiplier (in between).
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.norms import Frobenius, Spectral
from optim.zoo.schatten import Schatten, lp_dual, lp_project, lp_size
from tests.optim.oracle import gaussian

vectors = st.lists(st.floats(0, 5), min_size=1, max_size=6).map(lambda xs: torch.tensor([xs], dtype=torch.float64))
quick = settings(max_examples=12, deadline=None, derandomize=True)


def project_onto_simplex(s: Tensor) -> Tensor:
    """Return the nearest x >= 0 with sum at most 1, by sorting (Duchi et al. 2008, figure 1)."""
    if s.sum() <= 1:
        return s
    falling = s.flatten().sort(descending=True).values
    excess = (falling.cumsum(0) - 1) / torch.arange(1, s.numel() + 1)
    return (s - excess[falling > excess][-1]).clamp_min(0)


@quick
@given(s=vectors)
def test_projection_at_one_two_and_infinity(s):
    for p, expected in ((1, project_onto_simplex(s)), (2, s / s.norm().clamp_min(1)), (math.inf, s.clamp_max(1))):
        torch.testing.assert_close(lp_project(s, p), expected, rtol=0, atol=1e-12)


@quick
@given(s=vectors, p=st.sampled_from([1.1, 1.5, 3.0, 10.0, 100.0]))
def test_projection_in_between_solves_its_equation(s, p):
    """Outside the ball, s - x is a multiple of x^(p - 1), and x has size 1."""
    x = lp_project(s, p)
    if lp_size(s, p) <= 1:
        assert torch.equal(x, s)
        return
    assert lp_size(x, p).item() == pytest.approx(1, abs=1e-12)
    t = (s - x).max() / x.max() ** (p - 1)  # both are largest where s is
    expected = ((s - x) / t).clamp_min(0).pow(1 / (p - 1)) if p < 2 else s - t * x.pow(p - 1)  # both well-conditioned
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("p", [1, 1.5, 4, 60, math.inf])
def test_size_survives_extreme_scales(p):
    s = torch.tensor([[3.0, 2.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    for factor in (1e-250, 1e250):
        torch.testing.assert_close(lp_size(s * factor, p), lp_size(s, p) * factor, rtol=1e-12, atol=0)
        torch.testing.assert_close(lp_dual(s * factor, p), lp_dual(s, p), rtol=1e-12, atol=0)
    assert lp_size(s, 2)[0].item() == pytest.approx(14**0.5) and lp_size(s, 1)[0].item() == pytest.approx(6)


@pytest.mark.parametrize(("p", "expected"), [
    (1, [0.5, 0.5, 0.0, 0.0]), (math.inf, [1.0, 1.0, 1.0, 0.0]), (2, [2 / 3, 2 / 3, 1 / 3, 0.0]),
])
def test_dual_of_equal_and_zero_entries(p, expected):
    s = torch.tensor([[4.0, 4.0, 2.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(lp_dual(s, p), torch.tensor([expected], dtype=torch.float64))


# ---- Matrices -----------------------------------------------------------------------------------------------------------


def gaussian64(shape: tuple[int, ...], seed: int) -> Tensor:
    return gaussian(*shape, seed=seed).double()


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 7, 5), (2, 6, 6)])
def test_schatten_runs_from_normalised_sgd_to_muon(shape):
    G = gaussian64(shape, 4)
    torch.testing.assert_close(Schatten(2).dual(G), Frobenius().dual(G), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(Schatten(math.inf).dual(G), Spectral("spectral", "svd").dual(G), rtol=1e-9, atol=1e-12)
    rms = Schatten(math.inf, "rms").dual(G)
    torch.testing.assert_close(rms, Spectral("rms_operator", "svd").dual(G), rtol=1e-9, atol=1e-12)
    far = (Schatten(1e4, "rms").dual(G) - rms).norm() / rms.norm()
    assert 0 < far < 1e-3


def test_a_larger_p_gives_a_flatter_spectrum():
    G = gaussian64((1, 6, 9), 4)
    spread = []
    for p in (1.2, 2, 4, 16, math.inf):
        values = torch.linalg.svdvals(Schatten(p).dual(G))[0]
        spread.append((values[-1] / values[0]).item())
    assert spread == sorted(spread) and spread[-1] == pytest.approx(1) and spread[0] < 0.01


def test_nuclear_duals_have_rank_one():
    U, S, Vh = torch.linalg.svd(gaussian64((2, 6, 4), 4), full_matrices=False)
    torch.testing.assert_close(Schatten(1).dual((U * S[:, None]) @ Vh), U[..., :1] @ Vh[:, :1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("p", [1, 1.5, 2, 7, math.inf])
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 7, 5)])
def test_flat_spectra_have_the_same_size_for_every_p(p, shape):
    """Unit rms: the size is that of `rms_operator`."""
    flat = Spectral("rms_operator", "svd").dual(gaussian64(shape, 4))
    torch.testing.assert_close(Schatten(p, "rms").size(flat), torch.ones(2, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(Schatten(p, "rms").project(flat), flat, rtol=1e-9, atol=1e-12)
