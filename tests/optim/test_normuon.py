"""NorMuon against its formula, a public implementation and its limits."""

import pytest
import torch

from configs.optim import NorMuon
from tests.optim.oracle import (
    SHAPES,
    assert_moved_alike,
    directions,
    gaussian,
    gradients,
    nesterov_means,
    polar,
    train,
)


def normuon(**changes: object) -> NorMuon:
    base = dict(lr=0.02, unit="spectral", ns="svd", beta2=0.9, momentum=0.8)
    return NorMuon(**base | changes)


def twin(start, grads, *, lr, mu, beta2, wd=0.0, dim=-1):
    """Run NorMuon in float64, one matrix after another."""
    weights = []
    for k in range(start.size(0)):
        W, v = start[k].double(), 0
        for average in nesterov_means([g[k] for g in grads], mu):
            U = polar(average)
            v = beta2 * v + (1 - beta2) * U.square().mean(dim, keepdim=True)
            D = U / v.sqrt()
            W = (1 - lr * wd) * W - lr * D * U.norm() / D.norm()
        weights.append(W)
    return torch.stack(weights)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("along", ["rows", "longer"])
def test_normuon_is_its_formula(shape, along):
    start, grads = gaussian(*shape, seed=99, scale=0.1), gradients(*shape, steps=20)
    dim = -2 if along == "longer" and shape[1] < shape[2] else -1
    expected = twin(start, grads, lr=0.02, mu=0.8, beta2=0.9, wd=0.3, dim=dim)
    assert_moved_alike(train(normuon(normalise=along, weight_decay=0.3), start, grads), expected, start, tolerance=3e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize(("unit", "scale"), [("at_least_one", "preserve_norm"), ("match_adam", "match_rms")])
def test_normuon_is_pytorch_optimizers(shape, unit, scale):
    """Check both scalings, of the public code and of the paper. pytorch_optimizer orthogonalises in bfloat16, hence 2 %."""
    public = pytest.importorskip("pytorch_optimizer")
    start, grads = gaussian(*shape, seed=99), gradients(*shape, steps=20)
    param = torch.nn.Parameter(start.clone())
    optimizer = public.NorMuon([dict(params=[param], use_muon=True)], lr=0.02, beta2=0.9, momentum=0.8, update_scale=scale,
                               ns_coeffs=[(2.0, -1.5, 0.5)], ns_steps=12)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    config = normuon(ns="convergent", ns_steps=12, unit=unit)
    actual = train(config, start[None], [g[None] for g in grads])[0]
    assert_moved_alike(actual, param.detach(), start, tolerance=0.02)


def test_the_size_of_the_step_is_muons():
    for shape in SHAPES:
        for D in directions(normuon(unit="at_least_one"), gradients(*shape, steps=3)):
            expected = max(1, shape[1] / shape[2]) ** 0.5 * min(shape[1:]) ** 0.5
            torch.testing.assert_close(D.norm(dim=(-2, -1)), torch.full((2,), expected), rtol=1e-5, atol=0)


def test_rows_become_equally_long_without_memory():
    D = directions(normuon(beta2=0.0), gradients(2, 20, 12, steps=1))[0]
    torch.testing.assert_close(D.norm(dim=-1), torch.full((2, 20), (12 / 20) ** 0.5), rtol=1e-5, atol=0)


def test_wide_matrices_need_the_longer_side():
    """Rows of a wide polar factor already have length 1, so `rows` changes nothing and `longer` does."""
    G = gradients(2, 12, 20, steps=1)
    torch.testing.assert_close(directions(normuon(averaging="none"), G)[0].double(), polar(G[0]), rtol=0, atol=1e-5)
    assert (directions(normuon(averaging="none", normalise="longer"), G)[0] - polar(G[0])).norm() > 0.3


def test_rows_that_are_always_zero_stay_zero():
    grads = gradients(1, 8, 6, steps=4)
    for grad in grads:
        grad[:, 2] = 0
    for D in directions(normuon(ns="quintic"), grads):
        assert D.isfinite().all() and not D[:, 2].any() and D[:, 3].any()
