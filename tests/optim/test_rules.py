"""Rules: AdamW and Muon against PyTorch's and plain formulas; Signum, normalised SGD, averages, decay, bfloat16."""

import math

import pytest
import torch
from torch import Tensor

from configs.groups import Group
from optim.rules import RULES, Hyper
from optim.rules.adam import Adam
from optim.step import Step

STEPS = 30
QUINTIC = (3.4445, -4.7750, 2.0315)


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def hyper(lr: float, *, wd: float = 0.0, momentum: float = 0.95, count: int = 1) -> Hyper:
    return Hyper(*(torch.tensor(float(x)) for x in (lr, wd, momentum, count)))


def warm_then_cold(step: int) -> float:
    """A learning rate that is never twice the same."""
    return 0.02 * min(1, (step + 1) / 10) * (1 - 0.02 * step)


def train(group: Group, start: Tensor, grads: list[Tensor], *, lr=warm_then_cold, momentum=lambda step: 0.95) -> Tensor:
    """The weights after all gradients; neither the start nor the gradients may change."""
    rule, W = RULES[group.rule].build(group), start.clone()
    state = rule.init_state(W)
    step_of = Step.build(group)
    state |= step_of.init_state(W)
    for step, grad in enumerate(grads):
        kept = grad.clone()
        now = hyper(lr(step), wd=group.weight_decay, momentum=momentum(step), count=step + 1)
        rule.update(W, grad, state, now, step=step_of)
        assert torch.equal(grad, kept)
    return W


def assert_moved_alike(found: Tensor, wanted: Tensor, start: Tensor, *, tolerance: float) -> None:
    """Equal within a share of the distance moved."""
    moved = (wanted.double() - start.double()).norm()
    assert moved > 0
    assert (found.double() - wanted.double()).norm() <= tolerance * moved


def gradients(*shape: int, steps: int = STEPS) -> list[Tensor]:
    """Of several magnitudes, with one element that is always zero."""
    found = [gaussian(*shape, seed=i, scale=10.0 ** (i % 3 - 1)) for i in range(steps)]
    for grad in found:
        grad.view(-1)[3] = 0
    return found


# ---- Adam ----------------------------------------------------------------------------------------


def torch_adamw(group: Group, start: Tensor, grads: list[Tensor]) -> Tensor:
    param = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([param], betas=(group.beta1, group.beta2), eps=group.eps,
                                  weight_decay=group.weight_decay, fused=False, foreach=False)
    for step, grad in enumerate(grads):
        optimizer.param_groups[0]["lr"] = warm_then_cold(step)
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("group", [
    Group(weight_decay=0.1), Group(beta1=0.9, beta2=0.999, eps=1e-8), Group(eps=0.3, weight_decay=0.01),
    Group(beta1=0.0),
])
def test_adam_is_pytorchs_adamw(group):
    start, grads = gaussian(2, 5, 7, seed=99), gradients(2, 5, 7)
    assert_moved_alike(train(group, start, grads), torch_adamw(group, start, grads), start, tolerance=1e-6)


@pytest.mark.parametrize("group", [Group(weight_decay=0.1), Group(eps=0.3), Group(decay="none", weight_decay=0.1)])
def test_the_fast_path_of_adam_is_the_plain_one(group):
    start, grads = gaussian(1, 37, 1, seed=99), gradients(1, 37, 1)
    rule, W = Adam.build(group), start.clone()
    state = rule.init_state(W)
    for step, grad in enumerate(grads):
        now = hyper(warm_then_cold(step), wd=group.weight_decay, count=step + 1)
        Step.build(group).apply(W, rule.direction(W, grad, state, now), state, now)
    assert_moved_alike(train(group, start, grads), W, start, tolerance=1e-6)


def test_adams_first_step_is_the_sign():
    """Bias correction: mhat = g and vhat = g^2 at count 1; at count 2 no more."""
    rule, G = Adam.build(Group()), gaussian(1, 6, 4)
    torch.testing.assert_close(rule.direction(G, G, rule.init_state(G), hyper(1)), G.sign(), rtol=0, atol=1e-5)
    late = rule.direction(G, G, rule.init_state(G), hyper(1, count=2))
    expected = 0.2 / (1 - 0.8**2) / math.sqrt(0.05 / (1 - 0.95**2))
    torch.testing.assert_close(late, G.sign() * expected, rtol=1e-5, atol=0)


def test_adam_in_bfloat16_follows_the_formula_with_rounded_memories():
    start, group = gaussian(1, 40, 8, seed=9).bfloat16(), Group(weight_decay=0.1, lr=0.01)
    rule, W, twin = Adam.build(group), start.clone(), start.clone()
    state = rule.init_state(W)
    mean, square = torch.zeros_like(W), torch.zeros_like(W)
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    for step in range(12):
        grad = gaussian(1, 40, 8, seed=step).bfloat16()
        rule.update(W, grad, state, hyper(0.01, wd=0.1, count=step + 1), step=Step("decoupled", 0.01))
        mean = (0.8 * mean.float() + 0.2 * grad.float()).bfloat16()
        square = (0.95 * square.float() + 0.05 * grad.float() ** 2).bfloat16()
        hats = mean.float() / (1 - 0.8 ** (step + 1)), square.float() / (1 - 0.95 ** (step + 1))
        twin = (twin.float() * (1 - 0.001) - 0.01 * hats[0] / (hats[1].sqrt() + 1e-10)).bfloat16()
    assert W.dtype == torch.bfloat16
    assert_moved_alike(W, twin, start, tolerance=0.02)


# ---- Steepest: Muon ------------------------------------------------------------------------------


def muon_twin(start: Tensor, grads: list[Tensor], *, lr: float, wd: float, mu: float = 0.95) -> Tensor:
    """Jordan's Muon in float64: lerped momentum, Nesterov, five quintic steps, max(1, m/n)^.5."""
    W, memory = start.double()[0], torch.zeros(start.shape[1:], dtype=torch.float64)
    a, b, c = QUINTIC
    for grad in grads:
        memory = mu * memory + (1 - mu) * grad.double()[0]
        X = (1 - mu) * grad.double()[0] + mu * memory
        X = X / X.norm()
        for _ in range(5):
            X = a * X + b * X @ X.T @ X + c * X @ X.T @ X @ X.T @ X
        W = (1 - lr * wd) * W - lr * max(1, X.size(0) / X.size(1)) ** 0.5 * X
    return W[None]


def muon(**changes: object) -> Group:
    base = dict(rule="steepest", lr=0.02, weight_decay=0.1, norm="spectral", unit="at_least_one", ns="quintic")
    return Group(**base | changes)


@pytest.mark.parametrize("shape", [(1, 24, 40), (1, 40, 24), (1, 32, 32)])
def test_muon_is_its_formula(shape):
    start, grads = gaussian(*shape, seed=99, scale=0.1), gradients(*shape, steps=20)
    wanted = muon_twin(start, grads, lr=0.02, wd=0.1)
    assert_moved_alike(train(muon(), start, grads, lr=lambda step: 0.02), wanted, start, tolerance=2e-6)


@pytest.mark.parametrize(("unit", "name"), [("at_least_one", "original"), ("match_adam", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(1, 24, 40), (1, 40, 24)])
def test_muon_is_pytorchs_muon(unit, name, nesterov, shape):
    """PyTorch orthogonalises in bfloat16: equal within a few percent."""
    start, grads = gaussian(*shape, seed=99), gradients(*shape, steps=20)
    param = torch.nn.Parameter(start[0].clone())
    optimizer = torch.optim.Muon([param], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=name)
    for grad in grads:
        param.grad = grad[0].clone()
        optimizer.step()
    found = train(muon(unit=unit, nesterov=nesterov), start, grads, lr=lambda step: 0.02)
    assert_moved_alike(found[0], param.detach(), start[0], tolerance=0.03)


# ---- Steepest: closed forms ----------------------------------------------------------------------


def averaged(grads: list[Tensor], averaging: str, nesterov: bool, mu: list[float]) -> list[Tensor]:
    """What the norm's dual sees, in float64, with the recursions unrolled into sums over all past gradients."""
    found = []
    for t in range(len(grads)):
        weights = [(1 - mu[s] if averaging == "ema" else 1) * math.prod(mu[s + 1:t + 1]) for s in range(t + 1)]
        total = sum(w * g.double() for w, g in zip(weights, grads, strict=False))
        fresh = (1 - mu[t] if averaging == "ema" else 1) * grads[t].double()
        found.append(mu[t] * total + fresh if nesterov else total)
    return found


@pytest.mark.parametrize("averaging", ["ema", "heavy_ball"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("norm", ["sign", "frobenius", "row", "column"])
def test_steepest_descent_with_scheduled_momentum(averaging, nesterov, norm):
    """Signum, normalised SGD and the table norms: W = W0 - sum of lr dual(average)."""
    start, grads = gaussian(1, 5, 8, seed=99, scale=0.1), gradients(1, 5, 8, steps=15)
    mu = [0.5 + 0.03 * step for step in range(15)]
    wanted = start.double()
    for step, A in enumerate(averaged(grads, averaging, nesterov, mu)):
        length = {"sign": A.abs(), "frobenius": A.norm(), "row": A.square().mean(-1, keepdim=True).sqrt(),
                  "column": A.square().mean(-2, keepdim=True).sqrt()}[norm]
        wanted = wanted - warm_then_cold(step) * torch.where(A == 0, 0, A / length)
    group = Group(rule="steepest", norm=norm, averaging=averaging, nesterov=nesterov)
    found = train(group, start, grads, momentum=lambda step: mu[step])
    assert_moved_alike(found, wanted, start, tolerance=3e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_both_averages_step_alike_at_constant_momentum(nesterov):
    start, grads = gaussian(1, 12, 16, seed=99), gradients(1, 12, 16, steps=20)
    ema, ball = (train(muon(averaging=kind, nesterov=nesterov), start, grads) for kind in ("ema", "heavy_ball"))
    assert_moved_alike(ema, ball, start, tolerance=1e-5)


def test_averages_differ_where_momentum_is_scheduled():
    start, grads = gaussian(1, 12, 16, seed=99), gradients(1, 12, 16, steps=20)
    ema, ball = (train(muon(averaging=kind), start, grads, momentum=lambda step: 0.5 + 0.02 * step)
                 for kind in ("ema", "heavy_ball"))
    assert (ema - ball).norm() > 1e-2 * (ball - start).norm()


def test_without_average_there_is_no_memory():
    group = Group(rule="steepest", norm="sign", averaging="none")
    rule, grads = RULES["steepest"].build(group), gradients(1, 5, 8, steps=6)
    assert rule.init_state(grads[0]) == {}
    wanted = -sum(warm_then_cold(step) * grad.sign() for step, grad in enumerate(grads))
    torch.testing.assert_close(train(group, torch.zeros(1, 5, 8), grads), wanted, rtol=0, atol=1e-6)


def test_nesterov_matters():
    start, grads = gaussian(1, 12, 16, seed=99), gradients(1, 12, 16, steps=5)
    with_it, without = (train(muon(nesterov=kind), start, grads) for kind in (True, False))
    assert (with_it - without).norm() > 0.05 * (with_it - start).norm()


@pytest.mark.parametrize("rule", ["steepest", "adam"])
def test_memories_start_at_zero_with_the_parameters_first_dimension(rule):
    param = gaussian(6, 4, 3).mT.bfloat16()
    for tensor in RULES[rule].build(Group(rule=rule)).init_state(param).values():
        assert tensor.size(0) == 6 and not tensor.any() and tensor.is_contiguous() and tensor.dtype == torch.bfloat16


@pytest.mark.parametrize("group", [Group(), muon(), Group(rule="steepest", norm="row")], ids=["adam", "muon", "row"])
def test_an_update_writes_into_its_tensors(group):
    """Weights and memories are views into banks: a new tensor in their place would be lost."""
    rule, W = RULES[group.rule].build(group), gaussian(2, 6, 4)
    state = rule.init_state(W)
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in {"W": W, **state}.items()}
    rule.update(W, gaussian(2, 6, 4, seed=1), state, hyper(0.1), step=Step("none", 0.1))
    for name, (tensor, place) in before.items():
        assert ({"W": W} | state)[name] is tensor and tensor.data_ptr() == place and tensor.any()


@pytest.mark.parametrize("group", [Group(), muon(weight_decay=0), Group(rule="steepest", norm="row")],
                         ids=["adam", "muon", "row"])
def test_zero_gradients_move_nothing(group):
    start = gaussian(1, 6, 4)
    assert torch.equal(train(group, start, [torch.zeros(1, 6, 4)] * 3), start)


# ---- Decay ---------------------------------------------------------------------------------------


def decayed(kind: str, W: Tensor, D: Tensor, lr: float, wd: float, peak: float) -> Tensor:
    """One element after another."""
    found = []
    for w, d in zip(W.flatten().tolist(), D.flatten().tolist(), strict=True):
        shrink = {"none": 0, "decoupled": lr * wd, "independent": wd * lr / peak,
                  "cautious": lr * wd * (w * d >= 0)}[kind]
        found.append(w - shrink * w - lr * d)
    return torch.tensor(found, dtype=torch.float64).view_as(W)


@pytest.mark.parametrize("kind", ["none", "decoupled", "independent", "cautious"])
def test_decay_is_its_formula(kind):
    W, D = gaussian(1, 6, 9), gaussian(1, 6, 9, seed=1)
    D[0, 0], W[0, 1] = 0, 0
    wanted = decayed(kind, W, D, 0.03, 0.4, 0.1)
    Step(kind, 0.1).apply(W, D, {}, hyper(0.03, wd=0.4))
    torch.testing.assert_close(W.double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["none", "decoupled", "independent", "cautious"])
@pytest.mark.parametrize("rule", ["adam", "steepest"])
def test_rules_apply_every_decay(kind, rule):
    """Decay takes the weights before the step; its direction is that of the sign in the first step of both rules."""
    W, G = gaussian(1, 6, 9), gaussian(1, 6, 9, seed=1)
    group = Group(rule=rule, norm="sign", decay=kind, weight_decay=0.4, lr=0.1)
    wanted = decayed(kind, W, G.sign(), 0.03, 0.4, 0.1)
    torch.testing.assert_close(train(group, W, [G], lr=lambda step: 0.03).double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "decoupled", "independent", "cautious"])
def test_bfloat16_weights_are_rounded_once(kind):
    """Decay and step are computed in float32 and rounded at the end."""
    W, D = gaussian(1, 64, 64).bfloat16(), gaussian(1, 64, 64, seed=1).bfloat16()
    wanted = decayed(kind, W, D, 0.013, 0.4, 0.1).float().bfloat16()
    Step(kind, 0.1).apply(W, D, {}, hyper(0.013, wd=0.4))
    assert (W != wanted).float().mean() < 0.002


@pytest.mark.parametrize("kind", ["decoupled", "independent", "cautious"])
def test_a_frozen_group_stays_finite(kind):
    """lr 0 is allowed, and moves nothing."""
    W, group = gaussian(1, 6, 9), Group(rule="steepest", norm="sign", decay=kind, weight_decay=0.1, lr=0.0)
    assert train(group, W, [gaussian(1, 6, 9, seed=1)], lr=lambda step: 0.0).isfinite().all()
