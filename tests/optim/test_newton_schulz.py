"""Orthogonalisation: bands, limits and invariances, against SVDs in float64 and the polynomial on single numbers."""

import math

import pytest
import torch

from configs.notation import TABLE_NAMES
from optim.newton_schulz import LARGE_MATRIX_ELEMENTS, TABLES, Table, coefficient_table, orthogonalize, orthogonalize_svd

SHAPES = [(1, 24, 40), (1, 40, 24), (1, 32, 32), (3, 16, 24), (2, 1, 9), (2, 9, 1)]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values: torch.Tensor, m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Return a matrix (1, m, n) with the given singular values."""
    U, _ = torch.linalg.qr(gaussian(m, len(values), seed=seed))
    V, _ = torch.linalg.qr(gaussian(n, len(values), seed=seed + 1))
    return ((U * values) @ V.mT)[None]


def cosine(A: torch.Tensor, B: torch.Tensor) -> float:
    return ((A * B).sum() / (A.norm() * B.norm())).item()


def polynomial(x: torch.Tensor, table: str, steps: int) -> torch.Tensor:
    """Return the polynomial iterated `steps` times on the numbers x."""
    for step in range(steps):
        a, b, c = TABLES[table].triples[min(step, len(TABLES[table].triples) - 1)]
        x = a * x + b * x**3 + c * x**5
    return x


# ---- Tables --------------------------------------------------------------------------------------


def test_coefficients_are_the_published_ones():
    assert TABLES["quintic"].triples == ((3.4445, -4.7750, 2.0315),)
    assert TABLES["convergent"].triples == ((2, -1.5, 0.5),)
    assert TABLES["polar_express"].safety == 1.02
    assert TABLES["polar_express"].triples == (
        (8.156555, -22.483293, 15.878770), (4.042930, -2.808917, 0.500018), (3.891668, -2.772484, 0.506065),
        (3.285754, -2.368129, 0.464490), (2.346541, -1.709783, 0.423236))
    assert TABLES["dion"].triples == (
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012))


def test_the_last_triple_repeats():
    table, G = TABLES["polar_express"], gaussian(1, 6, 8)
    longer = Table((*table.triples, table.triples[-1], table.triples[-1]), table.safety, None, "the last three times")
    assert torch.equal(orthogonalize(G, table, steps=7), orthogonalize(G, longer, steps=7))
    shorter = Table(table.triples[:3], table.safety, None, "the first three")
    assert torch.equal(orthogonalize(G, table, steps=3), orthogonalize(G, shorter, steps=3))


@pytest.mark.parametrize("table", TABLES)
def test_scalar_band_is_true(table):
    """Every singular value in [3e-3, 1] ends inside the table's band."""
    x = torch.logspace(math.log10(3e-3), 0, 100_001, dtype=torch.float64) / TABLES[table].safety
    low, high = TABLES[table].band
    y = polynomial(x, table, max(5, len(TABLES[table].triples)))
    assert low <= y.min() and y.max() <= high


@pytest.mark.parametrize("table", TABLES)
def test_scalar_band_is_tight(table):
    x = torch.logspace(math.log10(3e-3), 0, 100_001, dtype=torch.float64) / TABLES[table].safety
    low, high = TABLES[table].band
    y = polynomial(x, table, max(5, len(TABLES[table].triples)))
    assert y.min() - low < 0.02 and high - y.max() < 0.02


def test_the_names_that_configs_take_are_the_tables_and_svd():
    assert TABLE_NAMES == (*TABLES, "svd")


def test_radii_beats_the_quintic_within_its_outer_radius():
    """Inputs in [1e-3, 1] end in [.829, 1.2] after 5 steps, against [.471, 1.2024] for the quintic."""
    x = torch.logspace(-3, 0, 100_001, dtype=torch.float64)
    radii, quintic = (polynomial(x, table, 5) for table in ("radii", "quintic"))
    assert radii.max() <= quintic.max()
    assert radii.min() > 0.82 and quintic.min() < 0.48


def test_six_maps_have_the_envelope_of_their_source():
    """[.9971, 1.0095] for inputs in [3e-3, 1] on 6000 points, before the safety factor; on more points up to 1.0097."""
    x = torch.logspace(math.log10(3e-3), 0, 100_001, dtype=torch.float64)
    y = polynomial(x, "anvil", 6)
    assert y.min().item() == pytest.approx(0.9971, abs=1e-4) and y.max().item() == pytest.approx(1.0097, abs=1e-4)
    five = polynomial(x / 1.02, "polar_express", 5)
    assert (y - 1).abs().max() < 0.1 * (five - 1).abs().max()


@pytest.mark.parametrize(("table", "steps"), [("quintic", 5), ("polar_express", 5), ("dion", 5), ("radii", 5), ("anvil", 6)])
def test_bfloat16_stays_in_the_band(table, steps):
    """Of 192 singular values over one decade rounding moves none far out of the band."""
    G = with_spectrum(torch.logspace(-1, 0, 192, dtype=torch.float64), 192, 256)
    actual = torch.linalg.svdvals(orthogonalize(G.bfloat16(), table, steps=steps).double())
    low, high = TABLES[table].band
    assert low - 0.05 < actual.min() and actual.max() < high + 0.01


# ---- Inline tables -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_an_inline_table_is_the_named_one(name):
    table = TABLES[name]
    text = f"safety={table.safety};" + ";".join(",".join(map(repr, triple)) for triple in table.triples)
    G = gaussian(2, 12, 20)
    assert torch.equal(orthogonalize(G, text, steps=7), orthogonalize(G, name, steps=7))


def test_an_inline_table_begins_without_safety():
    assert coefficient_table("2,-1.5,.5; 1.875,-1.25,.375").triples == ((2, -1.5, 0.5), (1.875, -1.25, 0.375))
    assert coefficient_table("2,-1.5,.5").safety == 1 and coefficient_table("safety=1.5;2,-1.5,.5").safety == 1.5


def test_an_inline_table_compiles_into_one_graph():
    G, text = gaussian(2, 6, 9), "safety=1.02;2,-1.5,.5"
    compiled = torch.compile(orthogonalize, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(G, text), orthogonalize(G, text))


# ---- Matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_band_holds_for_matrices(table, shape, dtype):
    """Singular values cover the whole range of the band, up to one that has nearly all of the norm."""
    values = torch.logspace(math.log10(4e-3), -1.5, min(shape), dtype=torch.float64)
    values[-1] = 1
    G = with_spectrum(values, *shape)
    actual = torch.linalg.svdvals(orthogonalize(G.to(dtype), table).double())
    low, high = TABLES[table].band
    assert (values / values.norm()).min() >= 3e-3
    assert low <= actual.min() and actual.max() <= high


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_matrix_map_is_the_polynomial_on_singular_values(table, shape, steps):
    G = gaussian(*shape)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    S = S / S.norm(dim=-1, keepdim=True) / TABLES[table].safety
    twin = (U * polynomial(S, table, steps).unsqueeze(-2)) @ Vh
    torch.testing.assert_close(orthogonalize(G, table, steps=steps), twin, rtol=0, atol=1e-10)


@pytest.mark.parametrize("table", [*TABLES, "svd"])
@pytest.mark.parametrize("shape", [(4, 12, 20), (4, 20, 12)])
def test_a_batch_is_a_loop(table, shape):
    G = gaussian(*shape) * torch.tensor([1e-3, 1.0, 50.0, 0.2], dtype=torch.float64)[:, None, None]
    loop = torch.cat([orthogonalize(matrix[None], table) for matrix in G])
    torch.testing.assert_close(orthogonalize(G, table), loop, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(512, 512), (256, 1024), (1024, 256)])
def test_large_matrices_are_a_loop_too(shape):
    """Stacks of matrices beyond LARGE_MATRIX_ELEMENTS, also empty ones, take another path on CPUs."""
    assert math.prod(shape) >= LARGE_MATRIX_ELEMENTS
    G = gaussian(2, *shape).float()
    whole = orthogonalize(G, steps=2)
    assert whole.shape == G.shape and torch.equal(whole[1], orthogonalize(G[1], steps=2))
    assert not torch.equal(whole[0], whole[1])
    assert orthogonalize(G[:0]).shape == (0, *shape)


@pytest.mark.parametrize("table", [*TABLES, "svd"])
@pytest.mark.parametrize("shape", [(7, 11), (11, 7)])
def test_one_matrix_is_a_batch_of_one(table, shape):
    G = gaussian(*shape)
    assert torch.equal(orthogonalize(G, table), orthogonalize(G[None], table)[0])


@pytest.mark.parametrize("table", [*TABLES, "svd"])
def test_transposing_commutes(table):
    G = gaussian(2, 10, 17)
    torch.testing.assert_close(orthogonalize(G.mT, table), orthogonalize(G, table).mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("table", [*TABLES, "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_stays_zero_beside_others(table, dtype):
    G = gaussian(3, 6, 8).to(dtype)
    G[1] = 0
    out = orthogonalize(G, table)
    assert out.dtype == dtype
    assert torch.equal(out[1], torch.zeros(6, 8, dtype=dtype)) and out.isfinite().all()
    assert out[0].norm() > 1 and out[2].norm() > 1


@pytest.mark.parametrize("table", [*TABLES, "svd"])
@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1e-8, 1e8, 1e20, 1e37])
def test_scale_is_ignored(table, factor):
    """Scaled inputs give the same result, even if their squares leave float32's range."""
    G = gaussian(2, 12, 16).float()
    torch.testing.assert_close(orthogonalize(G * factor, table), orthogonalize(G, table), rtol=0, atol=2e-3)


def test_a_power_of_two_changes_no_bit():
    G = gaussian(2, 12, 16).float()
    assert torch.equal(orthogonalize(G * 2.0**-40), orthogonalize(G))


@pytest.mark.parametrize("table", [*TABLES, "svd"])
@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 9, 6)])
def test_input_is_untouched(table, shape):
    G = gaussian(*shape).float()
    before = G.clone()
    out = orthogonalize(G, table)
    out.mul_(0)
    assert torch.equal(G, before)


@pytest.mark.parametrize(("table", "square", "wide"), [("quintic", 0.978, 0.982), ("polar_express", 0.988, 0.993)])
def test_direction_is_near_the_polar_factor(table, square, wide):
    """The measured cosines for Gaussians are .981 and .988 for the quintic, .993 and .996 for Polar Express."""
    for shape, least in [((1, 256, 256), square), ((1, 96, 384), wide), ((1, 384, 96), wide)]:
        G = gaussian(*shape).float()
        assert cosine(orthogonalize(G, table), orthogonalize_svd(G)) > least


def test_float32_and_float64_agree():
    G = gaussian(2, 48, 80)
    for table in TABLES:
        torch.testing.assert_close(orthogonalize(G.float(), table).double(), orthogonalize(G, table), rtol=0, atol=1e-4)


def test_bfloat16_agrees_roughly():
    G = gaussian(1, 48, 80).bfloat16()
    exact = orthogonalize(G.double())
    assert (orthogonalize(G).double() - exact).norm() < 0.05 * exact.norm()


def test_convergent_converges_and_quintic_does_not():
    """Small singular values double at each step; then p(1) = 1 with p'(1) = 0 squares the error at each step."""
    values = torch.linspace(0.1, 1, 16, dtype=torch.float64)
    G = with_spectrum(values, 16, 24)
    exact = orthogonalize_svd(G)
    assert (orthogonalize(G, "convergent", steps=12) - exact).abs().max() < 1e-9
    assert (orthogonalize(G, "convergent", steps=5) - exact).abs().max() > 1e-3
    assert (orthogonalize(G, "quintic", steps=12) - exact).abs().max() > 0.02


def test_convergent_twelve_steps_reach_small_values():
    values = torch.logspace(math.log10(5e-3), 0, 16, dtype=torch.float64)
    actual = torch.linalg.svdvals(orthogonalize(with_spectrum(values, 16, 24), "convergent", steps=12))
    assert 0.98 < actual.min() and actual.max() < 1.002


# ---- The exact twin ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_twin_is_the_polar_factor(shape):
    """O O^T = 1 on the short side and O^T G symmetric positive semi-definite define the polar factor."""
    G = gaussian(*shape)
    Q = orthogonalize(G, "svd")
    short = Q @ Q.mT if shape[1] <= shape[2] else Q.mT @ Q
    identity = torch.eye(min(shape[1:]), dtype=torch.float64).expand_as(short)
    torch.testing.assert_close(short, identity, rtol=0, atol=1e-12)
    H = Q.mT @ G
    torch.testing.assert_close(H, H.mT, rtol=0, atol=1e-11)
    assert torch.linalg.eigvalsh(H).min() > -1e-11


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_svd_twin_of_deficient_matrices(rank, shape):
    """The singular values are `rank` ones, then zeros, with the input's range and null space."""
    values = torch.logspace(-3, 0, rank, dtype=torch.float64)
    G = with_spectrum(values, *shape)
    Q = orthogonalize_svd(G)
    actual = torch.linalg.svdvals(Q)[0]
    expected = torch.tensor([1.0] * rank + [0.0] * (8 - rank), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    assert (Q * G).sum().item() == pytest.approx(values.sum().item(), rel=1e-9)


@pytest.mark.parametrize("table", TABLES)
def test_newton_schulz_keeps_the_null_space(table):
    G = with_spectrum(torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64), 8, 12)
    out = orthogonalize(G, table)
    P = orthogonalize_svd(G)
    torch.testing.assert_close(P @ P.mT @ out, out, rtol=0, atol=1e-12)


def test_svd_twin_keeps_the_dtype():
    G = gaussian(2, 5, 7).float()
    assert orthogonalize(G, "svd").dtype == torch.float32
    torch.testing.assert_close(orthogonalize(G, "svd"), orthogonalize(G.double(), "svd").float(), rtol=0, atol=1e-6)


def test_an_unknown_table_is_an_error():
    with pytest.raises(ValueError, match="cubic"):
        orthogonalize(gaussian(1, 2, 2), "cubic")
