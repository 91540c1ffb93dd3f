"""Launches, bytes, products and memory of the compiled step of each preset, counted on a pretended GPU: nothing runs.

    python -m benchmarks.compiled_step [PRESET ...] [--stages 3] [--passes training] [--layers 5] [--capability 9.0] [--save]

Inductor compiles the real model, at its real widths and lengths, for the compute capability; tests/gpu_free/ says how, and
what is counted. It prints a table; with --save the presets' entries in compiled_step.json are replaced and compiled_step.md
is written anew. All presets take about an hour on two cores. One stage's training pass takes one to three minutes, with
--layers 5 one. `-- FLAGS` change the run, as in `-- --model.fp8 head_mlp`.

The schema of compiled_step.json; bytes and launches are for one rank:

    {"command", "environment", "presets": {"speedrun": {
        "capability": "9.0", "layers": 11, "triton": "none",
        "state_bytes": {"8": ..., "1": ...},        weights, gradients and optimizer state of a rank, by world size
        "stages": [{
            "first_step": 847, "steps": 423, "batch_tokens": 393216, "sequence_tokens": 16384, "rows": 1,
            "pass_tokens": 16384,                   tokens of one forward and backward pass (rows x sequence_tokens)
            "windows": [640, 640, ...],             sliding window of each layer in tokens, null: none
            "training": {"graphs": 2, "peak_bytes": ..., "forward": TALLY, "backward": TALLY, "eager": TALLY},
            "validation": {"graphs": 1, "peak_bytes": ..., "inference": TALLY, "eager": TALLY}}],
        "update": {"8": [{                          one period of optimizer steps, by world size, rank 0
            "step": 1, "banks": 17,                 number of the step, banks that it updates
            "graphs": 9, "peak_bytes": ..., "inference": TALLY, "eager": TALLY,
            "collectives": [["reduce_scatter", 28311552], ...]}],   bytes of the whole bank; rows of sparse banks left out
                   "1": [...]}}}}

`graphs` are those compiled in this pass (a graph that was compiled before is used again), `graphs_again`, beside it, those
compiled when it is repeated with the values of another step, which should be none; `peak_bytes` is the memory that the pass
takes at most beside what was there before. `eager` is what torch does outside compiled graphs. A TALLY is

    {"bytes": ...,            read and written by Inductor's kernels and by our own; products and `other` are apart
     "launches": ...,         of everything: triton, own, other, products
     "product_flops": ..., "product_bytes": ..., "other_bytes": ...,
     "triton":   [{"name", "count", "bytes", "shared_bytes"}],     Inductor's kernels, the largest first, in this file 12
     "own":      [{"name", "count", "bytes", "shared_bytes"}],     our operators (steepest::name) and Triton kernels
     "other":    [{"name", "count", "bytes", "shared_bytes"}],     other operators: sorts; in `eager` everything
     "products": [{"op", "dtype", "batch", "m", "n", "k", "count", "flops", "bytes"}],
                 (batch, m, k) x (batch, k, n); flops = count 2 batch m n k; dtype bfloat16, float32, float8_e4m3fn, ...
     "attention": [{"kernel", "backward", "batch", "heads", "tokens", "head_dim", "count", "bytes"}]}
                 kernel flex, varlen or sdpa; flex's bytes are in `triton` too, the others' in `other`; paired heads have
                 twice the tokens and half the heads

`bytes` are summed over `count` calls everywhere.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks import HERE, describe_machine
from configs.cli import fail
from data.run.folder import write_json, write_text
from scripts import split_flags
from scripts.lab.records import markdown

PRESETS = ("speedrun", "speedrun_1gpu", "speedrun_consumer", "medium", "track3", "gpt_paper", "ngpt")
SAVED_KERNELS = 12
PASSES = ("training", "validation", "update")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What to compile."""

    presets: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")] = PRESETS
    """Presets."""
    stages: tuple[int, ...] = ()
    """Stages of the schedule, 1 the first; none: all."""
    passes: tuple[str, ...] = PASSES
    """Of training, validation and update."""
    worlds: tuple[int, ...] = (8, 1)
    """World sizes of the update; the first one also decides the tokens of a pass."""
    layers: int | None = None
    """Number of layers, 5 for presets that name layers; none: the preset's own."""
    capability: str = "9.0"
    """Compute capability: 8.0, 8.9 or 9.0."""
    triton: Literal["none", "own", "all"] = "none"
    """Kernels that Triton compiles, which shows their shared memory; all: it takes most of the time."""
    save: bool = False
    """Write compiled_step.json and compiled_step.md."""


def measure(preset: str, args: Arguments, flags: list[str]) -> dict[str, Any]:
    """Return the record of one preset, from a process of its own. Raises RuntimeError if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        command = [sys.executable, "-m", "tests.gpu_free.measure", preset, "--out", str(out),
                   "--capability", args.capability,
                   "--triton", args.triton, *(["--layers", str(args.layers)] if args.layers else [])]
        for name in ("stages", "passes", "worlds"):
            command += [f"--{name}", *map(str, getattr(args, name))] if getattr(args, name) else []
        if subprocess.run([*command, "--", *flags], cwd=HERE.parent).returncode:
            raise RuntimeError(f"{preset} does not compile")
        return json.loads(out.read_text())


# ---- Tables --------------------------------------------------------------------------------------------------------------

HEAD = ("preset", "pass", "tokens", "graphs", "launches", "GB", "of products", "of other", "TFLOP", "peak GB")


def rows(preset: str, record: dict[str, Any]) -> list[tuple[object, ...]]:
    """Return the rows of a preset: one for each pass of each stage, with forward and backward apart, and for each update."""
    table = []
    for stage in record["stages"]:
        for name in ("training", "validation"):
            table += part_rows(preset, f"step {stage['first_step']}, {name}", stage["pass_tokens"], stage.get(name))
    for world_size, steps in record["update"].items():
        for step in steps:
            table += part_rows(preset, f"update {step['step']}, {world_size} ranks", "", step)
    return table


def part_rows(preset: str, name: str, tokens: int | str, part: dict[str, Any] | None) -> list[tuple[object, ...]]:
    """Return the rows of one pass: for each kind of graph what it does."""
    if part is None:
        return []
    kinds = {kind: tally for kind in ("forward", "backward", "inference", "eager") if (tally := part.get(kind))}
    table = [(preset, f"{name}: {kind}", tokens, "", *figures(tally), "") for kind, tally in kinds.items()]
    total = {key: sum(tally[key] for tally in kinds.values())
             for key in ("launches", "bytes", "product_bytes", "other_bytes", "product_flops")}
    return [*table, (preset, f"{name}: all", tokens, part["graphs"], *figures(total), f"{part['peak_bytes'] / 1e9:.2f}")]


def figures(tally: dict[str, Any]) -> tuple[object, ...]:
    """Return launches, GB of kernels, of products and of other operators, and TFLOP."""
    gigabytes = (f"{tally[key] / 1e9:.2f}" for key in ("bytes", "product_bytes", "other_bytes"))
    return tally["launches"], *gigabytes, f"{tally['product_flops'] / 1e12:.2f}"


def shortened(record: Any) -> Any:
    """Return the record with the largest SAVED_KERNELS of Inductor's kernels."""
    if isinstance(record, dict):
        return {key: value[:SAVED_KERNELS] if key == "triton" and isinstance(value, list) else shortened(value)
                for key, value in record.items()}
    return [shortened(value) for value in record] if isinstance(record, list) else record


def save(records: dict[str, Any]) -> None:
    """Replace the presets' entries in compiled_step.json, and write compiled_step.md from all of them."""
    path = HERE / "compiled_step.json"
    presets = (json.loads(path.read_text())["presets"] if path.exists() else {}) | shortened(records)
    write_json(path, {"command": "python -m benchmarks.compiled_step --save", "environment": describe_machine(),
                      "presets": presets})
    table = [row for name in PRESETS if name in presets for row in rows(name, presets[name])]
    write_text(HERE / "compiled_step.md", "\n".join([
        "# What a compiled step does", "",
        "Counted by `python -m benchmarks.compiled_step --save` on a pretended GPU of compute capability 9.0; nothing ran.",
        "GB are those of Inductor's and our own kernels; products and other operators stand apart.", "",
        *markdown(HEAD, table), ""]))


def main() -> None:
    """Measure the presets of the command line."""
    words, flags = split_flags(sys.argv[1:])
    args = tyro.cli(Arguments, args=words, description=__doc__)
    records = {preset: measure(preset, args, flags) for preset in args.presets}
    for preset, record in records.items():
        print("\n".join(markdown(HEAD, rows(preset, record))))
    if args.save:
        save(records)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        fail(str(error))
