"""Predict what a run will cost: milliseconds per step by kernel class, memory, communication.

    python -m scripts.plan speedrun --gpus 8
    python -m scripts.plan track3 --gpus 1 --device h200 --assume.memory_frac 0.7
    python -m scripts.plan tiny --gpus 1 -- --train.batch_tokens 262144
    python -m scripts.plan record89 --gpus 8

The plan counts kernel launches, bytes and matrix products of a step, as the compiled graphs have them, and divides them by
rates that it prints: no accelerator is needed and no tensor is allocated. Validation is not timed and not planned. record89
and record344 are the speedrun's public scripts, whose logs it compares with. --probe measures the rates on the GPU at hand.
Flags after `--` change the run.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

import tyro

from configs.cli import parse_row
from configs.notation import nearest, raise_if
from configs.presets import PRESETS
from scripts import command, print_wrapped, wrap
from scripts.lab.costs import MACHINES, Assumptions, Machine, Prediction, predict
from scripts.lab.models import CACHE
from scripts.lab.workload import Stage, Workload, public_workload, recorded, workload

GPU_COUNTS = (1, 8, 64, 1024)  # of the table of other machines; the batch stays the same (strong scaling)
RATES = CACHE / "rates.json"
STEP_NOTES = {"speedrun_frontier": "its number of steps is an assumption: 1,140 in modded-nanogpt's pull request 366"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Run and machine to plan for."""

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")] = "speedrun"
    """Preset of the run, or record89 or record344."""
    gpus: int = 8
    """Number of accelerators, one rank on each."""
    device: str = "h100"
    """Accelerator: h100, h200, b200, a100 or 4090."""
    assume: Assumptions = field(default_factory=Assumptions)
    """Rates and times that the plan assumes; the plan lists them with units and sources."""
    probe: bool = False
    """Measure rates on this machine's GPU, which is a DEVICE, for later plans, instead of planning."""
    json: bool = False
    """Print JSON instead of tables."""


def make_plan(args: Arguments, flags: list[str]) -> dict[str, Any]:
    """Return stages with predictions, totals, and seconds on other machines, as JSON values.

    flags: of the training run. Raises ValueError for unknown presets, flags or devices and for numbers out of range.
    """
    from scripts.lab.probe import read_rates

    check_arguments(args)
    assume, measured = read_rates(RATES, args.device, args.assume)
    load, machine = open_workload(args.preset, flags, assume), MACHINES[args.device]
    rows = [stage_row(stage, load, machine, args.gpus, assume) for stage in load.stages]
    log = load.logs.get(str(args.gpus)) if args.device == "h100" else None
    return {"preset": args.preset, "device": args.device, "gpus": args.gpus, "assumptions": asdict(assume),
            "measured": measured, "source": load.source, "parameters": load.parameters,
            "padding": load.sizes.padding(args.gpus) if load.sizes else 0.0,
            "steps": sum(stage.steps for stage in load.stages),
            "tokens": sum(stage.steps * stage.values.batch_tokens for stage in load.stages),
            "flops": sum(row["steps"] * row["flops"] for row in rows), "stages": rows,
            "micro_tokens": load.stages[0].micro_tokens,
            "seconds": run_seconds(load, machine, args.gpus, assume), "log": log,
            "other_machines": {name: machine_row(load, other, assume) for name, other in MACHINES.items()},
            "note": STEP_NOTES.get(args.preset)}


def open_workload(preset: str, flags: list[str], assume: Assumptions) -> Workload:
    """Return the workload of a preset with flags, or of a public script."""
    scripts = recorded("record_step.json")
    if preset not in scripts:
        raise_if(preset not in PRESETS, f"unknown preset {preset!r}{nearest(preset, [*PRESETS, *scripts])}")
        return workload(parse_row(preset, flags), assume)
    raise_if(bool(flags), f"{preset} is a public script and takes no flags, got {' '.join(flags)}")
    return public_workload(preset, assume)


def check_arguments(args: Arguments) -> None:
    """Raise ValueError for an unknown device, fewer than one GPU, or an assumption out of range."""
    if args.device not in MACHINES:
        raise ValueError(f"unknown device {args.device!r}{nearest(args.device, list(MACHINES))}; "
                         f"devices: {', '.join(MACHINES)}")
    raise_if(args.gpus < 1, f"--gpus must be at least 1, got {args.gpus}")
    for name, value in asdict(args.assume).items():
        if name.endswith("_frac"):
            raise_if(not 0 < value <= 1, f"--assume.{name} is a share of a peak rate, above 0 and at most 1, got {value}")
        raise_if(value < 0, f"--assume.{name} must not be negative, got {value}")


def predict_stage(stage: Stage, load: Workload, machine: Machine, gpus: int, assume: Assumptions) -> Prediction:
    """Predict one step of a stage."""
    passes, work = stage.passes(gpus)
    return predict(work, load.updates(gpus), machine, passes=passes, gpus=gpus, assume=assume)


def run_seconds(load: Workload, machine: Machine, gpus: int, assume: Assumptions) -> float:
    """Return the predicted training seconds of the whole run."""
    return sum(stage.steps * predict_stage(stage, load, machine, gpus, assume).step_ms for stage in load.stages) / 1e3


def stage_row(stage: Stage, load: Workload, machine: Machine, gpus: int, assume: Assumptions) -> dict[str, Any]:
    """Return one stage of the schedule with its prediction, and the memory of the fullest rank."""
    prediction, (passes, work) = predict_stage(stage, load, machine, gpus, assume), stage.passes(gpus)
    weights, state = load.sizes.rank_bytes(gpus) if load.sizes else (0.0, 0.0)
    _, rank_sequences, pass_sequences = stage.portion(gpus)
    activations = load.activation_bytes(pass_sequences * stage.values.sequence_tokens)
    return {"first_step": stage.first, "steps": stage.steps, **stage.values._asdict(),
            "flops": work.flops * passes * stage.portion(gpus)[0] / rank_sequences, "sequences": stage.portion(gpus)[0],
            "passes": passes, "pass_bytes": work.memory_bytes, "launches": work.launches + work.eager,
            "sent_bytes": sent_bytes(load, gpus), **prediction._asdict(), "step_ms": prediction.step_ms,
            "weight_bytes": weights, "gradient_bytes": weights, "state_bytes": state, "activation_bytes": activations,
            "rank_bytes": 2 * weights + state + activations}


def sent_bytes(load: Workload, gpus: int) -> float:
    """Return the bytes that a rank sends in a step, on average over a period."""
    updates = load.updates(gpus)
    sizes = (size * (2 if name == "all_reduce" else 1) for update in updates for name, size in update.collectives)
    return sum(sizes) * (gpus - 1) / gpus / len(updates)


def machine_row(load: Workload, machine: Machine, assume: Assumptions) -> dict[int, dict[str, Any]]:
    """Return, by number of GPUs of one machine, the seconds of the whole run and whether it fits into memory."""
    most_bytes = {gpus: max(stage_row(stage, load, machine, gpus, assume)["rank_bytes"] for stage in load.stages)
                  for gpus in GPU_COUNTS}
    return {gpus: {"seconds": run_seconds(load, machine, gpus, assume), "fits": most_bytes[gpus] <= machine.memory_bytes}
            for gpus in GPU_COUNTS}


# ---- The text -------------------------------------------------------------------------------------------------------


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """Return the whole plan as lines; tables are at most 80 columns wide."""
    return [*heading(plan), "", *stage_lines(plan["stages"]), "", *prediction_lines(plan["stages"]), "", *notes(plan), "",
            *machine_lines(plan), "", *assumption_lines(plan)]


def heading(plan: dict[str, Any]) -> list[str]:
    """Return the predicted time, the size of the run, where its counts are from, and what a public log says."""
    lines = [f"{plan['preset']} on {plan['gpus']:,} x {MACHINES[plan['device']].name}: {plan['seconds']:,.1f} s of training",
             f"{plan['parameters']:,} parameters, {plan['steps']:,} steps, {plan['tokens']:,} tokens, "
             f"{plan['flops'] / 1e15:,.0f} PFLOP", plan["source"]]
    if log := plan["log"]:
        lines.append(f"its public logs: {log['seconds']:,.1f} s ({plan['seconds'] / log['seconds'] - 1:+.1%}), "
                     f"{', '.join(f'{value:,.1f}' for value in log['stage_ms'])} ms in its stages; {log['source']}")
    return lines + ([plan["note"]] if plan["note"] else [])


def stage_lines(stages: list[dict[str, Any]]) -> list[str]:
    """Return the table of the schedule's stages: shapes in tokens, and FLOPs of all ranks together."""
    head = [f"{'':>6} {'':>6} {'batch':>9} {'sequence':>9} {'window':>9} {'long window':>12} {'TFLOP':>9}",
            f"{'from':>6} {'steps':>6} {'tokens':>9} {'tokens':>9} {'tokens':>9} {'tokens':>12} {'per step':>9}"]
    return head + [
        f"{row['first_step']:>6} {row['steps']:>6} {row['batch_tokens']:>9,} {row['sequence_tokens']:>9,} "
        f"{row['window_tokens'] or '-':>9} {row['long_window_tokens'] or '-':>12} {row['flops'] / 1e12:>9.1f}"
        for row in stages]


def prediction_lines(stages: list[dict[str, Any]]) -> list[str]:
    """Return the tables of one step of each stage on the busiest rank: counts, then milliseconds that add up."""
    counts = ["one step on the busiest rank:",
              f"{'':>6} {'':>7} {'GB moved':>9} {'launches':>9} {'MB sent':>9}",
              f"{'from':>6} {'passes':>7} {'per pass':>9} {'per pass':>9}"]
    counts += [f"{row['first_step']:>6} {row['passes']:>7} {row['pass_bytes'] / 1e9:>9.1f} {row['launches']:>9,.0f} "
               f"{row['sent_bytes'] / 1e6:>9,.0f}" for row in stages]
    parts = ("products", "attention", "memory", "gaps", "update", "network", "host", "step")
    return [*counts, "", "its milliseconds:", f"{'from':>6} " + " ".join(f"{part:>8}" for part in parts), *(
        f"{row['first_step']:>6} " + " ".join(f"{row[f'{part}_ms']:>{max(8, len(part))},.1f}" for part in parts)
        for row in stages)]


def notes(plan: dict[str, Any]) -> list[str]:
    """Return the memory of the fullest rank, and warnings about idle or overfull ranks."""
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
    return lines if row["weight_bytes"] else lines[1:]  # a public script's memory is not known


def machine_lines(plan: dict[str, Any]) -> list[str]:
    """Return the table of the run's seconds on other machines, at the same batch and the same assumptions."""
    lines = ["seconds of training on other machines, by number of GPUs:",
             f"{'':>12} " + " ".join(f"{gpus:>10,}" for gpus in GPU_COUNTS)]
    rows = plan["other_machines"]
    for name, row in rows.items():
        cells = (f"{cell['seconds']:>10,.1f}{' ' if cell['fits'] else '*'}" for cell in row.values())
        lines.append(f"{MACHINES[name].name:>12} " + "".join(cells).rstrip())
    if not all(cell["fits"] for row in rows.values() for cell in row.values()):
        lines.append(f"* does not fit into the GPU's memory with --train.micro_tokens {plan['micro_tokens']:,}")
    return lines


def assumption_lines(plan: dict[str, Any]) -> list[str]:
    """Return all assumptions with value, unit and source, wrapped at 80 columns; --assume.NAME changes one."""
    lines = ["assumed, each changed by --assume.NAME:"]
    for entry in fields(Assumptions):
        value, source = plan["assumptions"][entry.name], entry.metadata["source"]
        if entry.name in plan["measured"]:
            source = "measured on this machine"
        elif value != entry.default:
            source = "from the command line"
        lines += wrap(f"{entry.name} {value:.4g} {entry.metadata['unit']} ({source})", 80).splitlines()
    return lines


def run_probe(device: str) -> None:
    """Measure rates on this machine's GPU and store them for later plans."""
    import torch

    from scripts.lab.probe import probe, write_rates

    raise_if(not torch.cuda.is_available(), "--probe needs a CUDA device, and this machine has none")
    rates = probe(MACHINES[device])
    write_rates(RATES, device, rates)
    print_wrapped([f"{name} {value:.4g}" for name, value in rates.items()] + [f"written to {RATES}"])


def main(args: Arguments, flags: list[str]) -> None:
    """Print the plan, or measure the machine's rates."""
    check_arguments(args)
    if args.probe:
        run_probe(args.device)
        return
    plan = make_plan(args, flags)
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        print_wrapped(plan_lines(plan))


if __name__ == "__main__":
    command(main, Arguments, __doc__, flags=True)
