"""Compile a preset's step for a pretended GPU, and write as JSON what its graphs do (schema: benchmarks/compiled_step.py).

    python -m tests.gpu_free.measure speedrun --stages 3 --passes training --layers 5 --out FILE -- [FLAGS OF THE RUN]

It is a process of its own, since `pretend` changes torch. It takes the real Trainer with its compiled model and optimizer,
at the preset's real widths and lengths. Nothing is computed: tensors have shapes only.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from configs.cli import parse_row
from configs.presets import PRESETS
from configs.schema import Run, with_settings
from data.run.folder import write_json
from scripts import split_flags
from tests.gpu_free.pretend import LIMITS, pretend

if TYPE_CHECKING:
    from optim.schedule import Values
    from tests.gpu_free.replay import Recorder, Tally
    from train_gpt import Trainer

Pass = Literal["training", "validation", "update", "sampling"]
MOST_STAGES = 8  # each is compiled twice, for training and for validation, which takes minutes
SAMPLED_TOKENS = 4

# Fields in which `speedrun_cpu` differs from `speedrun` because it is small; the others name layers, for a model of five.
SIZES = {"dim", "head_dim", "embed_std", "matrix_dtype", "table_dtype", "bigram_buckets", "bigram_signs", "ngram_orders",
         "window_tokens", "long_window_tokens", "attention_scale", "dynamic_window", "backout", "layers"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What to compile, and for which device."""

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """Preset of the run."""
    out: Path
    """JSON file to write."""
    stages: tuple[int, ...] = ()
    """Stages of the schedule, 1 the first; none: all."""
    passes: tuple[Pass, ...] = ("training", "validation", "update")
    """training: forward and backward; validation: forward alone; update: the optimizer's step; sampling: a few tokens."""
    worlds: tuple[int, ...] = (8, 1)
    """World sizes of the update; the first one also decides the tokens of a pass."""
    layers: int | None = None
    """Number of layers, 5 for presets that name layers; none: the preset's own."""
    capability: str = "9.0"
    """Compute capability: 8.0, 8.9 or 9.0."""
    triton: Literal["none", "own", "all"] = "none"
    """Kernels that Triton compiles, which shows their shared memory; all: it takes most of the time."""


def with_layers(run: Run, layers: int) -> Run:
    """Return the run with fewer layers; where layers have names, they are those of `speedrun_cpu`."""
    model = {"layers": layers}
    if run.model.full_attention_layers:
        large, small = PRESETS["speedrun"]().model, PRESETS["speedrun_cpu"]().model
        named = {field.name for field in fields(large) if getattr(large, field.name) != getattr(small, field.name)} - SIZES
        model |= {name: getattr(small, name) for name in named if getattr(run.model, name) not in (None, (), 0, "none")}
        model |= {"backout": small.backout} if run.model.backout else {}
    return with_settings(run, {f"model.{name}": value for name, value in model.items()})


def stages_of(run: Run) -> list[tuple[int, int, "Values"]]:
    """Return (first step, number of steps, values) of each distinct shape of the schedule, as the warm-up sees them."""
    from optim.schedule import Schedule

    schedule, stages = Schedule(run), {}
    for step in range(run.train.steps):
        values = schedule.values(step)
        shape = (values.batch_tokens, values.sequence_tokens, values.window_tokens, values.long_window_tokens)
        first, steps, at_first = stages.get(shape, (step, 0, values))
        stages[shape] = (first, steps + 1, at_first)
    if len(stages) > MOST_STAGES:
        raise ValueError(f"{run.preset} has {len(stages)} distinct shapes, each of which is compiled; at most {MOST_STAGES}")
    return list(stages.values())


def measure(args: Arguments, flags: list[str]) -> dict[str, Any]:
    """Return the record of one preset."""
    from tests.gpu_free.replay import Recorder
    from tests.gpu_free.trainer import pretended_trainer

    run = parse_row(args.preset, flags)
    run = with_layers(run, args.layers) if args.layers else run
    stages, recorder = stages_of(run), Recorder(args.triton)
    result = {"capability": args.capability, "layers": run.model.layers, "triton": args.triton, "state_bytes": {},
              "stages": [], "update": {}}
    for world_size in args.worlds:
        with pretended_trainer(run, world_size=world_size) as trainer, recorder:
            banks = trainer.optimizer.banks
            result["state_bytes"][world_size] = sum(t.nbytes for b in banks for t in (b.weights, b.grads, *b.state.values()))
            if world_size == args.worlds[0]:
                chosen = [stage for i, stage in enumerate(stages) if not args.stages or i + 1 in args.stages]
                result["stages"] = [stage_record(trainer, recorder, *stage, passes=args.passes) for stage in chosen]
            if "update" in args.passes:
                result["update"][world_size] = update_records(trainer, recorder, stages[0][2])
    return result


def stage_record(trainer: "Trainer", recorder: "Recorder", first: int, steps: int, values: "Values", *,
                 passes: tuple[Pass, ...]) -> dict[str, Any]:
    """Return the record of one stage: its sizes, and what one forward and backward pass does."""
    import torch

    share = values.batch_tokens // trainer.comm.world_size
    rows = max(1, min(trainer.run.train.micro_tokens, share) // values.sequence_tokens)
    tokens = torch.zeros(rows, values.sequence_tokens, dtype=torch.int64)
    record = {"first_step": first, "steps": steps, "batch_tokens": values.batch_tokens, "rows": rows,
              "sequence_tokens": values.sequence_tokens, "pass_tokens": tokens.numel(),
              "windows": trainer.model.windows(values.window_tokens, values.long_window_tokens)}
    if "training" in passes:
        record["training"] = noted(recorder, lambda: trainer.gradients(tokens, tokens, values))
        at_last = trainer.schedule.values(first + steps - 1)
        record["training"]["graphs_again"] = noted(recorder, lambda: trainer.gradients(tokens, tokens, at_last))["graphs"]
    if "validation" in passes:
        with torch.no_grad():
            x = tokens.to(trainer.device)
            record["validation"] = noted(recorder, lambda: trainer.model(x, x, **values.windows))
    if "sampling" in passes:
        prompt = torch.zeros(SAMPLED_TOKENS, dtype=torch.int64, device=trainer.device)
        record["sampling"] = noted(recorder, lambda: trainer.model.generate(prompt, SAMPLED_TOKENS, **values.windows))
    return record


def noted(recorder: "Recorder", run: Any) -> dict[str, Any]:
    """Run something; return what its graphs did, by kind, and the memory that it took beside what was there before."""
    recorder.take()
    memory, before, compiled = recorder.memory, recorder.memory.now, len(recorder.compiled)
    memory.peak = before
    run()
    return {"graphs": len(recorder.compiled) - compiled, "peak_bytes": memory.peak - before,
            **{kind: tally.as_json() for kind, tally in by_kind(recorder.take()).items()}}


def by_kind(tallies: list["Tally"]) -> dict[str, "Tally"]:
    """Return the sum of all tallies of each kind: forward, backward, inference, eager."""
    sums: dict[str, Tally] = {}
    for tally in tallies:
        sums[tally.kind] = sums[tally.kind].plus(tally) if tally.kind in sums else tally
    return sums


def update_records(trainer: "Trainer", recorder: "Recorder", values: "Values") -> list[dict[str, Any]]:
    """Return the records of one period of optimizer steps, from step 1: what rank 0 does, and the bytes it exchanges."""
    optimizer, period, records = trainer.optimizer, trainer.optimizer.period, []

    def step(count: int, values: "Values") -> dict[str, Any]:
        trainer.group.sent.clear()
        return noted(recorder, lambda: (optimizer.step(values, count), optimizer.zero_grad()))

    for count in range(1, period + 1):
        due = sum(count % bank.update_every == 0 for bank in optimizer.banks)
        records.append({"step": count, "banks": due, **step(count, values), "collectives": list(trainer.group.sent)})
    last = trainer.schedule.values(trainer.run.train.steps - 1)
    for record in records:
        record["graphs_again"] = step(period + record["step"], last)["graphs"]
    return records


def main() -> None:
    """Measure what the command line says."""
    words, flags = split_flags(sys.argv[1:])
    args = tyro.cli(Arguments, args=words, description=__doc__)
    if args.capability not in LIMITS:
        raise ValueError(f"--capability is one of {', '.join(LIMITS)}, got {args.capability}")
    pretend(args.capability)
    write_json(args.out, measure(args, flags))


if __name__ == "__main__":
    main()
