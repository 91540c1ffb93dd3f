"""Rotational equilibrium against random walks; angles per tensor against direct computation."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.optim import Adam, Dion, Muon, NorMuon, Optim, RuleConfig, Steepest
from optim.comm import Comm
from optim.groups import ParamGroup, build_groups
from optim.metrics import StepMetrics, angle_between, equilibrium_angle, squares_by_tensor, step_squares, variance_ratio
from optim.muon import average_gradient
from optim.sharded import ShardedOptimizer
from tests.optim.oracle import FULL, hyper

MUON = Muon(lr=0.05, weight_decay=0.4, momentum=0.9)
PLAIN = Steepest(norm="frobenius", lr=0.05, weight_decay=0.4, momentum=0.9)
ADAM = Adam(lr=0.02, weight_decay=1.0, beta1=0.8, beta2=0.99)


def built(config: RuleConfig, *shapes: tuple[int, int]) -> tuple[dict[str, torch.nn.Parameter], ParamGroup]:
    torch.manual_seed(0)
    params = {f"w{i}": torch.nn.Parameter(torch.randn(shape)) for i, shape in enumerate(shapes or [(24, 32)])}
    (group,) = build_groups(params, dict.fromkeys(params, "matrix"), Optim(matrix=config))
    return params, group


def turned_by(config: RuleConfig) -> float:
    """Return the mean angle of steps by random gradients at steady weight length, over the predicted angle."""
    params, group = built(config)
    optimizer = ShardedOptimizer([group], Comm())
    values, angles, metrics = FULL._replace(lr=0.8), [], StepMetrics(optimizer.comm)
    for step in range(600):
        params["w0"].grad.copy_(torch.randn(24, 32))
        metrics.remember(optimizer.banks if step >= 300 else [])
        optimizer.step(values, step + 1)
        angles += [of_role["angle"] for of_role in metrics.by_role(values).values()]
    return math.fsum(angles) / len(angles) / equilibrium_angle(group, values)


@pytest.mark.parametrize("config", [
    PLAIN, replace(PLAIN, nesterov=False), replace(PLAIN, averaging="heavy_ball"), replace(MUON, averaging="none"),
    replace(PLAIN, decay="independent", weight_decay=0.02), replace(PLAIN, decay="corrected"),
    ADAM, replace(ADAM, beta1=0.0)], ids=str)
def test_random_gradients_turn_weights_by_that_angle(config):
    assert turned_by(config) == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("config, more", [(MUON, 1.1), (NorMuon(lr=0.05, weight_decay=0.4, momentum=0.9), 1.1),
                                          (replace(PLAIN, norm="sign", lr=0.02), 1.2)])
def test_where_the_dual_is_not_a_length_alone_they_turn_somewhat_more(config, more):
    """Consecutive averages are more correlated than their signs or polar factors."""
    assert turned_by(config) == pytest.approx(more, rel=0.05)


def test_adamw_is_the_papers_formula():
    _, group = built(ADAM)
    assert equilibrium_angle(group, FULL) == pytest.approx(math.sqrt(2 * 0.02 * 0.2 / 1.8), rel=1e-6)
    assert equilibrium_angle(group, FULL._replace(lr=1e-6)) == pytest.approx(math.sqrt(4e-8 * 0.2 / 1.8), rel=1e-5)


@pytest.mark.parametrize("kind", ["ema", "heavy_ball"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_spread_of_an_average_by_an_impulse(kind, nesterov):
    config, impulse = Muon(averaging=kind, nesterov=nesterov), torch.eye(1, 600, dtype=torch.float64)[0]
    state, numbers = {"momentum": torch.zeros((), dtype=torch.float64)}, hyper(0.1)
    numbers = numbers._replace(momentum=torch.tensor(0.9, dtype=torch.float64))
    weights = torch.stack([average_gradient(grad, state, config, numbers).clone() for grad in impulse])
    assert variance_ratio(0.9, nesterov=nesterov) == pytest.approx((weights.square().sum() / weights.sum().square()).item())


@pytest.mark.parametrize("config", [
    replace(MUON, weight_decay=0.0), replace(MUON, decay="none"), replace(MUON, decay="cautious"),
    replace(MUON, constraint="hyperball"), replace(MUON, averages=3),
    replace(MUON, kernel=("0.85=0.4", "0.98=0.6")), Dion(weight_decay=0.1)])
def test_without_an_equilibrium_there_is_no_angle(config):
    assert equilibrium_angle(built(config)[1], FULL) is None


# ---- Turns ---------------------------------------------------------------------------------------------------------------


def test_angles_down_to_those_that_the_inner_product_has_lost():
    a = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    side = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    side -= a * (a @ side) / (a @ a)
    side *= a.norm() / side.norm()
    for angle in (1e-10, 1e-3, 1.0, 3.0):
        b = 2 * (math.cos(angle) * a + math.sin(angle) * side) if angle > 1e-5 else a + angle * side
        squares = ((b - a).square().sum().item(), a.square().sum().item(), b.square().sum().item())
        assert angle_between(*squares) == pytest.approx(angle, rel=1e-5)
    assert angle_between(1.0, 0.0, 1.0) == angle_between(0.0, 0.0, 0.0) == math.pi / 2


@pytest.mark.parametrize("config", [MUON, ADAM, replace(PLAIN, norm="row")], ids=["matrix", "element", "row"])
def test_turns_are_those_of_each_tensor(config):
    params, group = built(config, (4, 6), (4, 6), (6, 4), (4, 6))
    params["w3"].data.zero_()
    optimizer = ShardedOptimizer([group], Comm())
    metrics = StepMetrics(optimizer.comm)
    assert metrics.by_tensor("matrix") == metrics.by_role(FULL) == {}
    old = {name: param.detach().double().clone() for name, param in params.items()}
    for param in params.values():
        param.grad.copy_(torch.randn(param.shape))
    metrics.remember(optimizer.banks)
    optimizer.step(FULL, 1)
    by_name = metrics.by_tensor("matrix")
    assert by_name.keys() == {"w0", "w1", "w2"}  # what was zero has no angle
    for name, turned in by_name.items():
        before, after = old[name].flatten(), params[name].detach().double().flatten()
        assert turned["angle"] == pytest.approx(math.acos((before @ after / before.norm() / after.norm()).item()))
        assert turned["update_ratio"] == pytest.approx(((after - before).norm() / before.norm()).item())
    assert metrics.by_tensor("head") == {} and metrics.by_role(FULL)["matrix"]["angle"] > 0


@pytest.mark.parametrize("config", [MUON, ADAM, replace(PLAIN, norm="row")], ids=["matrix", "element", "row"])
def test_what_ranks_own_adds_up_wherever_they_cut(config):
    params, group = built(config, (4, 6), (4, 6), (4, 6))
    (bank,) = ShardedOptimizer([group], Comm()).banks
    before = bank.weights.clone()
    bank.weights.add_(torch.randn_like(bank.weights))
    whole, parts = squares_by_tensor(bank, before), torch.zeros(3, 3, dtype=torch.float64)
    ends = sorted({0, len(before) // 3 + 1, len(before) // 2 + 1, len(before)})
    for bank.shard in (slice(0, 0), *map(slice, ends, ends[1:])):
        parts += squares_by_tensor(bank, before[bank.shard])
    assert torch.allclose(parts, whole) and (whole > 0).all()


# ---- In pieces -----------------------------------------------------------------------------------------------------------


class LargestFloat64(TorchDispatchMode):
    """Record the number of elements of the largest float64 tensor that is computed."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.elements = max(self.elements, result.numel())
        return result


def test_squares_are_summed_in_pieces_of_bounded_size(monkeypatch):
    _, group = built(MUON)
    before, after = torch.randn(3, 50, 20).bfloat16(), torch.randn(3, 50, 20).bfloat16()
    whole = step_squares(group.rule.norm, before, after)
    monkeypatch.setattr("optim.metrics.CHUNK_ELEMENTS", 700)
    with LargestFloat64() as largest:
        pieces = step_squares(group.rule.norm, before, after)
    assert largest.elements == 700 and [*pieces[:3]] == pytest.approx([*whole[:3]], rel=1e-13)
