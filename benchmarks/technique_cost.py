"""Time of a training step without each technique of a preset, relative to the full preset.

    python -m benchmarks.technique_cost --rounds 12

A round has as many steps as the period of the slowest parameter group, so that every round updates every group. Rounds with
and without the technique alternate in one process, so that other work on the machine slows both alike. Writes
technique_cost.json: the median step of the full preset, and for each technique the median over rounds of

    seconds without the technique / seconds with it

A ratio below 1 means that the technique costs time.
"""

import statistics
import time

import torch
import tyro

from benchmarks import write_result
from configs.ablations import leave_one_out_rows
from configs.cli import parse, parse_row
from configs.presets import PRESETS
from train_gpt import Trainer


def seconds_per_step(trainer: Trainer, steps: int, seed: int) -> float:
    """Return the mean seconds of `steps` steps on random tokens: forward, backward and update, without data loading.

    All scheduled values are those of the middle of the run.
    """
    values = trainer.schedule.values(trainer.run.train.steps // 2)
    shape = values.batch_tokens // values.sequence_tokens, values.sequence_tokens
    tokens = torch.randint(trainer.source.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    began = time.perf_counter()
    for step in range(steps):
        trainer.gradients(tokens, tokens.roll(-1, 1), values)
        trainer.optimizer.step(values, step + 1)
        trainer.optimizer.zero_grad()
    return (time.perf_counter() - began) / steps


def main(preset: str = "speedrun_cpu", rounds: int = 12) -> None:
    """Time every technique of a preset and write the ratios."""
    full, full_times, ratios = Trainer(parse([preset, "--run.device", "cpu"])), [], {}
    for row in leave_one_out_rows(PRESETS[preset]()):
        ablated = Trainer(parse_row(preset, row.flags.split()))
        period = full.optimizer.period
        times = [tuple(seconds_per_step(trainer, period, seed) for trainer in (full, ablated))
                 for seed in range(rounds + 1)][1:]  # the first round warms up caches and allocators
        full_times += [with_it for with_it, _ in times]
        # A ratio per round, then the median: both steps of a round saw the same load of the machine.
        ratios[row.name] = statistics.median(without / with_it for with_it, without in times)
        print(f"{row.name:28s} {ratios[row.name]:.3f}", flush=True)
    write_result("technique_cost", f"technique_cost --preset {preset} --rounds {rounds}",
                 median_step_ms=1e3 * statistics.median(full_times), without_over_with=ratios)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
