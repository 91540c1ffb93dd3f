"""Shampoo, SOAP and SOAP-Muon: their limits without memory, slow twins, public code; and grafting."""

import pytest
import torch
from torch import Tensor

from configs.groups import Group
from optim.newton_schulz import orthogonalize_svd
from optim.rules import Hyper, build_rule
from optim.rules.kronecker import eigenbasis, turn_basis
from optim.rules.shampoo import inverse_root_newton, matrix_power
from optim.step import Step
from tests.optim.rules.oracle import gaussian

SHAPES = [(2, 12, 20), (2, 20, 12), (2, 16, 16)]


def hyper(count: int, *, lr: float = 0.01, momentum: float = 0.9) -> Hyper:
    return Hyper(*(torch.tensor(float(x)) for x in (lr, 0, momentum, count)))


def directions(group: Group, grads: list[Tensor]) -> list[Tensor]:
    rule = build_rule(group)
    state = rule.init_state(torch.zeros_like(grads[0]))
    return [rule.direction(torch.zeros_like(g), g, state, hyper(i)) for i, g in enumerate(grads, start=1)]


def well_separated(shape: tuple[int, ...]) -> Tensor:
    """Singular values from 1 to 4, evenly: eigenvectors are determined."""
    U, S, Vh = torch.linalg.svd(gaussian(*shape), full_matrices=False)
    return (U * torch.linspace(4, 1, S.size(-1))) @ Vh


def low_rank(shape: tuple[int, ...]) -> Tensor:
    return gaussian(shape[0], shape[1], 3) @ gaussian(shape[0], 3, shape[2], seed=1)


# ---- Limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("root", ["eigh", "newton"])
@pytest.mark.parametrize("sides", ["both", "smaller"])
def test_shampoo_without_memory_is_the_polar_factor(shape, root, sides):
    """(G G^T)^-1/4 G (G^T G)^-1/4 = U V^T, and (G G^T)^-1/2 G likewise (Bernstein & Newhouse 2024)."""
    G = well_separated(shape)
    step, = directions(Group(rule="shampoo", averaging="none", gram_beta=0, eps=0, root=root, sides=sides), [G])
    torch.testing.assert_close(step, orthogonalize_svd(G), rtol=0, atol=5e-5)


def test_shampoo_of_low_rank_is_the_polar_factor_of_what_is_there():
    G = low_rank((2, 12, 20))
    step, = directions(Group(rule="shampoo", averaging="none", gram_beta=0, eps=0), [G])
    U, _, Vh = torch.linalg.svd(G)
    torch.testing.assert_close(step, U[..., :3] @ Vh[..., :3, :], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_soap_without_memory_is_the_polar_factor(shape):
    """In its own singular basis a gradient is diagonal: the sign of its entries there is U V^T, where eps keeps the
    rounding of the other entries small."""
    G = well_separated(shape)
    _, step = directions(Group(rule="soap", beta1=0, beta2=0, gram_beta=0, eps=1e-3), [G, G])
    torch.testing.assert_close(step, orthogonalize_svd(G), rtol=0, atol=1e-2)


def test_soap_moves_nothing_by_the_gradient_that_makes_its_basis():
    assert not directions(Group(rule="soap"), [gaussian(1, 6, 9)])[0].any()


def test_soap_muons_first_step_is_muons():
    G = gaussian(2, 6, 9)
    found, = directions(Group(rule="soap_muon"), [G])
    wanted, = directions(Group(rule="steepest"), [G])
    torch.testing.assert_close(found, wanted)


# ---- Slow twins ------------------------------------------------------------------------------------------------------


def power(A: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    return vectors @ torch.diag(values.clamp_min(1e-300) ** p) @ vectors.T


def shampoo_twin(grads: list[Tensor], *, beta: float, mu: float, every: int) -> list[Tensor]:
    m, n = grads[0].shape
    L, R, M, found = torch.zeros(m, m).double(), torch.zeros(n, n).double(), torch.zeros(m, n).double(), []
    for t, G in enumerate(grads, start=1):
        L, R = beta * L + (1 - beta) * G @ G.T, beta * R + (1 - beta) * G.T @ G
        if (t - 1) % every == 0:
            roots = [power(A / (1 - beta**t) + 1e-4 * torch.linalg.eigvalsh(A / (1 - beta**t))[-1]
                           * torch.eye(len(A)).double(), -0.25) for A in (L, R)]
        M = mu * M + (1 - mu) * G
        found.append(roots[0] @ (mu * M + (1 - mu) * G) @ roots[1])
    return found


@pytest.mark.parametrize("every", [1, 4])
def test_shampoo_is_its_formula(every):
    grads = [gaussian(1, 8, 12, seed=i) for i in range(20)]
    found = directions(Group(rule="shampoo", gram_beta=0.9, eps=1e-4, every_steps=every), grads)
    wanted = shampoo_twin([g[0].double() for g in grads], beta=0.9, mu=0.9, every=every)
    for step, twin in zip(found, wanted, strict=True):
        torch.testing.assert_close(step[0].double(), twin, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("every", [1, 3])
def test_soap_muon_is_its_formula(every):
    """The twin keeps bases in float64 and permutes by loops. Square: else the first gradient leaves part of a basis free."""
    grads = [gaussian(1, 7, 7, seed=i) for i in range(20)]
    group = Group(rule="soap_muon", ns="svd", norm="spectral", gram_beta=0.9, beta2=0.8, eps=1e-8, every_steps=every)
    L, R, V, M = (torch.zeros(*s).double() for s in ((7, 7),) * 4)
    for t, (step, grad) in enumerate(zip(directions(group, grads), grads, strict=True), start=1):
        G = grad[0].double()
        M = 0.9 * M + 0.1 * G
        u = 0.9 * M + 0.1 * G
        if t > 1:
            P = QL.T @ u @ QR  # noqa: F821
            V = 0.8 * V + 0.2 * P**2
            u = QL @ (P / (V.sqrt() + 1e-8)) @ QR.T  # noqa: F821
        torch.testing.assert_close(step[0].double(), orthogonalize_svd(u), rtol=0, atol=2e-3)
        L, R = 0.9 * L + 0.1 * G @ G.T, 0.9 * R + 0.1 * G.T @ G
        if t == 1:
            QL, QR = (torch.linalg.eigh(A)[1].flip(-1) for A in (L, R))
        elif (t - 1) % every == 0:
            rows = sorted(range(7), key=lambda i: -(QL[:, i] @ L @ QL[:, i]).item())
            columns = sorted(range(7), key=lambda i: -(QR[:, i] @ R @ QR[:, i]).item())
            QL, QR = torch.linalg.qr(L @ QL[:, rows])[0], torch.linalg.qr(R @ QR[:, columns])[0]
            V = V[rows][:, columns]


def test_soap_is_the_public_one():
    """pytorch_optimizer's SOAP, itself equal to the authors' within 7e-7, over 20 steps."""
    public = pytest.importorskip("pytorch_optimizer")
    start, grads = gaussian(1, 9, 9, seed=99), [gaussian(1, 9, 9, seed=i) for i in range(20)]
    param = torch.nn.Parameter(start[0].clone())
    optimizer = public.SOAP([param], lr=0.01, betas=(0.9, 0.95), shampoo_beta=0.95, eps=1e-8, weight_decay=0.0,
                            precondition_frequency=5)
    group = Group(rule="soap", beta1=0.9, beta2=0.95, gram_beta=0.95, eps=1e-8, every_steps=5)
    rule, W = build_rule(group), start.clone()
    state = rule.init_state(W)
    for count, grad in enumerate(grads, start=1):
        param.grad = grad[0].clone()
        optimizer.step()
        rule.update(W, grad, state, hyper(count), step=Step())
    moved = (param.detach() - start[0]).norm()
    assert (W[0] - param.detach()).norm() < 1e-4 * moved


# ---- Pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-0.25, -0.5])
def test_roots_agree_with_float64(exponent):
    G = gaussian(3, 10, 14)
    A = G @ G.mT * torch.tensor([1e-12, 1.0, 1e12]).view(3, 1, 1)
    for root in (matrix_power, inverse_root_newton):
        found = root(A, exponent, eps=1e-6)
        for one, gram in zip(found, A.double(), strict=True):
            lifted = gram + 1e-6 * torch.linalg.eigvalsh(gram)[-1] * torch.eye(10).double()
            torch.testing.assert_close(one.double(), power(lifted, exponent), rtol=2e-3, atol=1e-3 * one.abs().max().item())
        assert not root(torch.zeros(1, 4, 4), exponent, eps=0.0).any()


def test_a_turned_basis_is_orthonormal_sorted_and_converges():
    G = gaussian(2, 7, 30) * torch.logspace(0, 1, 7).view(1, 7, 1)
    A = G @ G.mT
    Q = eigenbasis(gaussian(2, 7, 7) @ gaussian(2, 7, 7).mT)
    for _ in range(200):
        order = turn_basis(A, Q)
        assert sorted(order[0].tolist()) == list(range(7))
    torch.testing.assert_close(Q.mT @ Q, torch.eye(7).expand(2, 7, 7), rtol=0, atol=1e-5)
    inner = Q.mT @ A @ Q
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert (values.diff(dim=-1) <= 0).all()
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-3 * values.max()


# ---- Grafting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "size"), [("shampoo", "adam"), ("sm3", "shampoo"), ("steepest", "adam"), ("soap", "adam")])
def test_a_graft_has_ones_direction_and_the_others_size(way, size):
    grads = [gaussian(2, 6, 9, seed=i) for i in range(5)]
    found = directions(Group(rule=way, graft=size), grads)[-1]
    one, other = directions(Group(rule=way), grads)[-1], directions(Group(rule=size), grads)[-1]
    for A, B, C in zip(found, one, other, strict=True):
        torch.testing.assert_close(A.norm(), C.norm(), rtol=1e-5, atol=0)
        torch.testing.assert_close(A / A.norm(), B / B.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("group", "message"), [
    (dict(rule="adam", graft="adam"), "another rule"), (dict(rule="prodigy", graft="adam"), "cannot be grafted"),
    (dict(gram_beta=1.5), "gram_beta"), (dict(exponent=0.5), "exponent"),
])
def test_what_cannot_be_is_refused(group, message):
    with pytest.raises(ValueError, match=message):
        Group(**group)
