"""The fused kernels on CPUs, in Triton's interpreter; test_paths.py runs this file in a process of its own.

TRITON_INTERPRET=1 selects the interpreter and must be set before Triton is imported, but not for the other tests.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from configs.schema import Model
from kernels import cross_entropy
from kernels.cross_entropy import fused_cross_entropy, softcap, softcap_cross_entropy
from model import GPT

CAP = 5.0
KINDS = ("none", "tanh", "rational", "asymmetric")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, the last one partial, at sizes that are fast in the interpreter."""
    monkeypatch.setattr(cross_entropy, "BLOCK", 32)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def exact(x: Tensor) -> Tensor:
    return leaf(x.double())


def assert_near(result: Tensor, twin: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Compare up to the rounding of `dtype`, relative to the largest entry."""
    scale = twin.abs().max().item()
    bound = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype] * scale
    torch.testing.assert_close(result.double(), twin.double(), rtol=0, atol=bound)


# ---- Cross-entropy of logits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [77, 5])
def test_rows_and_their_gradients(kind, dtype, columns):
    """Each row has its own upstream gradient, one of them 0, one negative; the third target is ignored."""
    z = leaf(8 * gaussian(5, columns, dtype=dtype))
    targets, upstream = torch.tensor([0, columns - 1, -100, 3, 2]), torch.tensor([0.3, -2.0, 1.0, 0.0, 7.0])
    loss = fused_cross_entropy(z, targets, kind, CAP)
    (loss * upstream).sum().backward()
    twin_z = exact(z)
    twin = F.cross_entropy(softcap(twin_z, kind, CAP), targets, reduction="none")
    (twin * upstream).sum().backward()
    assert loss.dtype == torch.float32 and z.grad.dtype == dtype and loss[2] == 0 and not z.grad[2:4].any()
    assert_near(loss, twin)
    assert_near(z.grad, twin_z.grad, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_do_not_overflow(kind):
    """exp(200) is infinite in float32. In one row the largest logit is in the first block, in the other in the last."""
    z = torch.zeros(2, 70)
    z[0, 3], z[0, 40], z[1, 69] = 200.0, -300.0, 1000.0
    z = leaf(z)
    targets = torch.tensor([40, 69])
    fused_cross_entropy(z, targets, kind, CAP).sum().backward()
    twin_z = exact(z)
    F.cross_entropy(softcap(twin_z, kind, CAP), targets, reduction="sum").backward()
    assert_near(fused_cross_entropy(z, targets, kind, CAP).sum(), softcap_cross_entropy(z.double(), targets, kind, CAP))
    assert_near(z.grad, twin_z.grad)


def test_no_gradient_is_made_where_none_is_asked_for():
    z, targets = gaussian(3, 40), torch.tensor([1, 2, 3])
    loss, grad = cross_entropy.cross_entropy_and_grad(z, targets, "tanh", CAP, False)
    assert grad.shape == (0, 40)
    again = fused_cross_entropy(z, targets, "tanh", CAP)
    assert torch.equal(loss, again) and not again.requires_grad


def test_a_second_derivative_is_an_error():
    """The stored gradient is a constant to autograd: without the error the second derivative would be wrong."""
    z = leaf(gaussian(2, 7))
    loss = fused_cross_entropy(z, torch.tensor([1, 2]), "tanh", CAP)
    grad, = torch.autograd.grad(loss.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- In the model, and compiled --------------------------------------------------------------------------------------


def build(config: Model) -> GPT:
    torch.manual_seed(0)
    # on_cuda selects the kernels, although the tensors are on the CPU.
    return GPT(config, vocab_size=50, max_tokens=16, on_cuda=True)


@pytest.mark.parametrize("changes", [{}, {"tied_head": True}, {"biases": True}], ids=str)
def test_the_model_fused_is_the_plain_model(changes, monkeypatch):
    """Loss and gradients to float32's rounding."""
    monkeypatch.setattr(kernels, "KERNEL_DTYPE", torch.float32)
    config = Model(layers=1, dim=32, head_dim=16, mlp_dim=40, zero_init_projections=False, **changes)
    plain = build(replace(config, fused="off"))
    monkeypatch.setattr(kernels, "device_paths", lambda device: kernels.Paths("triton", "plain", False, "for the test"))
    model = build(config)
    assert model.paths.loss == "triton" and plain.paths.loss == "plain"
    tokens, targets = torch.randint(50, (2, 2, 8), generator=torch.Generator().manual_seed(1))
    loss, twin = model(tokens, targets), plain(tokens, targets)
    assert loss.item() == pytest.approx(twin.item(), rel=1e-6)
    loss.backward()
    twin.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_near(p.grad, q.grad)
    with torch.no_grad():
        assert model(tokens, targets).item() == pytest.approx(twin.item(), rel=1e-6)


def test_the_kernel_compiles_into_one_graph():
    hidden, weight, targets = leaf(gaussian(8, 16)), leaf(gaussian(40, 16, seed=1)), torch.arange(8)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return fused_cross_entropy(F.linear(h, w), targets, "tanh", CAP).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=False)
    gradients = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    for a, b in zip(gradients, torch.autograd.grad(loss(hidden, weight), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)
