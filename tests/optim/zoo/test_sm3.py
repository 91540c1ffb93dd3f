"""Test SM3: against its formula, pytorch_optimizer, and Adagrad, whose steps bound those of SM3."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.optim import SM3
from optim.groups import build_rule
from tests.optim.oracle import SHAPES, assert_moved_alike, directions, gaussian, gradients, hyper, train


def sm3(**changes: object) -> SM3:
    return SM3(**dict(lr=0.05, averaging="none") | changes)


def reference(start, grads, *, lr, mu=0.0):
    """Return the weights after all gradients, entry by entry, in float64."""
    W, average = start.double().clone(), torch.zeros_like(start, dtype=torch.float64)
    for k in range(W.size(0)):
        row, column = [0.0] * W.size(1), [0.0] * W.size(2)
        for grad in grads:
            nu = [[min(row[i], column[j]) + grad[k, i, j].item() ** 2 for j in range(W.size(2))] for i in range(W.size(1))]
            step = grad[k].double() / torch.tensor(nu).double().sqrt()
            average[k] = mu * average[k] + (1 - mu) * step
            W[k] -= lr * average[k]
            row, column = [max(entries) for entries in nu], [max(entries) for entries in zip(*nu, strict=True)]
    return W


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mu", [0.0, 0.8])
def test_sm3_matches_its_formula(shape, mu):
    start, grads = gaussian(*shape, seed=99), gradients(*shape, steps=20)
    config = sm3(averaging="ema", momentum=mu, nesterov=False) if mu else sm3()
    assert_moved_alike(train(config, start, grads), reference(start, grads, lr=0.05, mu=mu), start, tolerance=2e-6)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9,)])
def test_sm3_matches_pytorch_optimizer(shape):
    public = pytest.importorskip("pytorch_optimizer")
    start, grads = gaussian(*shape, seed=99), gradients(*shape, steps=25)
    param = torch.nn.Parameter(start.clone())
    optimizer = public.SM3([param], lr=0.05)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    stack = start.reshape(1, -1, shape[-1])
    weights = train(sm3(), stack, [grad.view_as(stack) for grad in grads])
    assert_moved_alike(weights.view(shape), param.detach(), start, tolerance=1e-6)


def test_sm3_of_a_vector_is_adagrad():
    grads = gradients(1, 1, 30, steps=12)
    sums = torch.stack(grads).double().square().cumsum(0)
    for D, grad, total in zip(directions(sm3(), grads), grads, sums, strict=True):
        torch.testing.assert_close(D.double(), grad.double() / total.sqrt(), rtol=1e-5, atol=0)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_steps_are_at_most_adagrads(m, n, seed):
    """nu is at least the sum of squares (the paper's proposition 2)."""
    grads = [gaussian(2, m, n, seed=seed + t) for t in range(5)]
    sums = torch.stack(grads).double().square().cumsum(0)
    for D, grad, total in zip(directions(sm3(), grads), grads, sums, strict=True):
        assert (D.abs() <= grad.abs() / total.sqrt() * (1 + 1e-5)).all()


def test_the_first_step_is_the_sign_and_the_state_is_a_row_and_a_column():
    grad = gaussian(2, 5, 7)
    assert torch.equal(directions(sm3(), [grad])[0], grad.sign())
    state = build_rule(sm3()).init_state(grad.bfloat16())
    assert {key: (tuple(t.shape), t.dtype) for key, t in state.items()} == {
        "row": ((2, 5, 1), torch.float32), "column": ((2, 1, 7), torch.float32)}


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_gradients_does_not_matter(scale):
    rule, grads = build_rule(sm3()), gradients(2, 5, 7, steps=6)
    plain, scaled = rule.init_state(grads[0]), rule.init_state(grads[0])
    for t, grad in enumerate(grads):
        expected = rule.direction(grad, grad, plain, hyper(1.0, count=t + 1))
        D = rule.direction(grad, grad * scale, scaled, hyper(1.0, count=t + 1))
        torch.testing.assert_close(D, expected, rtol=1e-5, atol=0)
