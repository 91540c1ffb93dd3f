"""What the sphere costs: a training step of `ngpt_bytes` beside one of `bytes`, the same matrices, in turn.

    python -m benchmarks.sphere_step --steps 200

Steps of both are taken alternately in one process, so that other work on the machine slows both alike; medians are compared.
Writes sphere_step.json.
"""

import statistics
import time
from pathlib import Path

import torch
import tyro

from configs.cli import parse
from data.run.environment import describe_environment
from data.run.folder import write_json
from train_gpt import Trainer

HERE = Path(__file__).resolve().parent


def seconds_of_a_step(trainer: Trainer, tokens: torch.Tensor) -> dict[str, float]:
    """Seconds of one step's gradients and of its update."""
    values = trainer.schedule.values(0)
    began = time.perf_counter()
    trainer.gradients(tokens, tokens.roll(-1, 1), values)
    middle = time.perf_counter()
    trainer.optimizer.step(values, 1)
    trainer.optimizer.zero_grad()
    return {"gradients": middle - began, "update": time.perf_counter() - middle}


def main(steps: int = 200) -> None:
    """Time both, step by step in turn, and write down the medians in milliseconds."""
    trainers = {name: Trainer(parse([name, "--run.device", "cpu"])) for name in ("bytes", "ngpt_bytes")}
    tokens = torch.randint(256, (12, 64), generator=torch.Generator().manual_seed(0))
    times = {name: [] for name in trainers}
    for _ in range(steps):
        for name, trainer in trainers.items():
            times[name].append(seconds_of_a_step(trainer, tokens))
    found = {name: {part: 1e3 * statistics.median(t[part] for t in taken) for part in taken[0]}
             for name, taken in times.items()}
    whole = {name: sum(parts.values()) for name, parts in found.items()}
    environment = describe_environment()
    environment.pop("variables")
    write_json(HERE / "sphere_step.json", {
        "command": f"python -m benchmarks.sphere_step --steps {steps}", "environment": environment,
        "threads": torch.get_num_threads(), "median_ms": found, "ratio": whole["ngpt_bytes"] / whole["bytes"]})
    print(found, f"ratio {whole['ngpt_bytes'] / whole['bytes']:.3f}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
