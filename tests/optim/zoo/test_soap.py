"""Test SOAP and SOAP-Muon: against a slow float64 reference, pytorch_optimizer, and the update of the bases."""

import pytest
import torch

from configs.optim import SOAP, Muon, SOAPMuon
from optim.groups import build_rule
from optim.newton_schulz import orthogonalize_svd
from optim.rule import Step
from optim.zoo.shampoo import eigenbasis, iterate_eigenbasis
from tests.optim.oracle import directions, gaussian, hyper


def test_the_first_step_of_soap_muon_is_muons():
    G = gaussian(2, 6, 9)
    step, = directions(SOAPMuon(), [G])
    expected, = directions(Muon(), [G])
    torch.testing.assert_close(step, expected)


@pytest.mark.parametrize("every", [1, 3])
def test_soap_muon_matches_its_formula(every):
    """Square matrices, because the first gradient of others leaves part of a basis undetermined."""
    grads = [gaussian(1, 7, 7, seed=i) for i in range(20)]
    config = SOAPMuon(momentum=0.9, ns="svd", gram_beta=0.9, beta2=0.8, eps=1e-8, every_steps=every, unit="spectral")
    L, R, V, M = (torch.zeros(*s).double() for s in ((7, 7),) * 4)
    for t, (step, grad) in enumerate(zip(directions(config, grads), grads, strict=True), start=1):
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


def test_soap_matches_pytorch_optimizer():
    """In 20 steps; pytorch_optimizer's SOAP is equal to the authors' within 7e-7."""
    public = pytest.importorskip("pytorch_optimizer")
    start, grads = gaussian(1, 9, 9, seed=99), [gaussian(1, 9, 9, seed=i) for i in range(20)]
    param = torch.nn.Parameter(start[0].clone())
    optimizer = public.SOAP([param], lr=0.01, betas=(0.9, 0.95), shampoo_beta=0.95, eps=1e-8, weight_decay=0.0,
                            precondition_frequency=5)
    config = SOAP(beta1=0.9, beta2=0.95, gram_beta=0.95, eps=1e-8, every_steps=5)
    rule, W = build_rule(config), start.clone()
    state = rule.init_state(W)
    for count, grad in enumerate(grads, start=1):
        param.grad = grad[0].clone()
        optimizer.step()
        rule.update(W, grad, state, hyper(0.01, count=count), step=Step())
    moved = (param.detach() - start[0]).norm()
    assert (W[0] - param.detach()).norm() < 1e-4 * moved


def test_orthogonal_iteration_gives_sorted_eigenvectors():
    G = gaussian(2, 7, 30) * torch.logspace(0, 1, 7).view(1, 7, 1)
    A = G @ G.mT
    Q = eigenbasis(gaussian(2, 7, 7) @ gaussian(2, 7, 7).mT)
    for _ in range(200):
        order = iterate_eigenbasis(A, Q)
        assert sorted(order[0].tolist()) == list(range(7))
    torch.testing.assert_close(Q.mT @ Q, torch.eye(7).expand(2, 7, 7), rtol=0, atol=1e-5)
    inner = Q.mT @ A @ Q
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert (values.diff(dim=-1) <= 0).all()
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-3 * values.max()
