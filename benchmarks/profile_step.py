"""Profile steps of a run: milliseconds and launches by class of kernel, the longest kernels, and how long the device idles.

    python -m benchmarks.profile_step speedrun_1gpu --out profile.json -- --train.steps 60

The run is compiled and warmed up as in training; WARM steps pass before the profiled ones. On a CPU the classes are those of
PyTorch's operations. Flags of the run stand after `--`.
"""

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from configs.cli import parse_row
from data.run.environment import device_name
from scripts import command
from train_gpt import Trainer

WARM = 3
CLASSES = (  # the first pattern that occurs in a kernel's name decides
    ("communication", "nccl|c10d|gloo"), ("attention", "flex|flash|fmha|scaled_dot_product|varlen"),
    ("product", r"gemm|cutlass|nvjet|wgmma|xmma|cublas|_mm\b|::mm|::bmm|addmm|matmul|linear_relu2|symmetric|triton_tem"),
    ("loss", "softmax|cross_entropy|row_kernel|nll_loss"), ("embedding", "embedding|index_add|scatter|gather|sort"),
    ("copy", "memcpy|memset|copy_|aten::to|fill_|zero_"), ("memory-bound", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Run to profile, and the file of the result."""

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")] = "tiny"
    """Preset of the run."""
    steps: int = 2
    """Profiled steps; two, because some optimizers update at every second step only."""
    out: Path | None = None
    """JSON file for the result."""


class Kernel(NamedTuple):
    """One kernel or operation, over all profiled steps."""

    name: str
    ms: float
    launches: int


def classify(name: str) -> str:
    """Return the class of a kernel by its name."""
    return next(label for label, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE))


def measure(trainer: Trainer, steps: int) -> tuple[list[Kernel], float]:
    """Return the kernels of so many steps, and the milliseconds that the steps took, profiler included."""
    if trainer.compiled:
        trainer.warm_up()
    batches, on_cuda = trainer.start_batches(), trainer.device.type == "cuda"
    for _ in range(WARM):
        trainer.step(batches)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(steps):
            trainer.step(batches)
        if on_cuda:
            torch.cuda.synchronize()
        ms = 1e3 * (time.perf_counter() - began)
    batches.close()
    return kernels_of(profiler.key_averages(), on_cuda), ms


def kernels_of(events: Iterable[Any], on_cuda: bool) -> list[Kernel]:
    """Return what ran on the device, longest first: kernels on CUDA, operations without those that they call on CPUs."""
    kernels = []
    for event in events:
        on_device = "CUDA" in str(event.device_type)
        microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if on_device == on_cuda and microseconds > 0:
            kernels.append(Kernel(event.key, microseconds / 1e3, event.count))
    return sorted(kernels, key=lambda kernel: -kernel.ms)


def summarise(kernels: list[Kernel], ms: float, steps: int) -> dict[str, Any]:
    """Return milliseconds and launches of a step by class, the longest kernels, and the idle share, as JSON values."""
    classes: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for kernel in kernels:
        of_class = classes[classify(kernel.name)]
        of_class[0] += kernel.ms / steps
        of_class[1] += kernel.launches / steps
    busy = sum(kernel.ms for kernel in kernels)
    rows = sorted(classes.items(), key=lambda row: -row[1][0])
    return {"step_ms": ms / steps, "busy_ms": busy / steps, "idle_share": max(0.0, 1 - busy / ms),
            "classes": {name: {"ms": time_ms, "launches": launches} for name, (time_ms, launches) in rows},
            "kernels": [{"class": classify(k.name), "ms": k.ms / steps, "launches": k.launches / steps, "name": k.name}
                        for k in kernels[:40]]}


def table_lines(result: dict[str, Any]) -> list[str]:
    """Return the result as lines, the longest kernels last."""
    rows = [(name, row["ms"], row["launches"]) for name, row in result["classes"].items()]
    rows += [(kernel["name"][:90], kernel["ms"], kernel["launches"]) for kernel in result["kernels"]]
    return [f"{result['preset']} on {result['device']}: {result['step_ms']:.1f} ms a step under the profiler, kernels "
            f"{result['busy_ms']:.1f} ms, idle {result['idle_share']:.0%}",
            f"{'ms a step':>10} {'launches':>9}  class or kernel",
            *(f"{ms:>10.3f} {launches:>9.1f}  {name}" for name, ms, launches in rows)]


def main(args: Arguments, flags: list[str]) -> None:
    """Profile, print the table, and write the JSON file."""
    trainer = Trainer(parse_row(args.preset, flags))
    kernels, ms = measure(trainer, args.steps)
    result = {"preset": args.preset, "flags": flags, "device": device_name(trainer.device), "torch": torch.__version__,
              "steps": args.steps} | summarise(kernels, ms, args.steps)
    trainer.comm.close()
    print("\n".join(table_lines(result)))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    command(main, Arguments, __doc__, flags=True)
