"""Every rule keeps weights finite for all gradients, compiles once, and continues bit for bit from a saved state."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from configs.optim import RULES, Adam, Extra, Muon, NorMuon, RuleConfig
from optim.groups import build_rule, rule_class
from optim.metrics import StepMetrics
from optim.rule import Step
from optim.sharded import NonFiniteError, ShardedOptimizer
from tests.optim.oracle import FULL, directions, gaussian, hyper, one_role, train

SHAPES = {"wide": (5, 8), "other": (5, 8), "tall": (9, 4), "square": (6, 6), "vector": (7,), "number": (1,)}
CASES = {name: config(lr=0.01) for name, config in RULES.items()} | {
    "normuon, longer": NorMuon(lr=0.01, normalise="longer"), "muon, equilibrated": Muon(lr=0.01, equilibrate=True),
    "muon, 3 averages": Muon(lr=0.01, averages=3),
    "muon, kernel": Muon(lr=0.01, kernel=("0.85=0.44", "0.98=0.56"), kernel_from=2)}
every_rule = pytest.mark.parametrize("config", CASES.values(), ids=CASES)
MUONS_KIN = {name: config for name, config in CASES.items() if name.split(",")[0] in (
    "muon", "normuon", "muon2", "muown", "dion", "dion2")}
muons_kin = pytest.mark.parametrize("config", MUONS_KIN.values(), ids=MUONS_KIN)


def of_shape(name: str, step: int = 0) -> Tensor:
    return gaussian(*SHAPES[name], seed=len(name) + 10 * step)


def rank_one(name: str, step: int) -> Tensor:
    left = torch.arange(1.0, SHAPES[name][0] + 1)
    return left[:, None] * torch.ones(SHAPES[name][1]) if len(SHAPES[name]) == 2 else left


def without_some_rows(name: str, step: int) -> Tensor:
    grad = of_shape(name, step)
    grad[::2] = 0
    return grad


HOSTILE = {
    "zero": lambda name, step: torch.zeros(SHAPES[name]), "rank_one": rank_one, "rows": without_some_rows,
    "constant": lambda name, step: torch.full(SHAPES[name], 0.1),
    "tiny": lambda name, step: 1e-30 * of_shape(name, step), "huge": lambda name, step: 1e30 * of_shape(name, step),
    "spike": lambda name, step: of_shape(name, step) * (1e30 if step == 1 else 1),
    "late": lambda name, step: of_shape(name, step) * (step > 1),
    "vanishing": lambda name, step: of_shape(name, step) * (step < 1),
}


def make(config: RuleConfig, dtype: torch.dtype = torch.float32, **options: bool) -> tuple[dict, ShardedOptimizer]:
    params = {name: nn.Parameter((0.1 * of_shape(name)).to(dtype)) for name in SHAPES}
    return params, one_role(config, params, **options)


def run(params: dict, optimizer: ShardedOptimizer, grad_of=of_shape, steps: range = range(5)) -> dict[str, Tensor]:
    """Return the state after these steps. Check that weights are finite after each."""
    for step in steps:
        for name, param in params.items():
            param.grad.copy_(grad_of(name, step))
        optimizer.step(FULL._replace(lr=1 - 0.1 * step, momentum=0.8 + 0.02 * step), step + 1)
        assert all(param.isfinite().all() for param in params.values()), f"step {step}"
    return optimizer.state.tensors()


# ---- Hostile gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", HOSTILE)
@every_rule
def test_hostile_gradients_leave_weights_and_state_finite(config, kind, dtype):
    assert not any(tensor.isnan().any() for tensor in run(*make(config, dtype), HOSTILE[kind]).values())


@pytest.mark.parametrize("change", [
    {"weight_decay": 0.1}, {"constraint": "hyperball"}, {"extra": Extra(clip=1.0, clip_norm="spectral")},
    {"extra": Extra(clip=1.0)}], ids=["decay", "hyperball", "spectral_clip", "clip"])
@every_rule
def test_hostile_gradients_under_every_step(config, change):
    if config.rule == "stiefel" and "constraint" in change:
        pytest.skip("its weights live on a manifold of their own")
    for kind in ("zero", "huge", "rank_one"):
        run(*make(replace(config, **change)), HOSTILE[kind], range(2))


@every_rule
def test_zero_gradients_move_nothing(config):
    params, optimizer = make(config)
    before = {name: param.detach().clone() for name, param in params.items()}
    run(params, optimizer, HOSTILE["zero"])
    for name, param in params.items():
        torch.testing.assert_close(param.detach(), before[name], rtol=1e-6, atol=5e-7)


@every_rule
def test_every_rule_moves_every_tensor(config):
    """Two rules cannot move a single number: SWAN removes the mean of a row; on the Stiefel manifold it is 1 or -1."""
    params, optimizer = make(config)
    before, metrics = {name: param.detach().clone() for name, param in params.items()}, StepMetrics(optimizer.comm)
    metrics.remember(optimizer.banks)
    run(params, optimizer)
    assert all(math.isfinite(x) for x in metrics.by_role(FULL)["matrix"].values())
    stays = {name for name, param in params.items() if torch.equal(param, before[name])}
    assert stays <= ({"number"} if config.rule in ("swan", "stiefel") else set())


@every_rule
def test_a_rank_that_owns_nothing_may_be_asked(config):
    rule, W = build_rule(config), torch.zeros(0, 4, 6)
    state, numbers = rule.init_state(W), hyper(0.1, wd=0.1, shared=rule.init_shared())
    if numbers.shared:
        sums = rule.sums(W, W, state, numbers)
        assert not sums.any()
        rule.update_shared(sums, numbers)
    rule.update(W, torch.zeros(0, 4, 6), state, numbers, step=Step())
    assert all(tensor.isfinite().all() for tensor in numbers.shared.values())


@every_rule
def test_a_gradient_that_is_not_finite_is_refused_before_any_weight_moves(config):
    params, optimizer = make(config)
    before = run(params, optimizer, steps=range(2))
    for param in params.values():
        param.grad.fill_(1.0)
    params["other"].grad[3, 5] = float("nan")
    with pytest.raises(NonFiniteError, match=r"gradient of other is not finite at step 3"):
        optimizer.step(FULL, 3)
    after = optimizer.state.tensors()
    assert all(torch.equal(after[name], before[name]) for name in before)


# ---- Compiled, saved, loaded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [name for name in RULES if rule_class(RULES[name]).compiles and name != "adam"])
def test_updates_compile_once_and_do_the_same(rule, monkeypatch):
    """Without adam, whose fused path on CPUs is not compiled."""
    graphs = []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=lambda g, _: graphs.append(g) or g))
    torch._dynamo.reset()
    config = replace(CASES[rule], weight_decay=0.1)
    params, compiled = make(config, compile_updates=True)
    run(params, compiled, steps=range(1))
    first = len(graphs)
    actual, expected = run(params, compiled, steps=range(1, 5)), run(*make(config))
    assert first >= 1 and len(graphs) == first
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6)


@every_rule
def test_what_was_saved_is_a_copy_and_loading_it_continues_bit_for_bit(config):
    params, optimizer = make(config)
    saved = run(params, optimizer, steps=range(3))
    copies = {name: tensor.clone() for name, tensor in saved.items()}
    straight = run(params, optimizer, steps=range(3, 6))
    assert all(torch.equal(saved[name], copies[name]) for name in saved)
    params, optimizer = make(config)
    run(params, optimizer, steps=range(2))
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == optimizer.state.shapes()
    optimizer.state.load(saved)
    resumed = run(params, optimizer, steps=range(3, 6))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


# ---- Stacks and precision -----------------------------------------------------------------------------------------------


@every_rule
def test_each_matrix_is_updated_alone(config):
    """A stack is updated as its matrices one by one would be: banks may be cut anywhere between matrices."""
    if build_rule(config).init_shared():
        pytest.skip("it takes sums over its role")
    start, grads = gaussian(3, 8, 6, seed=9), [gaussian(3, 8, 6, seed=i) for i in range(4)]
    Step.build(config).project_start(start)
    alone = [train(config, start[k:k + 1], [grad[k:k + 1] for grad in grads]) for k in range(3)]
    torch.testing.assert_close(train(config, start, grads), torch.cat(alone), rtol=1e-4, atol=1e-5)


@muons_kin
def test_bfloat16_follows_float32(config):
    """With weights, gradients and state of 8 bits of precision the first steps have nearly the same direction."""
    start = gaussian(2, 24, 16, seed=9, scale=0.1).bfloat16()
    grads = [gaussian(2, 24, 16, seed=i).bfloat16() for i in (1, 2)]
    low = directions(config, grads, start=start)
    high = directions(config, [grad.float() for grad in grads], start=start.float())
    for actual, expected in zip(low, high, strict=True):
        assert torch.cosine_similarity(actual.flatten().float(), expected.flatten(), dim=0) > 0.97


@muons_kin
def test_it_descends(config):
    """A quadratic loss with another curvature in every element falls below a twentieth of its initial value."""
    W, target = gaussian(1, 8, 12, seed=1, scale=0.5), gaussian(1, 8, 12, seed=2, scale=0.5)
    curvature = 1 + gaussian(1, 8, 12, seed=3).abs()
    rule = build_rule(config)
    state, start = rule.init_state(W), ((W - target) ** 2 * curvature).sum()
    for t in range(150):
        rate = 0.2 * (1 - t / 150)
        W = W - rate * rule.direction(W, curvature * (W - target), state, hyper(rate, momentum=0.8, count=t + 1))
    assert ((W - target) ** 2 * curvature).sum() < 0.05 * start


@pytest.mark.parametrize("config", [Muon(), Adam()], ids=lambda config: config.rule)
def test_averages_start_at_zero_contiguous_and_of_the_parameters_dtype(config):
    """Averages are contiguous even if the parameter is a transposed view."""
    for tensor in build_rule(config).init_state(gaussian(6, 4, 3).mT.bfloat16()).values():
        assert tensor.size(0) == 6 and not tensor.any() and tensor.is_contiguous() and tensor.dtype == torch.bfloat16
