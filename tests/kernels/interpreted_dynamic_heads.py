"""The kernels of dynamic_heads.py on CPUs, in Triton's interpreter; test_interpreted.py runs this file by itself."""

import pytest
import torch
from torch import Tensor

from kernels.attention import document_first
from kernels.dynamic_heads import dynamic_heads, fused_dynamic_heads, mixed_heads, mixed_heads_backward

B, H, D = 2, 3, 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(tokens: int, width: int = D) -> list[Tensor]:
    """q, k, v, a, b and the gradient by the result, in float64; `width`: of q and k."""
    shapes = [(B, tokens, H, width)] * 2 + [(B, tokens, H, D)] + [(B, tokens, H)] * 2 + [(B, tokens, H, D)]
    return [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def documents(tokens: int) -> Tensor:
    starts = torch.zeros(B, tokens, dtype=torch.bool)
    starts[0, 5::9], starts[1, 17::40] = True, True
    return document_first(starts)


def values_and_gradients(function, inputs: list[Tensor], dtype: torch.dtype, **options) -> list[Tensor]:
    """Result and gradients by q, k, v (of `dtype`), a and b (float32, or float64 with q)."""
    other = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(dtype if n < 3 else other).requires_grad_() for n, x in enumerate(inputs[:5])]
    y = function(tuple(leaves[:3]), tuple(leaves[3:]), **options)
    assert y.dtype == dtype
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs[5].to(dtype))]


@pytest.mark.parametrize(("tokens", "window", "by_document"), [(1, 4, False), (16, 1, True), (37, 5, True), (50, 49, False),
                                                               (130, 113, True)])
def test_kernels_equal_the_plain_twin(tokens, window, by_document, monkeypatch):
    """All values and gradients to float32's rounding; the twin computes in float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # only the twin casts what is float64
    inputs, options = case(tokens), {"first_BT": documents(tokens) if by_document else None, "window": window, "scale": 0.25}
    twin = values_and_gradients(dynamic_heads, inputs, torch.float64, **options)
    monkeypatch.undo()
    results = values_and_gradients(fused_dynamic_heads, inputs, torch.float32, **options)
    for result, expected in zip(results, twin, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=3e-6 * max(1, expected.abs().max().item()))


def test_narrow_queries_and_keys():
    """The kernels get them padded with zeros; their gradients have their own width."""
    inputs, options = case(37, width=12), {"first_BT": documents(37), "window": 9, "scale": 0.25}
    twin = values_and_gradients(dynamic_heads, [x.float() for x in inputs], torch.float32, **options)
    results = values_and_gradients(fused_dynamic_heads, inputs, torch.float32, **options)
    for result, expected in zip(results, twin, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


def test_kernels_in_half_precision():
    """Rounding of the result, and of the weights before their product with values."""
    inputs, options = case(60), {"first_BT": documents(60), "window": 20, "scale": 0.25}
    twin = values_and_gradients(dynamic_heads, [x.half().double() for x in inputs], torch.float32, **options)
    results = values_and_gradients(fused_dynamic_heads, inputs, torch.float16, **options)
    for result, expected in zip(results, twin, strict=True):
        assert (result.float() - expected).norm() < 2e-3 * expected.norm()


def test_gradients_do_not_depend_on_tokens_of_other_documents():
    q, k, v, a, _, du = (x.float() for x in case(40))
    first = document_first(torch.arange(40)[None].expand(B, -1) == 23).int()
    results = []
    for factor in (1.0, 100.0):
        k[:, :23] *= factor
        _, logsum = mixed_heads(q, k, v, a, first, 30, 0.25)
        results.append([x[:, 23:] for x in mixed_heads_backward(du, q, k, v, a, first, logsum, 30, 0.25)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_strided_inputs():
    """Views of one tensor, such as a product that gives q, k and v together."""
    q, k, v, a, b, _ = (x.float() for x in case(33))
    options = {"first_BT": None, "window": 9, "scale": 0.25}
    together = torch.stack((q, k, v), dim=2).unbind(2)
    assert torch.equal(fused_dynamic_heads(together, (a, b), **options), fused_dynamic_heads((q, k, v), (a, b), **options))
