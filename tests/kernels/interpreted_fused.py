"""The fused kernels on CPUs, in Triton's interpreter; test_interpreted.py runs this file in a process of its own.

TRITON_INTERPRET=1 selects the interpreter and must be set before Triton is imported, but not for the other tests.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from configs.model import SPHERE_NEEDS
from configs.schema import Model
from kernels import cross_entropy, fp8
from kernels.cross_entropy import AuxLossWeights, Softcap, head_cross_entropy, loss_and_grad, softcap_cross_entropy
from model import GPT
from tests.kernels.twins import gaussian

CAP = 5.0
KINDS = ("none", "tanh", "rational", "asymmetric")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, the last one partial, at sizes that are fast in the interpreter."""
    monkeypatch.setattr(cross_entropy, "BLOCK", 32)
    monkeypatch.setattr(fp8, "SIDE", 16)


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


TARGETS = torch.tensor([[0, 76, -1, 3, 2], [76, 76, 5, -1, 2], [1, -1, 5, -100, 40], [9, 8, 7, 6, 2]])
WEIGHTS = torch.tensor([1.0, 0.5, 0.25, 0.125])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_rows_and_their_gradients(kind, dtype, terms):
    """Several targets of a row may be the same class; targets below 0 are ignored, in one row all of them."""
    z, cap = 8 * gaussian(5, 77, dtype=dtype), Softcap(kind, CAP)
    targets, weights = TARGETS[:terms], WEIGHTS[:terms]
    loss, grad = loss_and_grad(z, targets, weights, cap, with_grad=True)
    twin_z = exact(z)
    twin = softcap_cross_entropy(twin_z, targets.clamp_min(-1), weights.double(), cap)
    twin.backward()
    assert loss.dtype == torch.float32 and grad.dtype == dtype and not (terms == 1 and grad[2].any())
    assert_near(loss.sum(), twin)
    assert_near(grad, twin_z.grad, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_do_not_overflow(kind):
    """exp(200) is infinite in float32. In one row the largest logit is in the first block, in the other in the last."""
    z, targets, cap = torch.zeros(2, 70), torch.tensor([[40, 69]]), Softcap(kind, CAP)
    z[0, 3], z[0, 40], z[1, 69] = 200.0, -300.0, 1000.0
    loss, grad = loss_and_grad(z, targets, torch.ones(1), cap, with_grad=True)
    twin_z = exact(z)
    twin = softcap_cross_entropy(twin_z, targets, torch.ones(1), cap)
    twin.backward()
    assert_near(loss.sum(), twin)
    assert_near(grad, twin_z.grad)


def test_no_gradient_is_made_where_none_is_asked_for():
    z, targets, cap = gaussian(3, 40), torch.tensor([[1, 2, 3]]), Softcap("tanh", CAP)
    loss, grad = loss_and_grad(z, targets, torch.ones(1), cap, with_grad=False)
    assert grad.shape == (0, 40)
    assert torch.equal(loss, loss_and_grad(z, targets, torch.ones(1), cap, with_grad=True)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_8_bit_gradients(kind):
    """e5m2 of the gradient over the scale; the interpreter rounds to 8 bits less exactly than a GPU. Entries beyond
    the largest number become that number."""
    z, cap = 8 * gaussian(5, 77), Softcap(kind, CAP)
    _, grad = loss_and_grad(z, TARGETS, WEIGHTS, cap, with_grad=True)
    scale = 2 / torch.finfo(torch.float8_e5m2).max
    _, g8 = loss_and_grad(z, TARGETS, WEIGHTS, cap, with_grad=True, grad_scale=scale)
    assert g8.dtype == torch.float8_e5m2
    error = (g8.float() * scale - grad).abs()
    assert (error <= 0.5 * grad.abs() + 2**-14 * scale).all() and error.sum() < 0.15 * grad.abs().sum()
    _, clipped = loss_and_grad(z, TARGETS, WEIGHTS, cap, with_grad=True, grad_scale=scale / 100)
    assert clipped.float().isfinite().all() and clipped.float().abs().max() == torch.finfo(torch.float8_e5m2).max


# ---- Head and loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factor", [1.0, -3.0, 1 / 131_072])
def test_head_and_loss_for_any_upstream_factor(bias, factor):
    """The stored gradient is that of the summed loss; a factor of the loss is applied to the products."""
    cap, x, weight = Softcap("tanh", CAP), gaussian(5, 16), gaussian(77, 16, seed=1)
    b = gaussian(77, seed=2) if bias else None
    leaves, twins = ([None if t is None else make(t) for t in (x, weight, b)] for make in (leaf, exact))
    loss = head_cross_entropy(leaves[0], tuple(leaves[1:]), TARGETS, WEIGHTS, cap)
    twin = softcap_cross_entropy(F.linear(*twins), TARGETS.clamp_min(-1), WEIGHTS.double(), cap)
    (loss * factor).backward()
    (twin * factor).backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert_near(loss, twin)
    for a, t in zip(leaves, twins, strict=True):
        if a is not None:
            assert_near(a.grad, t.grad)


def test_a_second_derivative_is_an_error():
    """The stored gradient is a constant to autograd: without the error the second derivative would be wrong."""
    x, weight = leaf(gaussian(2, 16)), leaf(gaussian(7, 16, seed=1))
    loss = head_cross_entropy(x, (weight, None), torch.tensor([[1, 2]]), torch.ones(1), Softcap("tanh", CAP))
    grad, = torch.autograd.grad(loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_loss_without_gradients_is_the_same():
    x, weight, cap = leaf(gaussian(5, 16)), gaussian(77, 16, seed=1), Softcap("rational", CAP)
    loss = head_cross_entropy(x, (weight, None), TARGETS, WEIGHTS, cap)
    with torch.no_grad():
        again = head_cross_entropy(x, (weight, None), TARGETS, WEIGHTS, cap)
    assert torch.equal(loss, again) and not again.requires_grad


# ---- 8-bit products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [fp8.FORWARD, fp8.BACKWARD])
@pytest.mark.parametrize(("shape", "multiple"), [((37, 50), 16), ((32, 16), 16), ((5, 70), 1)])
def test_transposed_copies(dtype, shape, multiple):
    x = gaussian(*shape).to(dtype)
    y, padding = fp8.transpose(x, multiple), -shape[0] % multiple
    assert y.dtype == dtype and y.is_contiguous() and torch.equal(y.float(), F.pad(x.float(), (0, 0, 0, padding)).mT)


@pytest.mark.parametrize("tokens", [5, 16])
@pytest.mark.parametrize(("kind", "grad_max"), [("static", 96.0), ("dynamic", 0.0), ("delayed", 0.0)])
def test_the_8_bit_head_is_its_formula(tokens, kind, grad_max):
    """Equal to plain products of the rounded operands, and near the exact gradients; for any upstream factor."""
    config = Model(dim=32, head_dim=16, fp8="head", fp8_scales=kind, fp8_grad_max=grad_max, fp8_x_max=4.0,
                   mtp_weights=(0.5, 0.25), prefix_loss=0.125)
    head, cap = fp8.Fp8Head(config), Softcap(config.softcap, config.softcap_value)
    x, weight = leaf(gaussian(tokens, 32)), leaf(gaussian(96, 32, seed=1) / 4)
    targets = torch.arange(4 * tokens).view(4, tokens) - 1
    loss = head(x, weight, targets, WEIGHTS)
    (loss * 1e-5).backward()
    # The same with plain products and the gradient as the kernel rounded it.
    scale_x, scale_w = (scaling(t) for scaling, t in zip(fp8.scalings(config, kind), (x, weight), strict=True))
    x8, w8 = (fp8.quantise(t, s, fp8.FORWARD) for t, s in ((x, scale_x), (weight, scale_w)))
    z = fp8.plain_product(x8, w8, scale_x, scale_w, dtype=torch.float32).detach()
    scale_g = torch.tensor(head.grad_scale)
    losses, g8 = loss_and_grad(z, targets, WEIGHTS, cap, with_grad=True, grad_scale=head.grad_scale)
    assert_near(loss, losses.sum())
    g = g8.float() * scale_g * 1e-5
    assert_near(x.grad, g @ (w8.float() * scale_w))
    assert_near(weight.grad, g.mT @ (x8.float() * scale_x))
    twins = exact(x), exact(weight)
    (softcap_cross_entropy(F.linear(*twins), targets, WEIGHTS.double(), cap) * 1e-5).backward()
    for a, t in zip((x, weight), twins, strict=True):
        assert F.cosine_similarity(a.grad.flatten(), t.grad.flatten(), dim=0) > 0.98
        assert a.grad.norm().item() == pytest.approx(t.grad.norm().item(), rel=0.1)


@pytest.mark.parametrize("name", ["head", "head_mlp"])
@pytest.mark.parametrize("kind", ["dynamic", "delayed", "static"])
def test_gradients_of_the_8_bit_model_are_near_the_plain_ones(name, kind, monkeypatch):
    monkeypatch.setattr(kernels, "KERNEL_DTYPE", torch.float32)
    monkeypatch.setattr(kernels, "device_paths", lambda device: kernels.Paths("triton", "plain", "head_mlp", "for the test"))
    small = Model(dim=32, head_dim=16, zero_init_projections=False, mtp_weights=(0.5,), fp8_weight_max=1.0, fp8_x_max=8.0)
    model, plain = build(replace(small, fp8=name, fp8_scales=kind)), build(replace(small, fused="off"))
    assert list(model.state_dict()) == list(plain.state_dict()) and model.roles() == plain.roles()
    tokens, targets = torch.randint(50, (2, 2, 16), generator=torch.Generator().manual_seed(1))
    aux = AuxLossWeights(mtp=torch.tensor([0.5]))
    losses = [m(tokens, targets, aux_weights=aux) for m in (model, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02) and losses[0] != losses[1]
    gradients = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (model, plain), strict=True)]
    for role, a, b in zip(model.roles(), *gradients, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.97, role
    with torch.no_grad():  # validation and sampling are not in 8 bits
        assert torch.equal(model(tokens), plain(tokens))
        assert model(tokens, targets).item() == pytest.approx(plain(tokens, targets).item(), rel=1e-6)


# ---- In the model, and compiled --------------------------------------------------------------------------------------


def build(config: Model) -> GPT:
    torch.manual_seed(0)
    # on_cuda selects the kernels, although the tensors are on the CPU.
    return GPT(config, vocab_size=50, max_tokens=16, prefix_of=[-1, *range(49)], on_cuda=True)


@pytest.mark.parametrize("changes", [{}, {"tied_head": True}, {"biases": True}, {"geometry": "sphere"} | SPHERE_NEEDS],
                         ids=["plain", "tied", "biases", "sphere"])
@pytest.mark.parametrize("aux", [None, AuxLossWeights(torch.tensor([0.5, 0.25]), torch.tensor([0.1]))], ids=["one", "four"])
def test_the_model_fused_is_the_plain_model(changes, aux, monkeypatch):
    """Loss and gradients to float32's rounding."""
    monkeypatch.setattr(kernels, "KERNEL_DTYPE", torch.float32)
    config = Model(layers=1, dim=32, head_dim=16, mlp_dim=64, prefix_loss=0.1,
                   **{"zero_init_projections": False} | changes)
    plain = build(replace(config, fused="off"))
    monkeypatch.setattr(kernels, "device_paths", lambda device: kernels.Paths("triton", "triton", "none", "for the test"))
    model = build(config)
    assert model.paths.loss == "triton" and plain.paths.loss == "plain"
    assert (model.paths.relu2 == "triton") == (not config.biases and config.geometry == "euclidean")
    tokens, targets = torch.randint(50, (2, 2, 8), generator=torch.Generator().manual_seed(1))
    loss, twin = (m(tokens, targets, aux_weights=aux) for m in (model, plain))
    assert loss.item() == pytest.approx(twin.item(), rel=1e-6)
    loss.backward()
    twin.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_near(p.grad, q.grad)
    with torch.no_grad():
        assert model(tokens, targets, aux_weights=aux).item() == pytest.approx(twin.item(), rel=1e-6)


def test_the_kernels_compile_into_one_graph():
    hidden, weight, head, targets = (leaf(gaussian(8, 16)), leaf(gaussian(32, 16, seed=1)), leaf(gaussian(48, 32, seed=2)),
                                     torch.arange(8))

    def loss(h: Tensor, w: Tensor, v: Tensor) -> Tensor:
        up = F.linear(h, w).relu().square()
        rows = cross_entropy.stack_targets(targets.view(2, 4), AuxLossWeights(WEIGHTS[1:2]), None)
        loss = head_cross_entropy(up, (v, None), *rows, Softcap("tanh", CAP)) * 0.1
        return loss + 0.1 * in_8_bits(up, v, *rows)

    in_8_bits = fp8.Fp8Head(Model(dim=32, head_dim=16, fp8="head", fp8_scales="static", fp8_x_max=16.0))
    leaves = (hidden, weight, head)
    plain = torch.autograd.grad(loss(*leaves), leaves)  # this also defines the operators, before the graph is traced
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=False)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), plain, strict=True):
        torch.testing.assert_close(a, b)
