"""No gradient, however hostile, puts a NaN into a weight, by any rule; those that are not finite are refused by name."""

import pytest
import torch
from torch import Tensor, nn

from configs.groups import Group, Optim
from optim.bank import Bank
from optim.comm import Comm
from optim.finite import NonFiniteError, Watch
from optim.groups import build_groups
from optim.rules import RULES, Hyper
from optim.schedule import Values
from optim.sharded import ShardedOptimizer
from optim.step import Step

SHAPES = {"wide": (5, 8), "other": (5, 8), "tall": (9, 4), "square": (6, 6), "vector": (7,), "number": (1,)}
VALUES = Values(1, 1, None, 1, 1, None)


def gaussian(name: str, step: int = 0) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name) + 10 * step))


def rank_one(name: str, step: int) -> Tensor:
    left = torch.arange(1.0, SHAPES[name][0] + 1)
    return left[:, None] * torch.ones(SHAPES[name][1]) if len(SHAPES[name]) == 2 else left


def without_some_rows(name: str, step: int) -> Tensor:
    grad = gaussian(name, step)
    grad[::2] = 0
    return grad


HOSTILE = {
    "zero": lambda name, step: torch.zeros(SHAPES[name]), "rank_one": rank_one, "rows": without_some_rows,
    "constant": lambda name, step: torch.full(SHAPES[name], 0.1),
    "tiny": lambda name, step: 1e-30 * gaussian(name, step), "huge": lambda name, step: 1e30 * gaussian(name, step),
    "spike": lambda name, step: gaussian(name, step) * (1e30 if step == 1 else 1),
    "late": lambda name, step: gaussian(name, step) * (step > 1),
    "vanishing": lambda name, step: gaussian(name, step) * (step < 1),
}


def make(rule: str, dtype: torch.dtype = torch.float32, **fields: object) -> tuple[dict, ShardedOptimizer]:
    params = {name: nn.Parameter((0.1 * gaussian(name)).to(dtype)) for name in SHAPES}
    optim = Optim(matrix=Group(rule=rule, lr=0.01, **fields))
    return params, ShardedOptimizer(build_groups(params, dict.fromkeys(params, "matrix"), optim), Comm())


def run(params: dict, optimizer: ShardedOptimizer, grad_of, steps: int = 5) -> None:
    for step in range(steps):
        for name, param in params.items():
            param.grad.copy_(grad_of(name, step))
        optimizer.step(VALUES, step + 1)
        for name, param in params.items():
            assert param.isfinite().all(), f"{name} at step {step}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("rule", RULES)
def test_hostile_gradients_leave_weights_and_memories_finite(rule, kind, dtype):
    params, optimizer = make(rule, dtype)
    run(params, optimizer, HOSTILE[kind])
    for name, tensor in optimizer.state_tensors().items():
        assert not tensor.isnan().any(), name


@pytest.mark.parametrize("fields", [
    {"weight_decay": 0.1}, {"constraint": "hyperball"}, {"clip": 1.0, "clip_norm": "spectral"}, {"clip": 1.0}],
    ids=["decay", "hyperball", "spectral_clip", "clip"])
@pytest.mark.parametrize("rule", RULES)
def test_hostile_gradients_under_every_step(rule, fields):
    if rule == "stiefel" and "constraint" in fields:
        pytest.skip("its weights live on a manifold of their own")
    for kind in ("zero", "huge", "rank_one"):
        run(*make(rule, **fields), HOSTILE[kind], steps=2)


@pytest.mark.parametrize("rule", RULES)
def test_zero_gradients_move_nothing(rule):
    params, optimizer = make(rule)
    before = {name: param.detach().clone() for name, param in params.items()}
    run(params, optimizer, HOSTILE["zero"])
    for name, param in params.items():
        torch.testing.assert_close(param.detach(), before[name], rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_moves_every_tensor(rule):
    """SWAN removes the mean of a row, and so leaves a single number where it is; on the Stiefel manifold it is 1 or -1."""
    params, optimizer = make(rule)
    before = {name: param.detach().clone() for name, param in params.items()}
    run(params, optimizer, gaussian)
    stays = {name for name, param in params.items() if torch.equal(param, before[name])}
    assert stays <= ({"number"} if rule in ("swan", "stiefel") else set())


@pytest.mark.parametrize("rule", RULES)
def test_a_rank_that_owns_nothing_may_be_asked(rule):
    built, W = RULES[rule].build(Group(rule=rule)), torch.zeros(0, 4, 6)
    state = built.init_state(W)
    hyper = Hyper(*(torch.tensor(x) for x in (0.1, 0.1, 0.9, 1.0)), shared=built.init_shared())
    part = built.sums(W, W, state, hyper)
    if part is not None:
        assert not part.any()
        built.absorb(part, hyper)
    built.update(W, torch.zeros(0, 4, 6), state, hyper, step=Step())
    assert all(tensor.isfinite().all() for tensor in hyper.shared.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", RULES)
def test_one_bad_number_is_refused_before_any_weight_moves(rule, bad):
    params, optimizer = make(rule)
    run(params, optimizer, gaussian, steps=2)
    before = optimizer.state_tensors()
    for param in params.values():
        param.grad.fill_(1.0)
    params["other"].grad[3, 5] = bad
    with pytest.raises(NonFiniteError, match=r"gradient of other is not finite at step 3"):
        optimizer.step(VALUES, 3)
    after = optimizer.state_tensors()
    assert all(torch.equal(after[name], before[name]) for name in before)


# ---- Where raising at once would wait for the device ----------------------------------------------


class Later(ShardedOptimizer):
    """As on CUDA: gradients are watched one by one, and refused when asked."""

    def _receive_early(self, launched: list, hypers: dict, count: int) -> None:
        for index, bank in enumerate(self.banks):
            if hypers[bank.group.role].shared:
                self._receive(index, launched, count)


@pytest.mark.parametrize("rule", ["adam", "prodigy", "agd", "steepest"])
def test_refused_later_no_weight_sees_it(rule):
    params, optimizer = make(rule)
    optimizer.__class__ = Later
    run(params, optimizer, lambda name, step: gaussian(name, step) * (float("nan") if name == "tall" and step > 1 else 1))
    with pytest.raises(NonFiniteError, match=r"gradient of tall is not finite at step 3"):
        optimizer.refuse_non_finite()
    assert not any(t.isnan().any() for t in optimizer.state_tensors().values())


def test_the_first_of_several_is_named_and_forgotten_on_restore():
    params, optimizer = make("adam")
    optimizer.__class__ = Later
    snapshot = optimizer.snapshot()
    run(params, optimizer, lambda name, step: gaussian(name) / (step < {"square": 2, "wide": 3}.get(name, 9)))
    with pytest.raises(NonFiniteError, match="square is not finite at step 3"):
        optimizer.refuse_non_finite()
    optimizer.restore(snapshot)
    optimizer.refuse_non_finite()


def test_the_watch_finds_the_parameter_in_a_banks_slice():
    """Three matrices, of which this rank owns the last two."""
    group = build_groups({"w": torch.zeros(2, 3)}, {"w": "matrix"}, Optim())[0]
    weights = torch.zeros(3, 2, 3)
    bank = Bank(group, ["a", "b", "c"], torch.Size([2, 3]), weights, weights.clone(), slice(1, 3), True, group.step)
    watch, grad = Watch([bank], Comm()), torch.ones(2, 2, 3)
    watch.see(0, grad, 1)
    watch.refuse()
    grad[1, 0, 2] = float("inf")
    watch.see(0, grad, 7)
    assert not grad.any()
    with pytest.raises(NonFiniteError, match="gradient of c is not finite at step 7"):
        watch.refuse()


def test_watching_on_a_gpu_never_waits_for_it():
    """Tensors without values stand for ones that are not computed yet: reading one raises."""
    comm = Comm()
    comm.device = torch.device("meta")
    watch = Watch([None], comm)
    watch.see(0, torch.ones(2, 2, 3, device="meta"), 1)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        watch.refuse()
