"""What a run will cost before it runs: operations, memory, communication, and predicted milliseconds.

    python -m scripts.plan speedrun --gpus 8
    python -m scripts.plan track3 --gpus 1 --device h200 --efficiency 0.4 -- --train.batch_tokens 262144

Arithmetic alone: no accelerator is needed and nothing is allocated. The prediction is as good as the stated shares of the
machine's peaks; flags after `--` change the run.
"""

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from configs.cli import fail, nearest, parse_row
from scripts.lab.machines import MACHINES, Efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What to plan."""

    preset: Annotated[str, tyro.conf.Positional]
    gpus: int = 8
    device: str = "h100"
    """h100, h200, a100 or 4090."""
    efficiency: float = 0.40
    """Share of the peak bfloat16 operations a second."""
    memory_efficiency: float = 0.70
    network_efficiency: float = 0.70
    json: bool = False
    """Print JSON instead of tables."""


def plan(args: Arguments, flags: list[str]) -> dict:
    """Stages with their predictions, totals, and the same on other machines. Raises ValueError for unknown names."""
    from scripts.lab.costs import measure_sizes, predict, seconds_of

    if args.device not in MACHINES:
        raise ValueError(f"unknown device {args.device!r}{nearest(args.device, list(MACHINES))}; "
                         f"devices: {', '.join(MACHINES)}")
    if args.gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {args.gpus}")
    run = parse_row(args.preset, flags)
    share = Efficiency(args.efficiency, args.memory_efficiency, args.network_efficiency)
    sizes, stages = measure_sizes(run)
    rows = [{"first_step": s.first, "steps": s.steps, **s.values._asdict(), "flops": s.flops,
             **(p := predict(s, sizes, MACHINES[args.device], gpus=args.gpus, share=share))._asdict(), "step_ms": p.step_ms}
            for s in stages]
    elsewhere = {name: {gpus: seconds_of(stages, sizes, machine, gpus=gpus, share=share) for gpus in (1, 8, 64, 1024)}
                 for name, machine in MACHINES.items()}
    return {"preset": args.preset, "device": args.device, "gpus": args.gpus, "efficiency": share._asdict(),
            "sizes": sizes._asdict(), "steps": run.train.steps,
            "tokens": sum(s.steps * s.values.batch_tokens for s in stages),
            "flops": sum(s.steps * s.flops for s in stages), "stages": rows,
            "seconds": seconds_of(stages, sizes, MACHINES[args.device], gpus=args.gpus, share=share), "elsewhere": elsewhere}


def tables(found: dict) -> str:
    """The plan in words."""
    sizes, share = found["sizes"], found["efficiency"]
    lines = [f"{found['preset']} on {found['gpus']} x {MACHINES[found['device']].name}: {sizes['parameters']:,} parameters, "
             f"{found['steps']:,} steps, {found['tokens']:,} tokens, {found['flops'] / 1e15:,.0f} PFLOP",
             f"at {share['flops']:.0%} of peak operations, {share['memory']:.0%} of memory and {share['network']:.0%} of "
             f"network bandwidth: {found['seconds']:,.1f} s", "",
             f"{'from':>6} {'steps':>6} {'batch':>9} {'context':>8} {'window':>7} {'long':>6} {'TFLOP':>8} {'MB sent':>8} "
             f"{'GB a rank':>9} {'compute':>8} {'update':>7} {'network':>8} {'step ms':>8}"]
    for row in found["stages"]:
        lines.append(f"{row['first_step']:>6} {row['steps']:>6} {row['batch_tokens']:>9,} {row['sequence_tokens']:>8,} "
                     f"{row['window_tokens'] or '-':>7} {row['long_window_tokens'] or '-':>6} {row['flops'] / 1e12:>8.1f} "
                     f"{row['network_bytes'] / 1e6:>8.0f} {row['rank_bytes'] / 1e9:>9.1f} {row['compute_ms']:>8.1f} "
                     f"{row['optimizer_ms']:>7.1f} {row['network_ms']:>8.1f} {row['step_ms']:>8.1f}")
    lines += ["", f"{'seconds on':>12} " + " ".join(f"{gpus:>9,}" for gpus in (1, 8, 64, 1024))]
    lines += [f"{MACHINES[name].name:>12} " + " ".join(f"{s:>9,.1f}" for s in row.values())
              for name, row in found["elsewhere"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    OWN, FLAGS = (sys.argv[1:], []) if "--" not in sys.argv else (
        sys.argv[1:sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1:])
    try:
        ARGUMENTS = tyro.cli(Arguments, description=__doc__, args=OWN, use_underscores=True)
        PLAN = plan(ARGUMENTS, FLAGS)
        print(json.dumps(PLAN, indent=2) if ARGUMENTS.json else tables(PLAN))
    except ValueError as error:
        fail(str(error))
