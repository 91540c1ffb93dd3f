"""A training step never waits for a value from the device: only then can the host queue work ahead of a GPU.

On the meta device tensors have shapes but no values, so reading a value raises an error.
"""

from dataclasses import replace

import pytest
import torch

from configs.cli import parse
from configs.optim import RULES, Extra
from configs.presets import PRESETS
from configs.schema import Run
from model import GPT, AuxLossWeights
from optim.adam import Adam
from optim.comm import Comm
from optim.groups import build_groups
from optim.rule import Step
from optim.schedule import Schedule
from optim.sharded import ShardedOptimizer
from train_gpt import Trainer

TOKENS = 64
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
