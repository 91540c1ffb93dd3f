"""What a run will cost before it runs: operations, memory, communication, and predicted milliseconds.

    python -m scripts.plan speedrun --gpus 8
    python -m scripts.plan track3 --gpus 1 --device h200 --efficiency 0.4 -- --train.batch_tokens 262144

Arithmetic alone: no accelerator is needed and nothing is allocated. The prediction is as good as the stated shares of the
machine's peaks: of presets with public logs the plan says which share they imply. Flags after `--` change the run.
"""

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from configs.cli import parse_row
from configs.notation import nearest
from scripts import command
from scripts.lab.costs import LOGS, MACHINES, Efficiency, Prediction, Stage, measure_sizes, predict, predict_seconds

COUNTS = (1, 8, 64, 1024)
"""Accelerators for which the whole run is predicted, the batch unchanged (strong scaling)."""


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
    if args.device not in MACHINES:
        raise ValueError(f"unknown device {args.device!r}{nearest(args.device, list(MACHINES))}; "
                         f"devices: {', '.join(MACHINES)}")
    check_numbers(args)
    run, machine = parse_row(args.preset, flags), MACHINES[args.device]
    share = Efficiency(args.efficiency, args.memory_efficiency, args.network_efficiency)
    sizes, stages = measure_sizes(run)
    rows = [row_of(s, predict(s, sizes, machine, gpus=args.gpus, share=share), args.gpus) for s in stages]
    elsewhere = {name: {gpus: {"seconds": predict_seconds(stages, sizes, other, gpus=gpus, share=share),
                               "fits": max(predict(s, sizes, other, gpus=gpus, share=share).rank_bytes for s in stages)
                               <= other.memory_bytes} for gpus in COUNTS} for name, other in MACHINES.items()}
    return {"preset": args.preset, "device": args.device, "gpus": args.gpus, "efficiency": share._asdict(),
            "parameters": sizes.parameters, "orthogonalization_flops": sizes.newton_schulz_flops,
            "padding": sizes.padding(args.gpus), "steps": run.train.steps,
            "tokens": sum(s.steps * s.values.batch_tokens for s in stages),
            "flops": sum(s.steps * s.flops for s in stages), "stages": rows, "micro_tokens": run.train.micro_tokens,
            "seconds": predict_seconds(stages, sizes, machine, gpus=args.gpus, share=share), "elsewhere": elsewhere,
            "logs": [] if flags else logged(args.preset, stages)}


def check_numbers(args: Arguments) -> None:
    """Raise ValueError for numbers that are none of accelerators or shares."""
    if args.gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {args.gpus}")
    for name in ("efficiency", "memory_efficiency", "network_efficiency"):
        if not 0 < getattr(args, name) <= 1:
            raise ValueError(f"--{name} is a share of a peak, above 0 and at most 1, got {getattr(args, name)}")


def row_of(stage: Stage, found: Prediction, gpus: int) -> dict:
    """One stage in the table."""
    return {"first_step": stage.first, "steps": stage.steps, **stage.values._asdict(), "flops": stage.flops,
            "sequences": stage.portion(gpus)[0], **found._asdict(), "rank_bytes": found.rank_bytes, "step_ms": found.step_ms}


def logged(preset: str, stages: list[Stage]) -> list[dict]:
    """Public logs of a preset's stages, with the share of the peak that each implies."""
    flops = {stage.first: stage.flops for stage in stages}
    return [log._asdict() | {"reached": flops[log.first] / (log.gpus * MACHINES[log.machine].flops * log.step_ms / 1e3)}
            for log in LOGS if log.preset == preset]


def tables(found: dict) -> str:
    """The plan in words."""
    return "\n".join([*heading(found), "", *stage_lines(found["stages"]), "", *remarks(found), *elsewhere_lines(found)])


def heading(found: dict) -> list[str]:
    """What the whole takes, and by which assumptions."""
    share = found["efficiency"]
    return [f"{found['preset']} on {found['gpus']} x {MACHINES[found['device']].name}: {found['parameters']:,} parameters, "
            f"{found['steps']:,} steps, {found['tokens']:,} tokens, {found['flops'] / 1e15:,.0f} PFLOP",
            f"at {share['flops']:.0%} of peak operations, {share['memory']:.0%} of memory and {share['network']:.0%} of "
            f"network bandwidth: {found['seconds']:,.1f} s"]


def stage_lines(stages: list[dict]) -> list[str]:
    """One line a stage: TFLOP of all ranks together, the rest of the busiest one."""
    lines = [f"{'from':>6} {'steps':>6} {'batch':>9} {'context':>8} {'window':>7} {'long':>6} {'TFLOP':>8} {'GB moved':>8} "
             f"{'MB sent':>8} {'compute':>8} {'update':>7} {'network':>8} {'step ms':>8}"]
    for row in stages:
        lines.append(f"{row['first_step']:>6} {row['steps']:>6} {row['batch_tokens']:>9,} {row['sequence_tokens']:>8,} "
                     f"{row['window_tokens'] or '-':>7} {row['long_window_tokens'] or '-':>6} {row['flops'] / 1e12:>8.1f} "
                     f"{row['traffic_bytes'] / 1e9:>8.1f} {row['network_bytes'] / 1e6:>8.0f} {row['compute_ms']:>8.1f} "
                     f"{row['optimizer_ms']:>7.1f} {row['network_ms']:>8.1f} {row['step_ms']:>8.1f}")
    return lines


def remarks(found: dict) -> list[str]:
    """Memory of a rank, ranks without work, and what public logs say."""
    machine, row = MACHINES[found["device"]], max(found["stages"], key=lambda row: row["rank_bytes"])
    parts = ", ".join(f"{name} {row[f'{key}_bytes'] / 1e9:.1f}" for name, key in (
        ("weights", "weight"), ("gradients", "gradient"), ("optimizer state", "state"), ("activations about", "activation")))
    lines = [f"GB a rank: {parts}; {row['rank_bytes'] / 1e9:.1f} of {machine.memory_bytes / 1e9:.0f}"]
    if row["rank_bytes"] > machine.memory_bytes:
        lines.append("that does not fit" if row["rank_bytes"] - row["activation_bytes"] > machine.memory_bytes else
                     f"that does not fit: lower --train.micro_tokens ({found['micro_tokens']:,})")
    if (fewest := min(row["sequences"] for row in found["stages"])) < found["gpus"]:
        lines.append(f"a batch of {fewest:,} sequences keeps no more than {fewest:,} of {found['gpus']:,} ranks busy: "
                     "shorten --data.sequence_tokens, or raise --train.batch_tokens")
    if found["padding"] > 0.25:
        lines.append(f"banks are filled up to a multiple of {found['gpus']:,} ranks: weights are {1 + found['padding']:.1f} "
                     "times as many bytes, held and sent")
    return lines + [f"a public log says {log['step_ms']:,.1f} ms from step {log['first']} on {log['gpus']} x "
                    f"{MACHINES[log['machine']].name}: {log['reached']:.0%} of peak operations" for log in found["logs"]]


def elsewhere_lines(found: dict) -> list[str]:
    """Seconds of the same run, batch and portions as they are, on other machines."""
    lines = ["", f"{'seconds on':>12} " + " ".join(f"{gpus:>10,}" for gpus in COUNTS)]
    for name, row in found["elsewhere"].items():
        cells = (f"{x['seconds']:>9,.1f}{' ' if x['fits'] else '*'}" for x in row.values())
        lines.append(f"{MACHINES[name].name:>12} " + " ".join(cells).rstrip())
    everywhere = all(x["fits"] for row in found["elsewhere"].values() for x in row.values())
    return lines if everywhere else [*lines, f"* more memory than it has, at --train.micro_tokens {found['micro_tokens']:,}"]


def main(args: Arguments, flags: list[str]) -> None:
    """Print the plan."""
    found = plan(args, flags)
    print(json.dumps(found, indent=2) if args.json else tables(found))


if __name__ == "__main__":
    command(main, Arguments, __doc__, flags=True)
