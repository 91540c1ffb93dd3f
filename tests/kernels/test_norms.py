"""RMS norm and unit vector: values and derivatives in closed form, compared with autograd's."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.norms import rms_norm, unit


def plain_unit(x):
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


@given(st.integers(1, 40), st.sampled_from([1e-8, 1.0, 1e8]), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_unit_and_its_derivative(size, scale, seed):
    rng = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(3, size, generator=rng, dtype=torch.float64) for _ in range(2))
    ours, twin = (x * scale).requires_grad_(), (x * scale).requires_grad_()
    unit(ours).backward(g)
    plain_unit(twin).backward(g)
    torch.testing.assert_close(unit(ours), plain_unit(twin), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.grad * scale, twin.grad * scale, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 40), st.sampled_from([1e-8, 1e-4, 1.0, 1e8]), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=30, deadline=None)
def test_rms_norm_and_its_derivative_are_pytorchs(size, scale, dtype):
    rng = torch.Generator().manual_seed(size)
    x, g = (torch.randn(3, size, generator=rng, dtype=dtype) for _ in range(2))
    ours, twin = (x * scale).requires_grad_(), (x * scale).requires_grad_()
    rms_norm(ours).backward(g)
    torch.nn.functional.rms_norm(twin, (size,)).backward(g)
    torch.testing.assert_close(rms_norm(ours), torch.nn.functional.rms_norm(twin, (size,)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.grad * scale, twin.grad * scale, atol=1e-5, rtol=1e-5)


def test_unit_of_zero_is_zero_with_a_finite_derivative():
    x = torch.zeros(2, 4, requires_grad=True)
    unit(x).sum().backward()
    assert not unit(x).any() and x.grad.isfinite().all()
