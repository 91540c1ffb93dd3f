"""A training step never waits for a value from the device: only then can the host queue work ahead of a GPU.

On the meta device tensors have shapes but no values, so reading a value raises an error.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.cli import parse
from configs.optim import RULES, Extra, Optim
from configs.optim import Adam as ConfigAdam
from configs.presets import PRESETS
from configs.schema import Run
from model import GPT, AuxLossWeights
from optim.adam import Adam
from optim.comm import DONE, Comm, Work
from optim.groups import build_groups
from optim.rule import Step
from optim.schedule import Schedule
from optim.sharded import ShardedOptimizer
from tests.optim.oracle import FULL
from train_gpt import Trainer

TOKENS = 64
CALLS = 6  # eager operations of an optimizer step beside the compiled updates; each costs the host some 5 microseconds
BANKS = 13  # of the record's recipe; four of them hold gates, whose lr_factors divide them
VIEWS = ("view", "select", "slice", "reshape", "alias", "detach", "unsqueeze", "transpose", "as_strided",
         "lift_fresh")  # launch nothing
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch reports synchronisations on CUDA only")


def steps_without_values(run: Run, count: int = 2) -> ShardedOptimizer:
    with torch.device("meta"):
        model = GPT(replace(run.model, attention="sdpa"), vocab_size=300, max_tokens=TOKENS, document_start=5,
                    prefix_of=[-1] * 300)
        tokens, weights = torch.zeros(2, TOKENS, dtype=torch.long), AuxLossWeights(torch.ones(2), torch.ones(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "project_start", lambda *_: None)  # it reads the initial weights, once
        groups = build_groups(dict(model.named_parameters()), model.roles(), run.optim, model.axes())
        optimizer = ShardedOptimizer(groups, Comm("meta"))
    values = Schedule(run).values(0)
    for step in range(count):
        model(tokens, tokens, aux_weights=weights if run.model.prefix_loss else None, **values.windows).backward()
        optimizer.step(values, step + 1)
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("preset", ["tiny", "bytes", "track3", "speedrun", "speedrun_cpu", "medium", "ngpt", "gpt_paper"])
def test_no_preset_reads_a_value_in_a_step(preset):
    steps_without_values(PRESETS[preset]())


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_reads_a_value_in_a_step(rule):
    run = PRESETS["bytes"]()
    steps_without_values(replace(run, optim=replace(run.optim, matrix=RULES[rule](extra=Extra(clip=1.0)))))


def test_only_the_check_for_non_finite_gradients_reads_a_value():
    optimizer = steps_without_values(PRESETS["tiny"](), count=1)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        optimizer.check_finite()


def test_reading_a_value_in_a_step_raises(monkeypatch):
    direction = Adam.direction
    monkeypatch.setattr(Adam, "direction", lambda rule, W, grad, *rest: direction(rule, W, grad * grad.sum().item(), *rest))
    with pytest.raises(RuntimeError, match="item"):
        steps_without_values(PRESETS["tiny_adamw"]())


class CountCalls(TorchDispatchMode):
    """Counts operations that would launch a kernel: those on tensors of the device, not on numbers on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = str(func).removeprefix("aten."), kwargs or {}
        launches = not name.startswith(VIEWS) and any(leaf.is_meta for leaf in tree_leaves((args, kwargs))
                                                      if isinstance(leaf, torch.Tensor))
        self.calls += [name] if launches else []
        return func(*args, **kwargs)


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_of_the_record_is_a_few_compiled_updates_and_little_else(count):
    run, updates = PRESETS["speedrun"](), []
    optimizer = steps_without_values(run, count=0)
    optimizer._compiled = lambda *_, **__: updates.append(1)
    with CountCalls() as counted:
        optimizer.step(Schedule(run).values(0), count, tied=("embed", "head.weight"))
        optimizer.zero_grad()
    assert len(counted.calls) <= CALLS, counted.calls
    assert len(updates) == len([bank for bank in optimizer.banks if count % bank.update_every == 0]) <= BANKS


@pytest.mark.parametrize("noted", [True, False])
def test_sparse_rows_are_exchanged_without_waiting_if_they_are_noted(noted, monkeypatch):
    """On rank 0 of 2, whose peer sends what it gets."""
    def exchange(out: torch.Tensor, sent: torch.Tensor, *_: object, **__: object) -> Work:
        if out.device.type == "cpu":
            out.copy_(sent)
        return DONE

    monkeypatch.setattr(torch.distributed, "all_to_all_single", exchange)
    comm = Comm("meta")
    comm.world_size, comm.broadcast, comm.all_gather = 2, lambda _: None, lambda _: DONE
    table = torch.nn.Parameter(torch.zeros(4096, 8, device="meta"))
    optim = Optim(bigram_embed=ConfigAdam(update_every=2, extra=Extra(sparse_rows=True)))
    optimizer = ShardedOptimizer(build_groups({"table": table}, {"table": "bigram_embed"}, optim), comm)
    assert optimizer.exchanges_rows
    for count in (1, 2):
        if noted:
            optimizer.note_rows({"table": torch.tensor([[5, 4000], [count, 5]])}, count)
        if count == 2 and noted:
            assert optimizer.banks[0].used.announced.send_counts.tolist() == [3, 1]
        if count == 1 or noted:
            optimizer.step(FULL, count)
        else:
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                optimizer.step(FULL, count)


@needs_cuda
@pytest.mark.parametrize("preset", ["bytes", "speedrun_cpu"])
def test_a_step_does_not_synchronise_with_cuda(preset, tmp_path):
    trainer = Trainer(parse([preset, "--run.device", "cuda", "--run.compile", "off", "--run.dir", str(tmp_path),
                             "--log.wandb", "disabled"]))
    batches = trainer.start_batches()
    for _ in range(2):
        trainer.step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
