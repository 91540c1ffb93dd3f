"""Predict what a run will cost: FLOPs, memory, communication, and milliseconds per step.

    python -m scripts.plan speedrun --gpus 8
    python -m scripts.plan track3 --gpus 1 --device h200 --efficiency 0.4
    python -m scripts.plan tiny --gpus 1 -- --train.batch_tokens 262144

The plan is computed from the configuration alone: no accelerator is needed and no tensor is allocated. It assumes that
given shares of the machine's peak rates are reached; for presets with public logs it prints the share that each log
implies. Flags after `--` change the run.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from configs.cli import parse_row
from configs.notation import nearest, raise_if
from scripts import command, print_wrapped
from scripts.lab.costs import LOGS, MACHINES, Efficiency, Machine, Sizes, Stage, measure_sizes, predict, predict_seconds

GPU_COUNTS = (1, 8, 64, 1024)  # of the table of other machines; the batch stays the same (strong scaling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Run and machine to plan for."""

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """Preset of the run."""
    gpus: int = 8
    """Number of accelerators, one rank on each."""
    device: str = "h100"
    """Accelerator: h100, h200, a100 or 4090."""
    efficiency: float = 0.40
    """Share of the peak bfloat16 FLOP/s that is reached."""
    memory_efficiency: float = 0.70
    """Share of the peak memory bandwidth that is reached."""
    network_efficiency: float = 0.70
    """Share of the peak network bandwidth that is reached."""
    json: bool = False
    """Print JSON instead of tables."""


def make_plan(args: Arguments, flags: list[str]) -> dict[str, Any]:
    """Return stages with predictions, totals, and seconds on other machines, as JSON values.

    flags: of the training run. Raises ValueError for unknown presets, flags or devices and for numbers out of range.
    """
    check_arguments(args)
    run, machine = parse_row(args.preset, flags), MACHINES[args.device]
    share = Efficiency(args.efficiency, args.memory_efficiency, args.network_efficiency)
    sizes, stages = measure_sizes(run)
    return {"preset": args.preset, "device": args.device, "gpus": args.gpus, "efficiency": share._asdict(),
            "parameters": sizes.parameters, "orthogonalization_flops": sizes.newton_schulz_flops,
            "padding": sizes.padding(args.gpus), "steps": run.train.steps,
            "tokens": sum(stage.steps * stage.values.batch_tokens for stage in stages),
            "flops": sum(stage.steps * stage.flops for stage in stages),
            "stages": [stage_row(stage, sizes, machine, args.gpus, share) for stage in stages],
            "micro_tokens": stages[0].micro_tokens,
            "seconds": predict_seconds(stages, sizes, machine, gpus=args.gpus, share=share),
            "other_machines": {name: machine_row(stages, sizes, other, share) for name, other in MACHINES.items()},
            "logs": [] if flags else public_logs(args.preset, stages)}  # flags make it another run than the logs'


def check_arguments(args: Arguments) -> None:
    """Raise ValueError for an unknown device, fewer than one GPU, or a share outside (0, 1]."""
    if args.device not in MACHINES:
        raise ValueError(f"unknown device {args.device!r}{nearest(args.device, list(MACHINES))}; "
                         f"devices: {', '.join(MACHINES)}")
    raise_if(args.gpus < 1, f"--gpus must be at least 1, got {args.gpus}")
    for name in ("efficiency", "memory_efficiency", "network_efficiency"):
        raise_if(not 0 < getattr(args, name) <= 1,
                 f"--{name} is a share of a peak rate, above 0 and at most 1, got {getattr(args, name)}")


def stage_row(stage: Stage, sizes: Sizes, machine: Machine, gpus: int, share: Efficiency) -> dict[str, Any]:
    """Return one stage of the schedule with its prediction for the busiest rank."""
    prediction = predict(stage, sizes, machine, gpus=gpus, share=share)
    return {"first_step": stage.first, "steps": stage.steps, **stage.values._asdict(), "flops": stage.flops,
            "sequences": stage.portion(gpus)[0], **prediction._asdict(), "rank_bytes": prediction.rank_bytes,
            "step_ms": prediction.step_ms}


def machine_row(stages: list[Stage], sizes: Sizes, machine: Machine, share: Efficiency) -> dict[int, dict[str, Any]]:
    """Return, by number of GPUs of one machine, the seconds of the whole run and whether it fits into memory."""
    most_bytes = {gpus: max(predict(stage, sizes, machine, gpus=gpus, share=share).rank_bytes for stage in stages)
                  for gpus in GPU_COUNTS}
    return {gpus: {"seconds": predict_seconds(stages, sizes, machine, gpus=gpus, share=share),
                   "fits": most_bytes[gpus] <= machine.memory_bytes} for gpus in GPU_COUNTS}


def public_logs(preset: str, stages: list[Stage]) -> list[dict[str, Any]]:
    """Return the public logs of a preset's stages, with the share of the peak FLOP/s that each implies."""
    flops = {stage.first: stage.flops for stage in stages}
    return [log._asdict() | {"reached": flops[log.first] / (log.gpus * MACHINES[log.machine].flops * log.step_ms / 1e3)}
            for log in LOGS if log.preset == preset]


# ---- The text -------------------------------------------------------------------------------------------------------


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """Return the whole plan as lines; tables are at most 80 columns wide."""
    return [*heading(plan), "", *stage_lines(plan["stages"]), "", *prediction_lines(plan["stages"]), "", *notes(plan), "",
            *machine_lines(plan)]


def heading(plan: dict[str, Any]) -> list[str]:
    """Return the predicted time, the size of the run, and the assumed efficiencies."""
    share = plan["efficiency"]
    return [f"{plan['preset']} on {plan['gpus']:,} x {MACHINES[plan['device']].name}: {plan['seconds']:,.1f} s of training",
            f"{plan['parameters']:,} parameters, {plan['steps']:,} steps, {plan['tokens']:,} tokens, "
            f"{plan['flops'] / 1e15:,.0f} PFLOP",
            f"assumed: {share['flops']:.0%} of peak FLOP/s, {share['memory']:.0%} of memory bandwidth, "
            f"{share['network']:.0%} of network bandwidth"]


def stage_lines(stages: list[dict[str, Any]]) -> list[str]:
    """Return the table of the schedule's stages: shapes in tokens, and FLOPs of all ranks together."""
    head = [f"{'':>6} {'':>6} {'batch':>9} {'sequence':>9} {'window':>9} {'long window':>12} {'TFLOP':>9}",
            f"{'from':>6} {'steps':>6} {'tokens':>9} {'tokens':>9} {'tokens':>9} {'tokens':>12} {'per step':>9}"]
    return head + [
        f"{row['first_step']:>6} {row['steps']:>6} {row['batch_tokens']:>9,} {row['sequence_tokens']:>9,} "
        f"{row['window_tokens'] or '-':>9} {row['long_window_tokens'] or '-':>12} {row['flops'] / 1e12:>9.1f}"
        for row in stages]


def prediction_lines(stages: list[dict[str, Any]]) -> list[str]:
    """Return the table of one step of each stage on the busiest rank."""
    head = ["one step on the busiest rank:",
            f"{'':>6} {'memory':>9} {'network':>9} {'compute':>9} {'update':>9} {'network':>9} {'casts':>9} {'step':>9}",
            f"{'from':>6} {'GB moved':>9} {'MB sent':>9} {'ms':>9} {'ms':>9} {'ms':>9} {'ms':>9} {'ms':>9}"]
    return head + [
        f"{row['first_step']:>6} {row['traffic_bytes'] / 1e9:>9.1f} {row['network_bytes'] / 1e6:>9,.0f} "
        f"{row['compute_ms']:>9,.1f} {row['optimizer_ms']:>9.1f} {row['network_ms']:>9,.1f} "
        f"{row['memory_ms']:>9.1f} {row['step_ms']:>9,.1f}"
        for row in stages]


def notes(plan: dict[str, Any]) -> list[str]:
    """Return the memory of the fullest rank, warnings about idle or overfull ranks, and the public logs."""
    machine, row = MACHINES[plan["device"]], max(plan["stages"], key=lambda row: row["rank_bytes"])
    parts = ", ".join(f"{name} {row[f'{key}_bytes'] / 1e9:.1f}" for name, key in (
        ("weights", "weight"), ("gradients", "gradient"), ("optimizer state", "state"), ("activations about", "activation")))
    lines = [f"memory of a rank in GB: {parts}; {row['rank_bytes'] / 1e9:.1f} of {machine.memory_bytes / 1e9:.0f}"]
    if row["rank_bytes"] > machine.memory_bytes:
        # Smaller micro-batches save activations only.
        helps = row["rank_bytes"] - row["activation_bytes"] <= machine.memory_bytes
        lines.append("this does not fit" + (f": lower --train.micro_tokens ({plan['micro_tokens']:,})" if helps else ""))
    if (fewest := min(row["sequences"] for row in plan["stages"])) < plan["gpus"]:
        lines.append(f"a batch of {fewest:,} sequences keeps no more than {fewest:,} of {plan['gpus']:,} ranks busy: "
                     "shorten --data.sequence_tokens, or raise --train.batch_tokens")
    if plan["padding"] > 0.25:
        lines.append(f"the optimizer's banks are padded to a multiple of {plan['gpus']:,} ranks, which makes the weights in "
                     f"memory and on the network {1 + plan['padding']:.1f} times as large")
    return lines + [f"public log, {log['gpus']} x {MACHINES[log['machine']].name} from step {log['first']}: "
                    f"{log['step_ms']:,.1f} ms per step, {log['reached']:.0%} of peak FLOP/s" for log in plan["logs"]]


def machine_lines(plan: dict[str, Any]) -> list[str]:
    """Return the table of the run's seconds on other machines, at the same batch and the same assumed efficiencies."""
    lines = ["seconds of training on other machines, by number of GPUs:",
             f"{'':>12} " + " ".join(f"{gpus:>10,}" for gpus in GPU_COUNTS)]
    rows = plan["other_machines"]
    for name, row in rows.items():
        cells = (f"{cell['seconds']:>10,.1f}{' ' if cell['fits'] else '*'}" for cell in row.values())
        lines.append(f"{MACHINES[name].name:>12} " + "".join(cells).rstrip())
    if not all(cell["fits"] for row in rows.values() for cell in row.values()):
        lines.append(f"* does not fit into the GPU's memory with --train.micro_tokens {plan['micro_tokens']:,}")
    return lines


def main(args: Arguments, flags: list[str]) -> None:
    """Print the plan."""
    plan = make_plan(args, flags)
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        print_wrapped(plan_lines(plan))


if __name__ == "__main__":
    command(main, Arguments, __doc__, flags=True)
