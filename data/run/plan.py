"""What a run says of itself before it begins: its plan, and the schedule in numbers."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from configs.optim import summary
from configs.schema import Run
from data.sources import Source

PLAN = """\
preset {run.preset} on {world_size} x {device}, seed {run.run.seed}, activations {activations}, attention {attention}, \
compile {compiled}
data {source.name}, hash {source.data_hash}, {train_tokens:,} training tokens, {val_tokens:,} validation tokens, vocabulary \
{source.vocab_size:,}
{notes}{parameters:,} parameters, {megaflops:.1f} MFLOP a token; {run.train.steps:,} steps, {total_tokens:,} tokens; \
memory a rank: weights, gradients and optimizer state {state:,.0f} MiB, activations about {memory:,.0f} MiB"""


def format_plan(run: Run, source: Source, *, notes: list[str], dtype: torch.dtype, kernel: str, compiled: bool,
                flops_per_token: float, state_bytes: int, activation_bytes: int, **numbers: object) -> str:
    """What the run will do: machine, data, a line for each note, sizes, memory.

    `kernel` computes attention, `dtype` is that of activations; `numbers` are world_size, device, parameters and
    total_tokens.
    """
    return PLAN.format(
        run=run, source=source, notes="".join(f"{note}\n" for note in (*source.notes, *notes)),
        attention=kernel if run.model.flash == "default" else f"{kernel} by {run.model.flash}",
        activations=str(dtype).removeprefix("torch."), compiled="on" if compiled else "off",
        train_tokens=sum(map(len, source.train)), val_tokens=len(source.validation) - 1, megaflops=flops_per_token / 1e6,
        state=state_bytes / 2**20, memory=activation_bytes / 2**20, **numbers)


def format_groups(groups: Iterable[Any]) -> str:
    """A table of one line a group: role, tensors, parameters, rule and its settings; of `role`, `params` and `config`."""
    rows = [("role", "tensors", "parameters", "rule", "lr", "decay", "settings")]
    for group in groups:
        config, elements = group.config, sum(param.numel() for param in group.params.values())
        decay = f"{config.weight_decay:g} {config.decay}" if config.weight_decay else "none"
        rows.append((group.role, str(len(group.params)), f"{elements:,}", config.rule, f"{config.lr:g}", decay,
                     summary(config)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def format_schedule(values: Callable[[int], NamedTuple], total_steps: int) -> str:
    """A table of what holds at eleven steps: one line a step, one column a value, - for None."""
    lines = [f"{'step':>8} " + " ".join(f"{name:>15}" for name in values(0)._fields)]
    for step in sorted({round(i * (total_steps - 1) / 10) for i in range(11)}):
        cells = ("-" if x is None else f"{x:.6g}" for x in values(step))
        lines.append(f"{step:>8} " + " ".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)
