"""One optimizer step on track 3's 72 matrices on a CPU: ours beside torch.optim.Muon, in one process, in turns.

    python -m benchmarks.muon_step [--repeats 3]

Three contestants, all with Jordan's quintic and 5 steps: ours; torch.optim.Muon as shipped (bfloat16); and the same
with its bfloat16 casts removed (float32, like ours on CPUs). Writes muon_step.json.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
import tyro
from torch import Tensor

from benchmarks import write_result
from configs.optim import Muon, Optim, RuleConfig
from configs.schema import Run
from optim.comm import Comm
from optim.groups import build_groups
from optim.schedule import Schedule
from optim.sharded import ShardedOptimizer

SHAPES = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12


@dataclass
class Timing:
    """Arguments of the benchmark."""

    repeats: int = 3
    """Steps of each contestant, after one that is not counted."""


def matrices() -> dict[str, Tensor]:
    """Fresh weights with gradients."""
    torch.manual_seed(0)
    found = {f"w{i}": torch.nn.Parameter(torch.randn(shape) * 0.02) for i, shape in enumerate(SHAPES)}
    for weight in found.values():
        weight.grad = torch.randn_like(weight)
    return found


def optimizer_of(params: dict[str, torch.nn.Parameter], config: RuleConfig) -> ShardedOptimizer:
    """Our optimizer of these matrices, all in one group, on one rank."""
    return ShardedOptimizer(build_groups(params, dict.fromkeys(params, "matrix"), Optim(matrix=config)), Comm())


def ours() -> Callable[[], None]:
    """The step of our sharded optimizer."""
    config = Muon(unit="at_least_one", ns="quintic", lr=0.025, weight_decay=0.05)
    params = matrices()
    optimizer = optimizer_of(params, config)
    for weight in params.values():
        weight.grad.normal_()
    values = Schedule(Run()).values(0)
    return lambda: optimizer.step(values, 1)


def theirs(*, float32: bool) -> Callable[[], None]:
    """The step of torch.optim.Muon, as shipped or with its casts to bfloat16 removed."""
    optimizer = torch.optim.Muon(list(matrices().values()), lr=0.025, weight_decay=0.05)

    def step() -> None:
        with patch.object(Tensor, "bfloat16", Tensor.clone) if float32 else nullcontext():
            optimizer.step()

    return step


def main(args: Timing) -> None:
    """Time the contestants in turns."""
    contestants = {"ours": ours(), "torch.optim.Muon": theirs(float32=False),
                   "torch.optim.Muon, float32": theirs(float32=True)}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(args.repeats + 1):
        for name, step in contestants.items():
            began = time.perf_counter()
            step()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = {name: found / median["ours"] for name, found in median.items()}
    write_result("muon_step", "muon_step", matrices=len(SHAPES), seconds=seconds, median_seconds=median,
                 ratio_to_ours=ratios)
    for name in contestants:
        print(f"{name:>28}: median {median[name]:7.2f} s, min {min(seconds[name]):7.2f} s, {ratios[name]:5.2f} x ours")


if __name__ == "__main__":
    main(tyro.cli(Timing, description=__doc__))
