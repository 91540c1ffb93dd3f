"""Test PSGD: against a slow float64 reference, the whiteness of its steps, and extreme gradients."""

import pytest
import torch
from torch import Tensor

from configs.optim import PSGD
from optim.groups import build_rule
from optim.zoo.psgd import LEAST_EPS, spectral_bound
from tests.optim.oracle import SHAPES, assert_moved_alike, directions, gaussian, gradients, hyper, train

BETA, RATE, EPS, MOST = 0.6, 0.4, 1e-3, 1.1


def psgd(**changes: object) -> PSGD:
    return PSGD(**dict(beta1=BETA, factor_lr=RATE, eps=EPS, step_rms=MOST, lr=0.1) | changes)


def reference(grads: list[Tensor]) -> list[Tensor]:
    """Return the directions for one matrix, in float64, as the formulas are written."""
    m, n = grads[0].shape
    mean, Q, steps = torch.zeros(m, n, dtype=torch.float64), None, []
    for t, grad in enumerate(grads, start=1):
        mean = BETA * mean + (1 - BETA) * grad.double()
        M = mean / (1 - BETA**t)
        if Q is None and M.any():
            Q = [torch.eye(k, dtype=torch.float64) * (M**4).mean().sqrt().sqrt() ** -0.25 for k in (m, n)]
        if Q is None:
            steps.append(torch.zeros_like(M))
            continue
        P = [q @ q for q in Q]
        D = P[0] @ M @ P[1]
        steps.append(D * min(1.0, MOST / D.square().mean().sqrt().item()))
        noise = [EPS**2 * (P[1 - i] ** 2).sum() * P[i] @ P[i] for i in (0, 1)]
        Q[0] = update_factor(Q[0], D @ D.T + noise[0], n)
        Q[1] = update_factor(Q[1], D.T @ D + noise[1], m)
        ratio = (Q[1].abs().max() / Q[0].abs().max()) ** 0.5
        Q = [Q[0] * ratio, Q[1] / ratio]
    return steps


def update_factor(Q: Tensor, gram: Tensor, target: int) -> Tensor:
    x = gram[:, gram.norm(dim=0).argmax()]
    for _ in range(2):
        x = gram @ x / x.norm()
    rate = RATE / 2 / (x.norm() + target)
    Q = Q - rate * (gram - target * torch.eye(len(Q))) @ Q
    Q = Q - rate * Q @ (gram - target * torch.eye(len(Q)))
    return (Q + Q.T) / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_match_the_formula(shape):
    grads = [torch.zeros(shape), *gradients(*shape, steps=12)]
    expected = zip(*(reference([grad[k] for grad in grads]) for k in range(shape[0])), strict=True)
    for D, exact in zip(directions(psgd(), grads), expected, strict=True):
        torch.testing.assert_close(D.double(), torch.stack(exact), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_match_the_formula(shape):
    grads, start = gradients(*shape, steps=8), gaussian(*shape, seed=50)
    expected = start.double().clone()
    for k in range(shape[0]):
        expected[k] -= 0.1 * sum(reference([g[k] for g in grads]))
    assert_moved_alike(train(psgd(), start, grads), expected, start, tolerance=1e-4)


@pytest.mark.parametrize(("m", "n"), [(16, 16), (12, 32)])
def test_a_stationary_gradient_becomes_white(m, n):
    """G = A X B with Gaussian X and condition numbers 30 and 10: E[D D^T] = |B P_R|^2 P_L A A^T P_L becomes n I, up to the
    noise that single steps of the factors leave."""
    A, B = _shaped(m, 30.0, seed=1), _shaped(n, 10.0, seed=2)
    rule = build_rule(PSGD(beta1=0.0, factor_lr=0.05))
    W = torch.zeros(1, m, n)
    state, errors = rule.init_state(W), []
    for t in range(600):
        rule.direction(W, (A @ gaussian(m, n, seed=t + 10) @ B)[None], state, hyper(1.0, count=t + 1))
        P_left, P_right = (state[f"factor_{side}"][0] @ state[f"factor_{side}"][0] for side in ("left", "right"))
        spread = torch.linalg.eigvalsh((B @ P_right).square().sum() * P_left @ A @ A.T @ P_left / n)
        errors.append((spread - 1).abs().mean().item())
    assert errors[0] > 0.5 and sum(errors[-100:]) / 100 < 0.2


def _shaped(k: int, condition: float, *, seed: int) -> Tensor:
    """Return a symmetric k x k matrix with this condition number."""
    basis = torch.linalg.qr(gaussian(k, k, seed=seed)).Q
    return basis * torch.logspace(0, -torch.tensor(condition).log10().item(), k) @ basis.T


def test_directions_ignore_the_scale_of_the_gradient():
    grads = gradients(2, 12, 20, steps=6)
    for small, plain in zip(directions(psgd(eps=0.0), [g * 1e-6 for g in grads]), directions(psgd(eps=0.0), grads),
                            strict=True):
        torch.testing.assert_close(small, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("eps", [0.0, 1e-10])
@pytest.mark.parametrize("first", [1.0, 1e-30, 1e30, 0.0])
def test_state_and_steps_stay_finite_for_any_gradients(eps, first):
    """Gradients of any size after any other, and after many zeros, during which the factors grow as far as eps allows."""
    sizes = [first, *[0.0] * 400, 1e30, 1.0, *[1e-30] * 50, 1e30, 1.0, 0.0, 1.0]
    rule, W = build_rule(psgd(eps=eps, factor_lr=1.0)), torch.zeros(1, 6, 9)
    state = rule.init_state(W)
    for t, size in enumerate(sizes):
        D = rule.direction(W, gaussian(1, 6, 9, seed=t) * size, state, hyper(1.0, count=t + 1))
        assert D.isfinite().all() and D.square().mean().sqrt() <= MOST * (1 + 1e-5)
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_zero_gradients_give_zero_steps():
    assert not any(D.any() for D in directions(psgd(eps=0.0), [torch.zeros(1, 4, 5)] * 3))
    assert build_rule(psgd(eps=0.0)).eps == LEAST_EPS


@pytest.mark.parametrize("k", [1, 5, 40])
def test_spectral_bound_is_just_below_the_largest_eigenvalue(k):
    A = gaussian(20, k, k + 3)
    gram = A @ A.mT
    share = spectral_bound(gram).flatten() / torch.linalg.eigvalsh(gram)[:, -1]
    assert (share <= 1 + 1e-5).all() and (share > 0.75).all()
    assert not spectral_bound(torch.zeros(1, k, k)).any()
    assert spectral_bound(gram * 1e30).isfinite().all()
