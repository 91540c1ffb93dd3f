"""Plan of a run, printed before its first step: parameter groups, data, sizes, memory, and the schedule in numbers."""

from collections.abc import Callable, Iterable, Sequence
from textwrap import TextWrapper
from typing import Any, NamedTuple

import torch

from configs.optim import summary
from configs.schema import Run
from data.sources import Source

WIDTH = 80
"""Columns of the printed text: the usual width of a terminal."""


def format_plan(run: Run, source: Source, *, notes: list[str], dtype: torch.dtype, kernel: str, compiled: int, device: str,
                world_size: int, parameters: int, total_tokens: int, flops_per_token: float, state_bytes: int,
                activation_bytes: int) -> str:
    """Return what the run will do: machine, data, model, training and memory, one labelled row each.

    `notes` are remarks, a row each, after those of the source. `dtype` is the type of activations, `kernel` the
    implementation of attention, `compiled` the number of shapes that are compiled. `total_tokens` is the number of training
    tokens of all steps.
    """
    attention = kernel if run.model.flash == "default" else f"{kernel} by {run.model.flash}"
    return format_rows([
        ("run", f"preset {run.preset}, seed {run.run.seed}, on {world_size} x {device}"),
        ("numerics", f"activations in {str(dtype).removeprefix('torch.')}, attention by {attention}, "
                     f"torch.compile {f'on, {compiled} shapes' if compiled else 'off'}"),
        ("data", f"{source.name}, hash {source.data_hash}; {sum(map(len, source.train)):,} training tokens, "
                 f"{max(0, len(source.validation) - 1):,} validation tokens, vocabulary of {source.vocab_size:,} tokens"),
        *(("note", note) for note in (*source.notes, *notes)),
        ("model", f"{parameters:,} parameters, {flops_per_token / 1e6:,.1f} million floating-point operations per token "
                  "(forward and backward)"),
        ("training", f"{run.train.steps:,} steps, {total_tokens:,} tokens"),
        ("memory", f"{state_bytes / 2**20:,.0f} MiB per rank for weights, gradients and optimizer state, about "
                   f"{activation_bytes / 2**20:,.0f} MiB for activations")])


def format_rows(rows: Iterable[tuple[str, str]]) -> str:
    """Return one line "label  text" per row; a text beyond WIDTH columns continues below its beginning."""
    rows = list(rows)
    indent = max(len(label) for label, _ in rows) + 2
    # Words are never broken: a path or a flag must stay copyable, even if its line is too long then.
    wrapper = TextWrapper(WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrapper.fill(label.ljust(indent) + text) for label, text in rows)


def format_groups(groups: Iterable[Any]) -> str:
    """Return a table with one line per group, and the settings of every rule below it.

    Groups have the attributes `role`, `params` and `config` of optim/groups.py.
    """
    table = [("role", "tensors", "parameters", "rule", "lr", "weight decay")]
    roles_by_settings: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        config, elements = group.config, sum(param.numel() for param in group.params.values())
        decay = f"{config.weight_decay:g} {config.decay}" if config.weight_decay else "none"
        table.append((group.role, str(len(group.params)), f"{elements:,}", config.rule, f"{config.lr:g}", decay))
        roles_by_settings.setdefault((config.rule, summary(config)), []).append(group.role)
    # Settings are long, and most groups share them: they are printed once.
    rows = ((rule, f"for {', '.join(roles)}: {settings}") for (rule, settings), roles in roles_by_settings.items())
    return _align(table, str.ljust) + "\n\n" + format_rows(rows)


def format_schedule(values: Callable[[int], NamedTuple], total_steps: int) -> str:
    """Return a table of the scheduled values at eleven steps, one line per step.

    Values that do not change are listed above the table; those that are None or their default are left out.
    """
    steps = sorted({round(i * (total_steps - 1) / 10) for i in range(11)})
    at_steps, defaults = [values(step) for step in steps], values(0)._field_defaults
    columns, constants = [["", "", "step", *map(str, steps)]], []
    for name in at_steps[0]._fields:
        cells = [getattr(at_step, name) for at_step in at_steps]
        if len(set(cells)) > 1:
            # A word of the name per line, because the full names of ten columns would not fit.
            words = name.split("_")
            columns.append([""] * (3 - len(words)) + words + ["-" if x is None else str(round(x, 4)) for x in cells])
        elif cells[0] not in (None, defaults.get(name)):
            constants.append(f"{name} {round(cells[0], 4)}")
    rows = [("schedule", "lr and weight_decay multiply those of the groups, momentum replaces theirs; --help schedule "
                         "explains each value"), ("constant", ", ".join(constants))]
    return "\n" + format_rows(rows) + "\n\n" + _align(list(zip(*columns, strict=True)), str.rjust).lstrip("\n")


def _align(table: Sequence[Sequence[str]], justify: Callable[[str, int], str]) -> str:
    """Return the rows of a table as lines, with two blanks between the columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(justify(cell, w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)
