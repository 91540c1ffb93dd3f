"""Gradients that are not finite raise an error that names the parameter: at once, or on CUDA later."""

import shutil

import pytest
import torch

from configs.optim import AGD, Adam, Muon, Prodigy
from optim import sharded
from optim.sharded import NonFiniteError, ShardedOptimizer
from tests.optim.oracle import FULL, gaussian, one_role, parameters

SHAPES = {"wide": (5, 8), "other": (5, 8), "tall": (9, 4), "vector": (7,)}


def step_all(params: dict, optimizer: ShardedOptimizer, bad: dict[str, int], steps: int = 5) -> None:
    """Run steps; `bad` gives, by name, the first step at which a tensor's gradient is infinite."""
    for step in range(steps):
        for name, param in params.items():
            param.grad.copy_(gaussian(*SHAPES[name], seed=step) / (step < bad.get(name, steps)))
        optimizer.step(FULL, step + 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_is_enough(bad):
    params = parameters(SHAPES)
    optimizer = one_role(Adam(), params)
    params["other"].grad[3, 5] = bad
    with pytest.raises(NonFiniteError, match="gradient of other is not finite at step 3; it was not used"):
        optimizer.step(FULL, 3)


@pytest.mark.parametrize("config", [Adam(), Prodigy(), AGD(), Muon()], ids=lambda config: config.rule)
def test_refused_later_no_weight_sees_it(config, monkeypatch):
    """Without the check at once, as on CUDA, a bad gradient changes no weight and is reported by `check_finite`."""
    monkeypatch.setattr(sharded, "CHECKED_AT_ONCE", ())
    params = parameters(SHAPES)
    optimizer = one_role(config, params)
    step_all(params, optimizer, {"tall": 2})
    with pytest.raises(NonFiniteError, match="gradient of tall is not finite at step 3"):
        optimizer.check_finite()
    assert not any(tensor.isnan().any() for tensor in optimizer.state.tensors().values())


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's compiler needs a C++ compiler")
@pytest.mark.parametrize("config", [Adam(decay="cautious", weight_decay=0.1), Muon()], ids=lambda config: config.rule)
def test_the_compiled_update_notes_it_too(config, monkeypatch):
    monkeypatch.setattr(sharded, "CHECKED_AT_ONCE", ())
    ends = []
    for compiled in (False, True):
        params = parameters(SHAPES)
        optimizer = one_role(config, params, compile_updates=compiled)
        step_all(params, optimizer, {"tall": 2, "vector": 3})
        with pytest.raises(NonFiniteError, match="gradient of tall is not finite at step 3"):
            optimizer.check_finite()
        ends.append({name: param.detach().clone() for name, param in params.items()})
    for name in SHAPES:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=1e-5, atol=1e-6)


def test_the_first_of_several_is_named_and_forgotten_on_restore(monkeypatch):
    monkeypatch.setattr(sharded, "CHECKED_AT_ONCE", ())
    params = parameters(SHAPES)
    optimizer = one_role(Adam(), params)
    snapshot = optimizer.state.snapshot()
    step_all(params, optimizer, {"vector": 2, "wide": 3})
    with pytest.raises(NonFiniteError, match="vector is not finite at step 3"):
        optimizer.check_finite()
    optimizer.state.restore(snapshot)
    optimizer.check_finite()


def test_the_bad_parameter_is_named_from_a_banks_shard():
    """The bank has three matrices, of which this rank owns the last two."""
    params = parameters(dict.fromkeys("abc", (2, 3)))
    optimizer = one_role(Muon(), params)
    bank, = optimizer.banks
    bank.shard, bank.reduced_grad = slice(1, 3), torch.ones(2, 2, 3)
    bank.reduced_grad[1, 0, 2] = float("inf")
    optimizer._receive(bank, 7)
    assert bank.reduced_grad[1, 0, 2] == 0 and bank.reduced_grad.sum() == 11
    with pytest.raises(NonFiniteError, match="gradient of c is not finite at step 7"):
        optimizer.check_finite()
