"""Norms: duality, projection and size of each against closed forms and against random feasible points."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optim.norms import Column, FanIn, Frobenius, Row, Sign, Spectral, build_norm
from optim.zoo.schatten import Schatten

UNITS = ("spectral", "rms_operator", "at_least_one", "match_adam")
NORMS = {
    **{f"spectral_{unit}": Spectral(unit, "svd") for unit in UNITS},
    "row": Row(), "column": Column(), "sign": Sign(), "frobenius": Frobenius(), "frobenius_rms": Frobenius("rms"),
    "row_fan_in": FanIn(Row()), "column_fan_in": FanIn(Column()), "sign_fan_in": FanIn(Sign()),
    **{f"schatten_{p}": Schatten(p) for p in (1, 1.5, 4, math.inf)}, "schatten_3_rms": Schatten(3, "rms"),
}
every_norm = pytest.mark.parametrize("name", NORMS)
sides = st.integers(1, 7)
stacks = st.tuples(st.integers(1, 3), sides, sides)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def init(norm, shape: tuple[int, int, int], *, generator: torch.Generator | None = None) -> Tensor:
    """Return a random point of the norm's unit sphere: the dual of a Gaussian."""
    return norm.dual(torch.randn(shape, generator=generator))


def gaussian(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scale(name: str, m: int, n: int) -> float:
    """Return the norm, without its unit, of a tensor of size 1; written independently of the tested code."""
    wider = max(m, n)
    return {"spectral_rms_operator": (m / n) ** 0.5, "spectral_at_least_one": (m / n) ** 0.5 if m > n else 1,
            "spectral_match_adam": 0.2 * wider**0.5, "row_fan_in": 1 / n, "column_fan_in": 1 / n, "sign_fan_in": 1 / n,
            "frobenius_rms": (m * n) ** 0.5, "schatten_3_rms": (m / n) ** 0.5 * min(m, n) ** (1 / 3)}.get(name, 1)


def exponent(name: str) -> float:
    """Return the p of a Schatten norm."""
    return float(name.split("_")[1])


def power_norm(s: Tensor, p: float) -> Tensor:
    return s.amax(-1) if p == math.inf else s.pow(p).sum(-1).pow(1 / p)


def primal(name: str, W: Tensor) -> Tensor:
    """Return ||W|| by its definition, (K,)."""
    m, n = W.shape[-2:]
    return {"spectral": lambda: torch.linalg.matrix_norm(W, 2),
            "schatten": lambda: power_norm(torch.linalg.svdvals(W), exponent(name)),
            "row": lambda: torch.linalg.vector_norm(W, dim=2).amax(1) / n**0.5,
            "column": lambda: torch.linalg.vector_norm(W, dim=1).amax(1) / m**0.5,
            "sign": lambda: W.flatten(1).abs().amax(1),
            "frobenius": lambda: torch.linalg.matrix_norm(W)}[name.split("_")[0]]() / scale(name, m, n)


def conjugate(p: float) -> float:
    """Return q with 1/p + 1/q = 1."""
    return {1: math.inf, math.inf: 1}.get(p) or p / (p - 1)


def dual_norm(name: str, G: Tensor) -> Tensor:
    """Return max { <G, A> : ||A|| <= 1 } in closed form, (K,)."""
    m, n = G.shape[-2:]
    return {"spectral": lambda: torch.linalg.svdvals(G).sum(-1),
            "schatten": lambda: power_norm(torch.linalg.svdvals(G), conjugate(exponent(name))),
            "row": lambda: torch.linalg.vector_norm(G, dim=2).sum(1) * n**0.5,
            "column": lambda: torch.linalg.vector_norm(G, dim=1).sum(1) * m**0.5,
            "sign": lambda: G.flatten(1).abs().sum(1),
            "frobenius": lambda: torch.linalg.matrix_norm(G)}[name.split("_")[0]]() * scale(name, m, n)


def inner(A: Tensor, B: Tensor) -> Tensor:
    return (A * B).sum(dim=(-2, -1))


def feasible(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return random points of the unit ball: for even seeds on the sphere, for odd ones inside."""
    A = gaussian(shape, seed)
    A = A / primal(name, A)[:, None, None]
    return A * (0.5 if seed % 2 else 1.0)


# ---- dual ----------------------------------------------------------------------------------------


@every_norm
@quick
@given(shape=stacks, seed=seeds)
def test_dual_has_size_one_and_attains_the_dual_norm(name, shape, seed):
    G = gaussian(shape, seed)
    A = NORMS[name].dual(G)
    assert A.shape == G.shape and A.dtype == G.dtype
    torch.testing.assert_close(primal(name, A), torch.ones(shape[0], dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(inner(G, A), dual_norm(name, G), rtol=1e-9, atol=0)


@every_norm
@quick
@given(shape=stacks, seed=seeds)
def test_nothing_feasible_beats_the_dual(name, shape, seed):
    G = gaussian(shape, seed)
    best = inner(G, NORMS[name].dual(G))
    for other in range(8):
        assert (inner(G, feasible(name, shape, seed + other)) <= best * (1 + 1e-9)).all()


@every_norm
@quick
@given(shape=stacks, seed=seeds)
def test_dual_of_a_matrix_of_low_rank(name, shape, seed):
    """For a product of thin factors, as the gradient of few tokens is, the dual is still feasible and the best."""
    K, m, n = shape
    G = gaussian((K, m, 2), seed) @ gaussian((K, 2, n), seed + 1)
    A = NORMS[name].dual(G)
    assert A.isfinite().all() and (primal(name, A) <= 1 + 1e-9).all()
    torch.testing.assert_close(inner(G, A), dual_norm(name, G), rtol=1e-9, atol=0)


@every_norm
@quick
@given(shape=stacks, seed=seeds, sharpness=st.sampled_from([0.1, 1.0, 30.0]))
def test_steepest_descent_minimises_the_majorant(name, shape, seed, sharpness):
    """min over D of <G, D> + (sharpness / 2) ||D||^2 is -||G||*^2 / (2 sharpness), at D = -(||G||* / sharpness) dual(G)."""
    G = gaussian(shape, seed)
    length = dual_norm(name, G)

    def majorant(D: Tensor) -> Tensor:
        return inner(G, D) + sharpness / 2 * primal(name, D) ** 2

    least = -length**2 / (2 * sharpness)
    step = -(length / sharpness)[:, None, None] * NORMS[name].dual(G)
    torch.testing.assert_close(majorant(step), least, rtol=1e-9, atol=0)
    for other in range(4):
        near = step + 0.1 * primal(name, step)[:, None, None] * feasible(name, shape, seed + other)
        assert (majorant(near) >= least * (1 + 1e-9)).all()


@every_norm
@quick
@given(shape=stacks, seed=seeds)
def test_size_is_the_definition(name, shape, seed):
    """The tolerance of spectral sizes is 1e-5, because they are float32 roots of a Gram matrix's eigenvalues."""
    W = gaussian(shape, seed)
    tolerance = 1e-5 if name.startswith("spectral") else 1e-12
    torch.testing.assert_close(NORMS[name].size(W).double(), primal(name, W), rtol=tolerance, atol=0)


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradient_gives_zero(name, dtype):
    G = gaussian((3, 4, 6), 0).to(dtype)
    G[1] = 0
    A = NORMS[name].dual(G)
    assert A.isfinite().all() and not A[1].any() and A[0].any() and A[2].any()


@every_norm
@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20, 1e30])
def test_dual_ignores_scale(name, factor):
    G = gaussian((2, 5, 7), 3).float()
    torch.testing.assert_close(NORMS[name].dual(G * factor), NORMS[name].dual(G), rtol=1e-4, atol=1e-5)


@every_norm
def test_verbs_leave_their_input_alone(name):
    G = 3 * gaussian((2, 5, 7), 3)
    before = G.clone()
    for verb in (NORMS[name].dual, NORMS[name].project):
        verb(G).zero_()
        assert torch.equal(G, before)


def test_rows_and_columns_without_gradient_stay_zero():
    G = gaussian((2, 6, 5), 1)
    G[0, 2] = 0
    G[1, :, 3] = 0
    row, column = Row().dual(G), Column().dual(G)
    assert not row[0, 2].any() and not column[1, :, 3].any()
    norms = row.square().mean(-1).sqrt()
    assert norms[0, [0, 1, 3, 4, 5]].sub(1).abs().max() < 1e-12 and norms[1].sub(1).abs().max() < 1e-12


def test_a_small_row_moves_as_far_as_a_large_one():
    """Each row is scaled alone: a rare token's gradient may be 1e-20 of a frequent one's."""
    G = torch.ones(1, 2, 4)
    G[0, 1] = 1e-20
    torch.testing.assert_close(Row().dual(G), torch.ones(1, 2, 4))


# ---- project -------------------------------------------------------------------------------------


@every_norm
@quick
@given(shape=stacks, seed=seeds, factor=st.sampled_from([0.1, 1.0, 5.0]))
def test_projection_is_feasible_idempotent_and_nearest(name, shape, seed, factor):
    """P is nearest if and only if <W - P, A - P> <= 0 for all feasible A; the maximum of <W - P, A> over them is the dual
    norm of W - P.
    """
    norm, W = NORMS[name], factor * gaussian(shape, seed)
    P = norm.project(W)
    assert (primal(name, P) <= 1 + 1e-9).all()
    torch.testing.assert_close(norm.project(P), P, rtol=0, atol=1e-9)
    assert (dual_norm(name, W - P) <= inner(W - P, P) + 1e-7 * (1 + inner(W, W))).all()


@every_norm
def test_projection_leaves_the_ball_alone(name):
    W = gaussian((2, 5, 4), 0)
    W = 0.9 * W / primal(name, W)[:, None, None]
    torch.testing.assert_close(NORMS[name].project(W), W, rtol=0, atol=1e-12)


@every_norm
def test_projection_of_a_far_point_has_size_one(name):
    W = 100 * gaussian((2, 5, 4), 0)
    ones = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(primal(name, NORMS[name].project(W)), ones, rtol=0, atol=1e-9)


# ---- init, units, build --------------------------------------------------------------------------


@every_norm
def test_init_has_size_one_and_follows_its_generator(name):
    first, again, other = (init(NORMS[name], (3, 6, 4), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    torch.testing.assert_close(primal(name, first.double()), torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("m", "n", "unit", "spectral", "rms"), [
    (768, 768, "at_least_one", 1.0, 0.0361), (3072, 768, "at_least_one", 2.0, 0.0361),
    (768, 3072, "at_least_one", 1.0, 0.0180), (2304, 768, "at_least_one", 1.732, 0.0361),
    (768, 768, "rms_operator", 1.0, 0.0361), (3072, 768, "rms_operator", 2.0, 0.0361),
    (768, 3072, "rms_operator", 0.5, 0.0090), (2304, 768, "rms_operator", 1.732, 0.0361),
    (768, 768, "match_adam", 5.54, 0.200), (3072, 768, "match_adam", 11.09, 0.200),
    (768, 3072, "match_adam", 11.09, 0.200), (2304, 768, "match_adam", 9.60, 0.200),
])
def test_update_sizes_per_convention(m, n, unit, spectral, rms):
    """Sizes for GPT-2 small's matrices; the RMS of an orthogonal update is scale / sqrt(max(m, n))."""
    assert Spectral(unit).scale(m, n) == pytest.approx(spectral, abs=0.005)
    assert Spectral(unit).scale(m, n) / max(m, n) ** 0.5 == pytest.approx(rms, abs=0.0001)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_update_rms_of_a_spectral_dual(unit, shape):
    A = Spectral(unit, "svd").dual(gaussian((1, *shape), 0))
    assert A.square().mean().sqrt().item() == pytest.approx(scale(f"spectral_{unit}", *shape) / 32**0.5, rel=1e-9)


def test_newton_schulz_duals_stay_in_their_band():
    """With the default table the size is only near 1, within the band of Polar Express."""
    G = gaussian((4, 24, 48), 0)
    size = primal("spectral_rms_operator", Spectral("rms_operator").dual(G))
    assert ((0.85 <= size) & (size <= 1.15)).all() and (size - 1).abs().max() > 1e-6


def test_a_norm_by_its_name():
    assert build_norm("rms_operator", table="quintic", steps=3) == Spectral("rms_operator", "quintic", 3)
    assert build_norm("spectral", "match_adam", table="svd") == Spectral("match_adam", "svd", 5)
    assert build_norm("spectral") == Spectral("spectral", "polar_express", 5)
    assert build_norm("frobenius") == Frobenius() and build_norm("frobenius", "rms") == Frobenius("rms")
    assert build_norm("schatten", p=1.5) == Schatten(1.5) and build_norm("schatten", "rms") == Schatten(4, "rms")
    for name, norm in {"row": Row(), "column": Column(), "sign": Sign()}.items():
        assert build_norm(name) == norm and build_norm(name, "fan_in") == FanIn(norm)


# ---- Norms per input, vectors, scope --------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "size_in", "size_out"), [
    (Sign(), lambda x: x.abs().mean(0), lambda y: y.abs().amax(0)),
    (Column(), lambda x: x.abs().mean(0), lambda y: y.square().mean(0).sqrt()),
    (Row(), lambda x: x.square().mean(0).sqrt(), lambda y: y.abs().amax(0)),
])
def test_fan_in_norms_are_operator_norms(norm, size_in, size_out):
    """||W x|| <= ||W|| ||x||, with equality at a one-hot x, or for Row at one of W's rows."""
    W = gaussian((1, 5, 8), 6)
    size = FanIn(norm).size(W)
    x = torch.cat([gaussian((8, 200), 7), torch.eye(8, dtype=torch.float64), W[0].mT], dim=1)
    gains = size_out(W[0] @ x) / size_in(x)
    assert gains.max().item() == pytest.approx(size.item(), rel=1e-9)


def test_a_vector_is_a_row_at_rms_one():
    """A norm gets a bank of vectors as rows (1, K, n) or as matrices of one row (K, 1, n), with equal results."""
    v = gaussian((3, 1, 6), 5)
    step = Row().dual(v)
    torch.testing.assert_close(step.square().mean((1, 2)), torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)
    assert torch.equal(step.flatten(0, 1)[None], Row().dual(v.flatten(0, 1)[None]))
    torch.testing.assert_close(Frobenius("rms").dual(v), step, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["row", "column", "sign", "frobenius_rms", "spectral_rms_operator", "schatten_4",
                                  "row_fan_in", "column_fan_in", "sign_fan_in"])
def test_scope_is_no_finer_than_the_dual_allows(name):
    """The dual of the cut tensor is the cut of the dual."""
    norm, G = NORMS[name], gaussian((4, 6, 5), 2)
    whole = norm.dual(G)
    cut = {"element": lambda x: x.reshape(1, -1, 1)[:, 7:40], "row": lambda x: x.reshape(1, 24, 5)[:, 3:11],
           "matrix": lambda x: x[1:3]}[norm.scope]
    torch.testing.assert_close(norm.dual(cut(G)), cut(whole), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("factor", "finite"), [(1e30, True), (1e-30, True), (math.inf, False), (math.nan, False)])
def test_spectral_size_of_extreme_matrices(factor, finite):
    """Squares beyond float32 are no problem, and what is not finite has size NaN instead of an error."""
    W = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    extreme = W.clone()
    extreme[0] *= factor
    size, expected = Spectral().size(extreme), Spectral().size(W)
    assert torch.equal(size[1], expected[1])
    assert size[0] == pytest.approx(expected[0].item() * factor, rel=1e-5) if finite else size[0].isnan()
