"""The sharded optimizer: banks are views; one rank equals a plain loop, several ranks equal one; states move between.

Run as a program with RANK and WORLD_SIZE in the environment, this file is one rank of the runs that its tests compare.
"""

import functools
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from configs.optim import SOAP, Adam, Extra, Muon, NorMuon, Optim, Steepest
from configs.presets import PRESETS
from configs.speedrun import record_optim
from model import GPT
from optim.bank import SMALL_BANK_ELEMENTS, group_by_update
from optim.comm import Comm
from optim.groups import build_groups, build_rule
from optim.metrics import StepMetrics
from optim.rule import Hyper, Step
from optim.schedule import Values
from optim.sharded import ShardedOptimizer
from tests.optim.oracle import FULL, hyper, one_role, run_ranks

STEPS, HALF = 6, 3

OPTIM = Optim(
    matrix=Muon(lr=0.02, weight_decay=0.1, unit="at_least_one"),
    embed=Adam(lr=0.3, weight_decay=0.01),
    head=Adam(lr=0.02, weight_decay=0.3, decay="cautious"),
    value_embed=Steepest(norm="row", lr=0.1, averaging="heavy_ball", nesterov=False),
    bigram_embed=Adam(lr=0.05, weight_decay=0.02),
    gate=Steepest(norm="frobenius", lr=0.5, averaging="none", decay="independent", weight_decay=0.01),
    gain=Adam(lr=0.01), bias=Steepest(norm="sign", lr=0.003), scalar=Adam(lr=0.02))

# Sizes that neither 2 nor 3 divides, on both sides of the border below which a bank is replicated.
TENSORS: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {
    **{f"wide{i}": ("matrix", (56, 88), torch.float32) for i in range(5)},
    **{f"tall{i}": ("matrix", (88, 56), torch.float32) for i in range(2)},
    "table": ("embed", (701, 37), torch.bfloat16),
    "head": ("head", (131, 127), torch.float32),
    "values": ("value_embed", (617, 32), torch.float32),
    "pairs": ("bigram_embed", (1009, 17), torch.float32),
    "gate": ("gate", (130, 128), torch.float32),
    **{f"gain{i}": ("gain", (37,), torch.float32) for i in range(3)},
    **{f"bias{i}": ("bias", (19,), torch.float32) for i in range(2)},
    "scalar": ("scalar", (1,), torch.float32),
}
SHARDED = {"wide0", "table", "head", "values", "pairs", "gate"}


def seeded(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(str(key))) % 2**31)


def make_params(seed: int = 0) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter((0.1 * torch.randn(shape, generator=seeded(seed, name))).to(dtype))
            for name, (_, shape, dtype) in TENSORS.items()}


def make_optimizer(params: dict[str, Tensor], optim: Optim = OPTIM, **options: bool) -> ShardedOptimizer:
    groups = build_groups(params, {name: TENSORS[name][0] for name in params}, optim)
    return ShardedOptimizer(groups, Comm(), **options)


def whole_gradient(name: str, step: int) -> Tensor:
    """Return small whole numbers, whose sums are exact in any order and in bfloat16; some rows are zero."""
    grad = torch.randint(-9, 10, TENSORS[name][1], generator=seeded("gradient", name, step)).float()
    if grad.ndim == 2:
        grad[step::7] = 0
    return grad


def gradient_share(name: str, step: int, rank: int, world_size: int) -> Tensor:
    """Return one rank's part of `whole_gradient`; different on every rank."""
    parts = [torch.randint(-9, 10, TENSORS[name][1], generator=seeded("share", name, step, r)).float()
             for r in range(world_size - 1)]
    return parts[rank] if rank < world_size - 1 else whole_gradient(name, step) - sum(parts)


def values_at(step: int) -> Values:
    return Values(1 - 0.1 * step, 1 + 0.5 * step, 0.85 + 0.02 * step, 1, 1, None)


def run_steps(optimizer: ShardedOptimizer, params: dict[str, nn.Parameter], steps: range, *, measured: bool = False) -> list:
    """Run steps; return the metrics by role after each, {} unless `measured`."""
    comm, step_metrics, rows = optimizer.comm, StepMetrics(optimizer.comm), []
    for step in steps:
        optimizer.zero_grad()
        for name, param in params.items():
            param.grad += gradient_share(name, step, comm.rank, comm.world_size)
        if measured:
            step_metrics.remember(optimizer.banks)
        optimizer.step(values_at(step), step + 1)
        rows.append(step_metrics.by_role(values_at(step)))
    return rows


def copies(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in params.items()}


def assert_moved_alike(actual: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Check that tensors are equal up to 1e-5 of the distance that they moved, bfloat16 up to 1e-2."""
    assert actual.keys() == expected.keys()
    for name in expected:
        moved = (expected[name].double() - start[name].double()).norm()
        tolerance = 1e-2 if expected[name].dtype == torch.bfloat16 else 1e-5
        assert moved > 0, name
        assert actual[name].shape == expected[name].shape and actual[name].dtype == expected[name].dtype, name
        assert (actual[name].double() - expected[name].double()).norm() <= tolerance * moved, name


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that tensors are equal bit for bit."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def weights_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weights/"): t for name, t in state.items() if name.startswith("weights/")}


def start_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors from which distances are measured: initial weights, zero for state."""
    start = {f"weights/{name}": weight for name, weight in copies(make_params()).items()}
    return {name: start.get(name, torch.zeros_like(tensor)) for name, tensor in state.items()}


# ---- Views ---------------------------------------------------------------------------------------


def inside(tensor: Tensor, bank: Tensor) -> bool:
    start = bank.untyped_storage().data_ptr()
    return start <= tensor.data_ptr() < start + bank.untyped_storage().nbytes()


def test_parameters_and_gradients_are_views_of_their_bank():
    params = make_params()
    before = copies(params)
    optimizer = make_optimizer(params)
    assert sorted(name for bank in optimizer.banks for name in bank.names) == sorted(params)
    for bank in optimizer.banks:
        for name in bank.names:
            assert inside(params[name].data, bank.weights) and inside(params[name].grad, bank.grads)
            assert params[name].is_contiguous() and params[name].shape == params[name].grad.shape
    assert_same(copies(params), before)


def test_a_bank_holds_one_role_shape_and_dtype():
    params = make_params() | {"half": nn.Parameter(torch.ones(56, 88, dtype=torch.bfloat16))}
    roles = {name: TENSORS[name][0] for name in TENSORS} | {"half": "matrix"}
    banks = [bank.names for bank in ShardedOptimizer(build_groups(params, roles, OPTIM), Comm()).banks]
    assert [names for names in banks if names[0] in ("wide0", "tall0", "half")] == [
        [f"wide{i}" for i in range(5)], ["tall0", "tall1"], ["half"]]


def test_elementwise_groups_have_one_bank_whatever_the_shapes():
    shapes = {"a": (3, 5), "b": (), "c": (40,), "d": (2, 2, 2)}
    params = {name: nn.Parameter(torch.randn(shape, generator=seeded(name))) for name, shape in shapes.items()}
    before = copies(params)
    bank, = one_role(Adam(), params).banks
    assert bank.names == list(shapes) and bank.weights.shape == (16 + 16 + 48 + 8,)
    assert [part.start % 16 for part in bank.parts] == [0] * 4
    assert [bank.name_at(entry) for entry in (0, 14, 16, 32, 71, 80, 87)] == ["a", "a", "b", "c", "c", "d", "d"]
    assert_same(copies(params), before)
    two_factors = one_role(Adam(extra=Extra(lr_factors=("c=2",))), params).banks
    assert [bank.names for bank in two_factors] == [["a", "b", "d"], ["c"]]


@pytest.mark.parametrize("config", [Adam(lr=0.1, weight_decay=0.2), Adam(lr=0.1, weight_decay=0.2, decay="cautious"),
                                    Steepest(norm="sign", lr=0.1)], ids=["adamw", "cautious", "sign"])
def test_a_shared_bank_is_as_good_as_one_for_each_parameter(config):
    """For sizes that vector instructions do and do not divide; these and their scalar rest may round differently."""
    shapes = {"a": (37, 5), "b": (), "c": (48,), "d": (2, 7), "e": (1031,)}
    together = {name: nn.Parameter(torch.randn(shape, generator=seeded(name))) for name, shape in shapes.items()}
    alone = {name: nn.Parameter(param.detach().clone()) for name, param in together.items()}
    optimizers = [one_role(config, together), *(one_role(config, {name: param}) for name, param in alone.items())]
    for step in range(3):
        for name in shapes:
            grad = torch.randn(shapes[name], generator=seeded(name, step))
            together[name].grad.copy_(grad)
            alone[name].grad.copy_(grad)
        for optimizer in optimizers:
            optimizer.step(values_at(step), step + 1)
    for name in shapes:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-6, atol=1e-7)


def test_the_record_has_few_banks():
    run = PRESETS["speedrun"]()
    with torch.device("meta"):
        model = GPT(run.model, vocab_size=50_257, max_tokens=128, document_start=0, prefix_of=[-1] * 50_257)
    groups = build_groups(dict(model.named_parameters()), model.roles(), run.optim, model.axes())
    # Beside one for each other kind of parameter, four of gates: lr_factors divide them.
    assert sum(len(group_by_update(group)) for group in groups) == 13


def test_backward_accumulates_in_the_bank_and_zeroing_keeps_the_views():
    params = make_params()
    optimizer = make_optimizer(params)
    places = {name: param.grad.data_ptr() for name, param in params.items()}
    for times in (1, 2):
        sum((param.float() * 3).sum() for param in params.values()).backward()
        assert all((grad == 3 * times).all() for bank in optimizer.banks for grad in bank.per_parameter(bank.grads))
    assert {name: param.grad.data_ptr() for name, param in params.items()} == places
    optimizer.zero_grad()
    assert not any(param.grad.any() for param in params.values())
    assert {name: param.grad.data_ptr() for name, param in params.items()} == places


def test_a_step_changes_the_model_in_place():
    model = nn.Linear(56, 88)
    params = {"tall0": model.weight}
    optimizer = make_optimizer(params)
    place, before = model.weight.data_ptr(), model.weight.detach().clone()
    model(torch.ones(2, 56)).sum().backward()
    optimizer.step(values_at(0), 1)
    assert model.weight.data_ptr() == place and not torch.equal(model.weight, before)
    assert model.weight.requires_grad and model.weight.is_leaf


# ---- One rank ------------------------------------------------------------------------------------


def plain_loop(steps: int = STEPS) -> dict[str, Tensor]:
    """Return the weights of the slow twin: every parameter alone, as one matrix, with its own rule and state."""
    weights, states = copies(make_params()), {}
    for step in range(steps):
        values = values_at(step)
        for name, W in weights.items():
            config = getattr(OPTIM, TENSORS[name][0])
            rule = build_rule(config)
            matrix = W.view(1, -1, W.size(-1))
            state = states.setdefault(name, rule.init_state(matrix))
            numbers = hyper(config.lr * values.lr, wd=config.weight_decay * values.weight_decay, momentum=values.momentum,
                        count=step + 1)
            grad = whole_gradient(name, step).to(W.dtype).view_as(matrix)
            rule.update(matrix, grad, state, numbers, step=Step.build(config))
    return weights


def test_one_rank_is_a_plain_loop():
    params = make_params()
    optimizer = make_optimizer(params)
    run_steps(optimizer, params, range(STEPS))
    assert_moved_alike(copies(params), plain_loop(), copies(make_params()))


@pytest.mark.parametrize("config", [
    Muon(lr=0.04), NorMuon(lr=0.04), SOAP(lr=0.04), Adam(lr=0.04, constraint="hyperball"),
    Muon(lr=0.04, weight_decay=0.2, decay="independent")], ids=["muon", "normuon", "soap", "hyperball", "independent"])
def test_blocks_are_matrices_and_factors_are_learning_rates(config):
    """A tensor with three blocks and lr_factor 2 moves as three tensors at twice the lr."""
    start, grads = torch.randn(12, 5, generator=seeded("cut")), torch.randn(3, 12, 5, generator=seeded("cuts"))
    whole = {"w": nn.Parameter(start.clone())}
    parts = {f"p{i}": nn.Parameter(start[4 * i:4 * i + 4].clone()) for i in range(3)}
    cut = one_role(replace(config, lr=0.02, extra=Extra(blocks=("w=3",), lr_factors=("w=2",))), whole)
    plain, metrics = one_role(config, parts), StepMetrics(cut.comm)
    for step in range(3):
        whole["w"].grad.copy_(grads[step])
        for i, part in enumerate(parts.values()):
            part.grad.copy_(grads[step, 4 * i:4 * i + 4])
        metrics.remember(cut.banks)
        for optimizer in (cut, plain):
            optimizer.step(Values(1 - 0.2 * step, 1, 0.9, 1, 1, None), step + 1)
    torch.testing.assert_close(whole["w"], torch.cat(list(parts.values())), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole["w"], start, atol=0.01)
    assert metrics.by_tensor("matrix")["w"]["angle"] > 0
    assert {name: tuple(tensor.shape) for name, tensor in cut.state.tensors().items()} == cut.state.shapes()


def test_measuring_changes_nothing():
    first, second = make_params(), make_params()
    quiet, loud = make_optimizer(first), make_optimizer(second)
    assert run_steps(quiet, first, range(2)) == [{}, {}]
    run_steps(loud, second, range(2), measured=True)
    assert_same(copies(first), copies(second))


def test_hyperparameters_follow_the_schedule():
    numbers = Hyper.at(OPTIM.matrix, Values(0.5, 3.0, 0.7, 1, 1, None), 9)
    assert [x.item() for x in numbers[:4]] == pytest.approx([0.01, 0.3, 0.7, 9]) and {x.ndim for x in numbers[:4]} == {0}
    assert Hyper.at(OPTIM.matrix, Values(0.5, 3.0, None, 1, 1, None), 9).momentum.item() == pytest.approx(0.95)
    assert Hyper.at(Adam(update_every=4), FULL, 12).count == 3


@pytest.mark.parametrize("norm", ["row", "column", "sign", "frobenius", "rms_operator"])
@pytest.mark.parametrize("shape", [(5,), (1,), ()])
def test_vectors_and_single_numbers_take_every_norm(norm, shape):
    """A number is a matrix of one element: each of these norms moves it by lr."""
    params = {f"gain{i}": nn.Parameter(torch.zeros(shape)) for i in range(2)}
    optimizer = make_optimizer(params, Optim(gain=Steepest(norm=norm, lr=0.5, ns="svd")))
    for param in params.values():
        param.grad.fill_(-3)
    optimizer.step(FULL, 1)
    for param in params.values():
        assert (param > 0).all() and (math.prod(shape) > 1 or param.item() == pytest.approx(0.5))


def size_of(role: str, W: Tensor) -> float:
    """Return a tensor's size in its group's norm, written independently of the tested code."""
    W = W.double().reshape(-1, W.size(-1))
    return {
        "matrix": lambda: torch.linalg.matrix_norm(W, 2).item() / max(1, W.size(0) / W.size(1)) ** 0.5,
        "value_embed": lambda: W.square().mean(1).sqrt().max().item(), "gate": lambda: W.norm().item(),
    }.get(role, lambda: W.abs().max().item())()


def plain_metrics(role: str, before: dict[str, Tensor], after: dict[str, Tensor], step: int) -> dict[str, float]:
    names = [name for name in TENSORS if TENSORS[name][0] == role]
    old, new = (torch.cat([w[name].double().flatten() for name in names]) for w in (before, after))
    return {"lr": getattr(OPTIM, role).lr * (1 - 0.1 * step), "update_rms": (new - old).square().mean().sqrt().item(),
            "weight_rms": new.square().mean().sqrt().item(),
            "weight_size": max(size_of(role, after[name]) for name in names),
            "angle": math.acos(min(1, (old @ new / old.norm() / new.norm()).item()))}


def test_metrics_are_their_formulas():
    params = make_params()
    optimizer = make_optimizer(params)
    for step in range(3):
        before = copies(params)
        by_role, = run_steps(optimizer, params, range(step, step + 1), measured=True)
        assert set(by_role) == {role for role, _, _ in TENSORS.values()}
        for role in by_role:
            assert by_role[role] == pytest.approx(plain_metrics(role, before, copies(params), step), rel=1e-5), role


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's compiler needs a C++ compiler")
def test_weights_in_bfloat16_are_exact_when_compiled():
    """Compile the record's groups, whose weights have remainders, with the real compiler."""
    start = {"a": (48, 32), "b": (32, 96), "t": (300, 32)}
    roles = {"a": "matrix", "b": "matrix", "t": "value_embed"}
    record = record_optim()
    extra = replace(record.matrix.extra, blocks=("a=3",), lr_factors=("b=4",))
    optim = replace(record, matrix=replace(record.matrix, extra=extra))
    weights = []
    for compiled in (False, True):
        params = {name: nn.Parameter((torch.randn(shape, generator=seeded(name)) / 20).bfloat16())
                  for name, shape in start.items()}
        optimizer = ShardedOptimizer(build_groups(params, roles, optim), Comm(), compile_updates=compiled)
        for step in range(4):
            for name, param in params.items():
                param.grad.add_(torch.randn(param.shape, generator=seeded(name, step)))
            optimizer.step(Values(1 - 0.1 * step, 1, 0.9, 1, 1, None), step + 1)
            optimizer.zero_grad()
        weights.append({bank.names[0]: bank.step.float32_weights(bank.weights, bank.state) for bank in optimizer.banks})
    plain, fast = weights
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], atol=1e-6, rtol=1e-6)
        assert not torch.equal(plain[name], plain[name].bfloat16().float())


def test_compiled_updates_are_the_plain_ones_and_compile_once(monkeypatch):
    """Hyperparameters that change at each step must not compile new graphs."""
    graphs = []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=lambda g, _: graphs.append(g) or g))
    torch._dynamo.reset()
    names = ["wide0", "wide1", "tall0", "head", "values", "bias0"]
    plain, fast = ({name: make_params()[name] for name in names} for _ in range(2))
    compiled = make_optimizer(fast, compile_updates=True)
    run_steps(make_optimizer(plain), plain, range(4))
    run_steps(compiled, fast, range(1))
    first = len(graphs)
    run_steps(compiled, fast, range(1, 4))
    assert first >= 4 and len(graphs) == first
    assert_moved_alike(copies(fast), copies(plain), copies(make_params()))


# ---- Saving and undoing --------------------------------------------------------------------------


def test_state_is_named_whole_and_independent():
    params = make_params()
    optimizer = make_optimizer(params)
    run_steps(optimizer, params, range(2))
    state = optimizer.state.tensors()
    copy = {name: tensor.clone() for name, tensor in state.items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == optimizer.state.shapes()
    assert_same(weights_of(state), copies(params))
    state_of = {name: sorted(key.split("/")[0] for key in state if key.endswith(f"/{name}")) for name in params}
    assert state_of["wide3"] == ["momentum", "weights"] and state_of["gate"] == ["weights"]
    assert state_of["table"] == ["mean", "square", "weights"] and state["mean/table"].dtype == torch.bfloat16
    run_steps(optimizer, params, range(2, 4))
    assert_same(state, copy)


def test_loading_continues_bit_for_bit():
    params, other = make_params(), make_params(seed=1)
    optimizer = make_optimizer(params)
    run_steps(optimizer, params, range(HALF))
    saved = optimizer.state.tensors()
    run_steps(optimizer, params, range(HALF, STEPS))
    resumed = make_optimizer(other)
    run_steps(resumed, other, range(2))
    resumed.state.load(saved)
    assert_same(resumed.state.tensors(), saved)
    run_steps(resumed, other, range(HALF, STEPS))
    assert_same(resumed.state.tensors(), optimizer.state.tensors())
    assert_same(copies(other), copies(params))


def test_restore_undoes_bit_for_bit():
    params = make_params()
    optimizer = make_optimizer(params)
    run_steps(optimizer, params, range(2))
    before, snapshot = optimizer.state.tensors(), optimizer.state.snapshot()
    run_steps(optimizer, params, range(2, 5))
    assert not torch.equal(optimizer.state.tensors()["weights/head"], before["weights/head"])
    optimizer.state.restore(snapshot)
    assert_same(optimizer.state.tensors(), before)
    assert_same(copies(params), weights_of(before))
    assert optimizer.state.tensors(keep=False) == {}


# ---- Tied parameters -----------------------------------------------------------------------------

TIED = Adam(lr=0.1, weight_decay=0.1, decay="cautious", update_every=2, rounding="remainder", state_dtype="float32")
TIED_STEPS, UNTIED_STEPS = 4, 2


def train_tied(comm: Comm, *, by_hand: bool = False) -> dict[str, tuple]:
    """Train two tensors that are one for four steps; `by_hand`: give both the sum of their gradients, as the slow twin does.
    Return (weights, state, number of collectives so far) after the tied steps and after all."""
    start, sent = (torch.randn(150, 120, generator=seeded("tied")) / 5).bfloat16(), []
    params = {name: nn.Parameter(start.clone()) for name in ("in", "out")}
    groups = build_groups(params, {"in": "embed", "out": "head"}, Optim(embed=TIED, head=TIED))
    optimizer, results = ShardedOptimizer(groups, comm), {}
    for step in range(TIED_STEPS + UNTIED_STEPS):
        is_tied, by_optimizer = step < TIED_STEPS, ("in", "out") if step < TIED_STEPS and not by_hand else None
        for name, param in params.items():  # rank 0 of several has the whole gradient of one tensor, the last of the other
            if comm.rank == (0 if name == "in" else comm.world_size - 1):
                param.grad.add_(torch.randint(-9, 10, start.shape, generator=seeded(name, step)))
        if by_hand and is_tied and step % 2:
            params["out"].grad.copy_(params["in"].grad.add_(params["out"].grad))
        with pytest.MonkeyPatch.context() as patch:
            for name in ("reduce_scatter", "all_gather"):
                call = getattr(Comm, name)
                patch.setattr(Comm, name, lambda self, bank, call=call: sent.append(bank.shape) or call(self, bank))
            optimizer.step(values_at(step), step + 1, tied=by_optimizer)
        optimizer.zero_grad()
        results["tied" if is_tied else "untied"] = copies(params), optimizer.state.tensors(), len(sent)
    return results


def test_tied_parameters_take_the_step_of_the_sum():
    by_optimizer, by_hand = train_tied(Comm()), train_tied(Comm(), by_hand=True)
    for key in ("tied", "untied"):
        assert_same(by_optimizer[key][1], by_hand[key][1])
    tied, untied = by_optimizer["tied"][0], by_optimizer["untied"][0]
    assert torch.equal(tied["in"], tied["out"]) and not torch.equal(untied["in"], untied["out"])


# ---- Several ranks -------------------------------------------------------------------------------


def one_rank() -> dict:
    """Return the results on one rank, which several ranks must reproduce."""
    params = make_params()
    optimizer = make_optimizer(params)
    metrics = run_steps(optimizer, params, range(HALF), measured=True)
    middle = optimizer.state.tensors()
    metrics += run_steps(optimizer, params, range(HALF, STEPS), measured=True)
    return {"middle": middle, "final": optimizer.state.tensors(), "metrics": metrics}


def as_rank(folder: Path) -> None:
    """Run one rank: start from its own weights, train, save, undo, continue from a state saved on one rank."""
    torch.set_num_threads(1)
    params = make_params(seed=int(os.environ["RANK"]))
    optimizer = make_optimizer(params)
    results: dict = {"start": copies(params), "banks": {
        bank.names[0]: (bank.sharded, tuple(bank.weights.shape), bank.shard.start, bank.shard.stop)
        for bank in optimizer.banks}}
    results["metrics"] = run_steps(optimizer, params, range(HALF), measured=True)
    results["middle"] = optimizer.state.tensors()
    snapshot = optimizer.state.snapshot()
    run_steps(optimizer, params, range(HALF, STEPS))
    optimizer.state.restore(snapshot)
    results["restored"] = optimizer.state.tensors()
    results["metrics"] += run_steps(optimizer, params, range(HALF, STEPS), measured=True)
    results["final"], results["params"] = optimizer.state.tensors(), copies(params)
    optimizer.state.load(torch.load(folder / "one.pt"))
    results["loaded"] = optimizer.state.tensors()
    run_steps(optimizer, params, range(HALF, STEPS))
    results["continued"] = optimizer.state.tensors()
    results["tied"] = train_tied(optimizer.comm)
    torch.save(results, folder / f"rank{optimizer.comm.rank}.pt")
    optimizer.comm.close()


@pytest.fixture(scope="module")
def single() -> dict:
    return one_rank()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, single, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    torch.save(single["middle"], folder / "one.pt")
    return run_ranks(__file__, request.param, folder)


def test_all_ranks_start_from_rank_zeros_weights(ranks):
    for rank in ranks:
        assert_same(rank["start"], copies(make_params(seed=0)))


def test_large_banks_are_cut_evenly_and_small_ones_replicated(ranks):
    world = len(ranks)
    assert {name for name, (sharded, *_) in ranks[0]["banks"].items() if sharded} == SHARDED
    for name in ranks[0]["banks"]:
        sharded, shape, _, _ = ranks[0]["banks"][name]
        owned = [(rank["banks"][name][2], rank["banks"][name][3]) for rank in ranks]
        share = shape[0] // world
        assert owned == ([(r * share, (r + 1) * share) for r in range(world)] if sharded else [(0, shape[0])] * world)


def test_padding_is_less_than_one_row_a_rank(ranks):
    lead = {"wide0": 5, "table": 701 * 37, "head": 131 * 127, "values": 617, "pairs": 1009 * 17, "gate": 1}
    for name, length in lead.items():
        shape = ranks[0]["banks"][name][1]
        assert shape[0] == math.ceil(length / len(ranks)) * len(ranks)
    assert math.prod(ranks[0]["banks"]["tall0"][1]) == 2 * 88 * 56 < SMALL_BANK_ELEMENTS


def test_ranks_agree_bit_for_bit(ranks):
    for rank in ranks[1:]:
        for key in ("middle", "final", "params"):
            assert_same(rank[key], ranks[0][key])
        assert rank["metrics"] == ranks[0]["metrics"]
    assert_same(ranks[0]["params"], weights_of(ranks[0]["final"]))


@pytest.mark.parametrize("key", ["middle", "final"])
def test_ranks_together_are_one_rank(ranks, single, key):
    assert_moved_alike(ranks[0][key], single[key], start_of(single[key]))


def test_metrics_do_not_depend_on_the_ranks(ranks, single):
    for actual, expected in zip(ranks[0]["metrics"], single["metrics"], strict=True):
        assert actual.keys() == expected.keys()
        for role in expected:
            assert actual[role] == pytest.approx(expected[role], rel=1e-3 if role == "embed" else 1e-5), role


def test_ranks_restore_bit_for_bit(ranks):
    for rank in ranks:
        assert_same(rank["restored"], rank["middle"])


def test_one_ranks_state_continues_on_several(ranks, single):
    assert_same(ranks[0]["loaded"], single["middle"])
    assert_moved_alike(ranks[0]["continued"], single["final"], start_of(single["final"]))


def test_several_ranks_state_continues_on_one(ranks, single):
    params = make_params(seed=5)
    optimizer = make_optimizer(params)
    optimizer.state.load(ranks[0]["middle"])
    assert_same(optimizer.state.tensors(), ranks[0]["middle"])
    run_steps(optimizer, params, range(HALF, STEPS))
    assert_moved_alike(optimizer.state.tensors(), ranks[0]["final"], start_of(single["final"]))


def test_one_of_two_tied_parameters_is_sent(ranks):
    """Four tied steps are two updates: each sends one gradient and one set of weights. The untied update sends two."""
    expected = train_tied(Comm(), by_hand=True)
    for rank in ranks:
        for key, sent in (("tied", 4), ("untied", 8)):
            assert_same(rank["tied"][key][0], expected[key][0])
            assert_same(rank["tied"][key][1], expected[key][1])
            assert rank["tied"][key][2] == sent


if __name__ == "__main__":
    as_rank(Path(sys.argv[1]))
