"""Seconds of one Muon step on track 3's 72 matrices on a CPU: our optimizer and torch.optim.Muon, in one process, in turns.

    python -m benchmarks.muon_step [--repeats 3]

All use Jordan's quintic with 5 steps: ours in float32; torch.optim.Muon as shipped, in bfloat16; and torch.optim.Muon with
its casts to bfloat16 removed, in float32 like ours. Writes muon_step.json.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
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

# The hidden matrices of GPT-2 small: q, k, v and the projection of attention, then the two of the MLP, in 12 layers.
SHAPES = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12


def make_weights() -> dict[str, torch.nn.Parameter]:
    """Return Gaussian weights by name, with gradients. The seed is fixed: every optimizer gets the same numbers."""
    torch.manual_seed(0)
    weights = {f"w{i}": torch.nn.Parameter(torch.randn(shape) * 0.02) for i, shape in enumerate(SHAPES)}
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    return weights


def build_optimizer(params: dict[str, torch.nn.Parameter], config: RuleConfig) -> ShardedOptimizer:
    """Build our optimizer for these parameters, all in the role `matrix`, on one rank."""
    return ShardedOptimizer(build_groups(params, dict.fromkeys(params, "matrix"), Optim(matrix=config)), Comm())


def our_step() -> Callable[[], None]:
    """Return a function that makes one step of our sharded optimizer."""
    config = Muon(unit="at_least_one", ns="quintic", lr=0.025, weight_decay=0.05)
    params = make_weights()
    optimizer = build_optimizer(params, config)
    # The constructor makes every gradient a view into a bank of zeros, so they are drawn again here.
    for weight in params.values():
        weight.grad.normal_()
    values = Schedule(Run()).values(0)
    return lambda: optimizer.step(values, 1)


def torch_step(*, float32: bool) -> Callable[[], None]:
    """Return a function that makes one step of torch.optim.Muon, as shipped or with its casts to bfloat16 removed."""
    optimizer = torch.optim.Muon(list(make_weights().values()), lr=0.025, weight_decay=0.05)

    def step() -> None:
        with patch.object(Tensor, "bfloat16", Tensor.clone) if float32 else nullcontext():
            optimizer.step()

    return step


def main(repeats: int = 3) -> None:
    """Time the optimizers in turns, write muon_step.json and print a line for each.

    Args:
        repeats: Timed steps of each optimizer, after one step of warm-up.
    """
    steps = {"ours": our_step(), "torch.optim.Muon": torch_step(float32=False),
             "torch.optim.Muon, float32": torch_step(float32=True)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: median / medians["ours"] for name, median in medians.items()}
    write_result("muon_step", "muon_step", matrices=len(SHAPES), seconds=seconds, median_seconds=medians,
                 ratio_to_ours=ratios)
    for name in steps:
        print(f"{name:>28}: median {medians[name]:7.2f} s, min {min(seconds[name]):7.2f} s, {ratios[name]:5.2f} x ours")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
