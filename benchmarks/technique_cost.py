"""What each technique of a preset costs: a training step without it beside one with everything, in turn.

    python -m benchmarks.technique_cost --rounds 12

A round is as many steps of either as the slowest group waits for, at the schedule's middle; rounds alternate in one process,
so that other work on the machine slows both alike. Writes technique_cost.json: the median step with everything, and by
technique the median of round over round, without it over with it.
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


def seconds_of_a_round(trainer: Trainer, steps: int, seed: int) -> float:
    """Seconds a step, over a round of so many, of gradients and updates at the schedule's middle, on random tokens."""
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
    """Time every technique of a preset, and write the ratios down."""
    everything, times, ratios = Trainer(parse([preset, "--run.device", "cpu"])), [], {}
    for row in leave_one_out_rows(PRESETS[preset]()):
        less = Trainer(parse_row(preset, row.flags.split()))
        period = everything.optimizer.period
        pairs = [tuple(seconds_of_a_round(trainer, period, i) for trainer in (everything, less))
                 for i in range(rounds + 1)][1:]
        times += [both for both, _ in pairs]
        ratios[row.name] = statistics.median(without / both for both, without in pairs)
        print(f"{row.name:28s} {ratios[row.name]:.3f}", flush=True)
    write_result("technique_cost", f"technique_cost --preset {preset} --rounds {rounds}",
                 median_step_ms=1e3 * statistics.median(times), without_over_with=ratios)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
