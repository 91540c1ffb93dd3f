"""Test the derivations of optim/README.md: the norm under which every rule, without averages, is steepest descent.

All in float64, so that the mathematics is tested and not the rounding: against SVDs, to 1e-6, on tall, wide, square,
rank-deficient and zero matrices.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.optim import (
    AGD,
    PSGD,
    RULES,
    SM3,
    SOAP,
    SWAN,
    Adam,
    Dion2,
    Muon,
    Muon2,
    Muown,
    NorMuon,
    Prodigy,
    RuleConfig,
    Shampoo,
    SOAPMuon,
    Steepest,
)
from optim.groups import build_rule
from optim.norms import Spectral
from optim.rule import Hyper, Rule, Step
from optim.zoo.schatten import Schatten

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "optim" / "README.md").read_text()
SHAPES = {"tall": (20, 12), "wide": (12, 20), "square": (16, 16)}
NO_AVERAGES = dict(beta1=0.0, beta2=0.0, gram_beta=0.0, averaging="none", momentum=0.0, eps=0.0, ns="svd", unit="spectral")


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Make `.float()`, in which rules compute, and the default dtype, of their float32 state, both float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients() -> dict[str, Tensor]:
    """Return stacks of two gradients by name."""
    full_rank = {name: gaussian(2, *shape) for name, shape in SHAPES.items()}
    deficient = {f"{name}, rank 3": gaussian(2, m, 3) @ gaussian(2, 3, n, seed=1) for name, (m, n) in SHAPES.items()}
    return full_rank | deficient | {"zero": torch.zeros(2, 12, 20), "one row": gaussian(2, 1, 9)}


every_matrix = pytest.mark.parametrize("name", list(gradients()))


def svd(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V^T, with the columns of U zero where the singular value is zero."""
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return U * (S > 1e-10 * S.amax(-1, keepdim=True)).unsqueeze(-2), S, Vh


def polar(G: Tensor) -> Tensor:
    """Return U V^T, over the singular values that are not zero."""
    U, _, Vh = svd(G)
    return U @ Vh


def memoryless(rule: type[RuleConfig], **changes: object) -> RuleConfig:
    """Return the config of a rule whose averages hold the present gradient alone."""
    return rule(**{name: value for name, value in NO_AVERAGES.items() if hasattr(rule, name)} | changes)


def directions(config: RuleConfig, grads: list[Tensor]) -> list[Tensor]:
    """Return the directions of a rule at weights that stay zero, in a group of this one stack."""
    rule, W = build_rule(config), torch.zeros_like(grads[0])
    state, shared = rule.init_state(W), rule.init_shared()
    return [step(rule, W, grad, state, count=t + 1, shared=shared) for t, grad in enumerate(grads)]


def step(rule: Rule, W: Tensor, grad: Tensor, state: dict[str, Tensor], *, count: int, shared: dict[str, Tensor]) -> Tensor:
    numbers = Hyper(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.0), torch.tensor(float(count)), shared)
    if shared:
        rule.update_shared(rule.sums(W, grad, state, numbers), numbers)
    return rule.direction(W, grad, state, numbers).clone()


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_the_readme_has_every_rule_and_names_tests_that_exist():
    rules = set(re.findall(r"(?:^\| |^## .*)`(\w+)`", README, re.MULTILINE))
    assert set(RULES) <= rules
    files = set(re.findall(r"(?:zoo/)?test_\w+\.py", README))
    assert "test_anthology.py" in files and len(files) > 10
    for name in files:
        assert any((ROOT / "tests" / folder / name).exists() for folder in ("", "optim")), name


# ---- Fixed norms ---------------------------------------------------------------------------------


@every_matrix
def test_muon_without_momentum_is_spectral_descent(name):
    """Carlson et al. 2015: D = U V^T."""
    G = gradients()[name]
    assert_equal(directions(memoryless(Muon), [G])[0], polar(G))


@every_matrix
def test_convergent_newton_schulz_gives_the_polar_factor(name):
    G = gradients()[name]
    assert_equal(directions(memoryless(Muon, ns="convergent", ns_steps=30), [G])[0], polar(G))


@every_matrix
def test_signum_without_momentum_is_sign_descent(name):
    G = gradients()[name]
    assert_equal(directions(Steepest(norm="sign", averaging="none"), [G])[0], G.sign())


@every_matrix
@pytest.mark.parametrize(("role", "norm"), [("embed", "row"), ("matrix", "rms_operator"), ("head", "sign")])
def test_scions_iterates_stay_in_their_ball(name, role, norm):
    """(1 - eta) W - eta rho dual(G) is a convex combination of two points of the ball of radius rho."""
    config, G = Steepest(norm=norm, ns="svd", averaging="none", lr=0.3 * 5, weight_decay=1 / 5), gradients()[name]
    rule = build_rule(config)
    ball = rule.norm
    W = 5 * ball.dual(gaussian(*G.shape, seed=3))
    for t in range(10):
        numbers = Hyper(*(torch.tensor(x) for x in (config.lr, config.weight_decay, 0.0, t + 1.0)))
        rule.update(W, (-1) ** t * G + W, {}, numbers, step=Step.build(config))
        assert (ball.size(W) <= 5 * (1 + 1e-6)).all(), role


# ---- Learned norms: Adam's family ----------------------------------------------------------------


@every_matrix
@pytest.mark.parametrize("config", [Adam(beta1=0.0, beta2=0.0, eps=1e-30), SM3(averaging="none")])
def test_adam_without_averages_is_sign_descent(name, config):
    """g / sqrt(g^2) = sign(g); the same for the first step of SM3, whose state is zero."""
    G = gradients()[name]
    assert_equal(directions(config, [G])[0], G.sign())


@every_matrix
def test_prodigy_without_averages_is_sign_descent_with_a_warm_up(name):
    """W <- W - d sign(g). For a constant gradient d is the distance covered until two steps ago, d_k = d_(k-1) + d_(k-2):
    it grows like the Fibonacci numbers, by a factor of 1.618 per step."""
    G = gradients()[name]
    rule, W = build_rule(memoryless(Prodigy, distance_start=1e-3, eps=1e-30)), torch.zeros_like(G)
    state, shared = rule.init_state(W), rule.init_shared()
    d = [1, 1, 1]
    for t in range(20):
        D = step(rule, W, G, state, count=t + 1, shared=shared)
        assert_equal(D, 1e-3 * d[t] * G.sign(), tolerance=1e-6 * max(1, D.abs().max().item()))
        W, d = W - D, [*d, d[-1] + d[-2]]


# ---- Learned norms: Shampoo's family -------------------------------------------------------------


@every_matrix
def test_shampoo_without_averages_is_spectral_descent(name):
    """(G G^T)^-1/4 G (G^T G)^-1/4 = U V^T."""
    G = gradients()[name]
    assert_equal(directions(memoryless(Shampoo), [G])[0], polar(G))


@every_matrix
@pytest.mark.parametrize("sides", ["left", "right", "smaller"])
def test_one_sided_shampoo_without_averages_is_spectral_descent(name, sides):
    """(G G^T)^-1/2 G = G (G^T G)^-1/2 = U V^T."""
    G = gradients()[name]
    assert_equal(directions(memoryless(Shampoo, sides=sides), [G])[0], polar(G))


@every_matrix
def test_muon_without_momentum_is_shampoo_without_memory(name):
    """The two rules agree at every step, on gradients that change."""
    grads = [gradients()[name] * (-2.0) ** t + t * gradients()[name].roll(1, -1) for t in range(4)]
    for muon, shampoo in zip(directions(memoryless(Muon), grads), directions(memoryless(Shampoo), grads), strict=True):
        assert_equal(muon, shampoo)


@every_matrix
@pytest.mark.parametrize("exponent", [-1 / 16, -1 / 8, -3 / 16])
def test_shampoos_exponents_without_averages_are_schattens_norms(name, exponent):
    """(G G^T)^p G (G^T G)^p = U S^(1 + 4p) V^T: up to length, the dual of the Schatten norm with q - 1 = 1 + 4p."""
    G = gradients()[name]
    q = 2 + 4 * exponent
    U, S, Vh = svd(G)
    D = directions(memoryless(Shampoo, exponent=exponent), [G])[0]
    assert_equal(D, (U * S.unsqueeze(-2) ** (1 + 4 * exponent)) @ Vh)
    length = D.norm(dim=(-2, -1), keepdim=True)
    dual = Schatten(q / (q - 1)).dual(G)
    assert_equal(D, dual / dual.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30) * length)


@every_matrix
def test_soap_without_averages_is_spectral_descent(name):
    """In the basis of its singular vectors G is diagonal, and Adam makes S / (S + eps) of it: U V^T, softened by eps. The
    first gradient only sets the basis."""
    G = gradients()[name]
    U, S, Vh = svd(G)
    first, second = directions(memoryless(SOAP, eps=1e-6), [G, G])
    assert not first.any()
    assert_equal(second, (U * (S / (S + 1e-6)).unsqueeze(-2)) @ Vh)
    assert_equal(second, polar(G), tolerance=2e-5)


def test_psgd_is_spectral_descent_for_a_constant_gradient():
    """A square D with D D^T = n I is n^.5 times an orthogonal matrix. The factors are functions of G G^T and G^T G, so D
    has the singular vectors of G: it is n^.5 U V^T."""
    G = gradients()["square"]
    D = directions(memoryless(PSGD, factor_lr=0.1, step_rms=10.0), [G] * 200)[-1]
    assert_equal(D / 16**0.5, polar(G))


def test_soap_is_not_spectral_descent_if_singular_values_are_equal():
    """The Gram matrices of an orthogonal G are the identity, whose eigenbasis is arbitrary."""
    G = polar(gaussian(1, 16, 16))
    assert (directions(memoryless(SOAP, eps=1e-6), [G, G])[1] - G).abs().max() > 0.1


@every_matrix
def test_soap_muon_without_averages_is_spectral_descent(name):
    """The polar factor of U V^T is U V^T."""
    G = gradients()[name]
    for D in directions(memoryless(SOAPMuon, eps=1e-3, ns="convergent", ns_steps=18), [G, G]):
        assert_equal(D, polar(G))


# ---- Learned norms: Muon's family ----------------------------------------------------------------


@every_matrix
def test_normuon_without_averages_is_the_polar_factor_with_rows_of_equal_length(name):
    G = gradients()[name]
    rows = polar(G) / polar(G).norm(dim=-1, keepdim=True).clamp_min(1e-30)
    size = polar(G).norm(dim=(-2, -1), keepdim=True) / rows.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    assert_equal(directions(memoryless(NorMuon), [G])[0], rows * size)


@every_matrix
def test_muon2_without_averages_is_the_polar_factor_of_the_sign(name):
    G = gradients()[name]
    assert_equal(directions(memoryless(Muon2, eps=1e-30), [G])[0], polar(G.sign()))


@pytest.mark.parametrize("name", SHAPES)
def test_muown_without_averages_is_spectral_descent_on_directions_and_sign_descent_on_lengths(name):
    """W = g v / |v|: dL/dg = <G, v / |v|> row by row, dL/dv the part of G orthogonal to v."""
    G, lr = gradients()[name], 1e-2
    W = gaussian(*G.shape, seed=5)
    rule = build_rule(memoryless(Muown, eps=1e-30))
    numbers = Hyper(*(torch.tensor(x) for x in (lr, 0.0, 0.0, 1.0)))
    moved = W - lr * rule.direction(W, G, rule.init_state(W), numbers)
    lengths = W.norm(dim=-1, keepdim=True)
    along = (G * W / lengths).sum(-1, keepdim=True)
    v = W - lr * polar(G - along * W / lengths)
    assert_equal(moved, (lengths - lr * along.sign()) * v / v.norm(dim=-1, keepdim=True))


@every_matrix
def test_dion2_of_all_rows_without_momentum_is_spectral_descent(name):
    """D = (m/n)^.5 U V^T, the dual of the RMS -> RMS operator norm."""
    G = gradients()[name]
    assert_equal(directions(memoryless(Dion2, rank_frac=1.0), [G])[0], Spectral("rms_operator", "svd").dual(G))


@every_matrix
def test_swan_is_spectral_descent_on_the_standardised_gradient(name):
    """D has RMS 1, as Adam's steps."""
    G = gradients()[name]
    flat = G - G.mean(-1, keepdim=True)
    standard = flat / flat.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    expected = polar(standard)
    size = expected.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
    D = directions(memoryless(SWAN, whiten_steps=40), [G])[0]
    assert_equal(D, expected / size * math.sqrt(G[0].numel()))


# ---- Lengths -------------------------------------------------------------------------------------


@every_matrix
def test_agd_is_normalised_descent_by_layer_with_a_length_from_the_gradients(name):
    """eta = log((1 + sqrt(1 + 4 S)) / 2), S the mean over the layers of (m/n)^.5 ||G||_F."""
    G = gradients()[name]
    unit = (G.size(-2) / G.size(-1)) ** 0.5
    sizes = G.norm(dim=(-2, -1), keepdim=True)
    layers = max(1, int((sizes > 0).sum()))
    eta = math.log((1 + math.sqrt(1 + 4 * unit * sizes.sum().item() / layers)) / 2)
    assert_equal(directions(memoryless(AGD), [G])[0], eta / layers * unit * G / sizes.clamp_min(1e-30))


@pytest.mark.parametrize("name", SHAPES)
def test_adam_grafted_onto_muon_is_moonlights_unit(name):
    """Adam without averages has RMS 1, U V^T has RMS max(m, n)^-.5: the ratio is Moonlight's unit, up to its factor .2."""
    G = gradients()[name]
    D = directions(memoryless(Muon, graft=memoryless(Adam, eps=1e-30)), [G])[0]
    assert_equal(0.2 * D, Spectral("match_adam", "svd").dual(G))
