"""Launches, bytes, products and memory of the compiled step of each preset, counted on a pretended GPU: nothing runs.

    python -m benchmarks.compiled_step [PRESET ...] [--stages 3] [--passes training] [--layers 5] [--capability 9.0] [--save]

Inductor compiles the real model, at its real widths and lengths, for the compute capability; tests/gpu_free/ says how, and
what is counted. It prints a table; with --save the presets' entries in compiled_step.json are replaced and compiled_step.md
is written anew. compiled_step_before.json, counted in the same way, is the state of November 2026, before the compiled step
was looked at. All presets take about an hour on two cores; one stage's training pass one to three minutes, with --layers 5
one. `-- FLAGS` change the run, as in `-- --model.fp8 head_mlp`.

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
     "kernel_launches": ...,  of triton and own
     "product_flops": ..., "product_bytes": ..., "other_bytes": ...,
     "triton":   [{"name", "count", "bytes", "shared_bytes", ...}],  Inductor's kernels, the largest first, in this file 12
     "own":      [{"name", "count", "bytes", "shared_bytes", ...}],  our operators (steepest::name) and Triton kernels
     "other":    [{"name", "count", "bytes", "shared_bytes", ...}],  other operators: sorts; in `eager` everything
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks import HERE, write_result
from configs.cli import fail
from data.run.folder import write_text
from scripts import split_flags
from scripts.lab.records import markdown

PRESETS = ("speedrun", "speedrun_frontier", "speedrun_1gpu", "speedrun_consumer", "medium", "track3", "gpt_paper", "ngpt")
SAVED_KERNELS = 12
PASSES = ("training", "validation", "update")
KINDS = ("forward", "backward", "inference", "eager")


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

SUMS = ("kernel_launches", "bytes", "product_bytes", "other_bytes", "product_flops")
HEAD = ("preset", "pass", "tokens", "graphs", "kernels", "GB", "GB of products", "GB of other", "TFLOP", "peak GB")


def parts(record: dict[str, Any]) -> dict[tuple[str, int | str], dict[str, Any]]:
    """Return each pass of a record by (its name, its tokens)."""
    passes = {(f"{kind}, step {stage['first_step']}", stage["pass_tokens"]): stage[kind]
              for stage in record["stages"] for kind in ("training", "validation") if kind in stage}
    return passes | {(f"update {step['step']}, {world} ranks", ""): step
                     for world, steps in record["update"].items() for step in steps}


def sums(part: dict[str, Any], kinds: Sequence[str] = KINDS) -> dict[str, float]:
    """Return the sums of a pass over some kinds of graphs; only `other_bytes` has what torch does outside graphs."""
    return {key: sum(part[kind][key] for kind in kinds if kind in part) for key in SUMS}


def cells(total: dict[str, float]) -> tuple[object, ...]:
    """Return kernels, GB of kernels, of products and of other operators, and TFLOP."""
    gigabytes = (f"{total[key] / 1e9:.2f}" for key in ("bytes", "product_bytes", "other_bytes"))
    return total["kernel_launches"], *gigabytes, f"{total['product_flops'] / 1e12:.2f}"


def rows(preset: str, record: dict[str, Any]) -> list[tuple[object, ...]]:
    """Return the rows of a preset: for each pass its kinds of graphs, and their sum."""
    table = []
    for (name, tokens), part in parts(record).items():
        table += [(preset, f"{name}: {kind}", tokens, "", *cells(sums(part, [kind])), "") for kind in KINDS if kind in part]
        table.append((preset, f"{name}: all", tokens, part["graphs"], *cells(sums(part)), f"{part['peak_bytes'] / 1e9:.2f}"))
    return table


def rows_beside(preset: str, record: dict[str, Any], before: dict[str, Any] | None) -> list[tuple[object, ...]]:
    """Return a row for each pass, with what was counted before in the same way."""
    table, earlier = [], {name: (tokens, part) for (name, tokens), part in (parts(before) if before else {}).items()}
    for key, part in parts(record).items():
        cell = [preset, *key, part["graphs"], *cells(sums(part)), f"{part['peak_bytes'] / 1e9:.2f}"]
        if key[0] in earlier:
            tokens, old = earlier[key[0]]
            total, passes = sums(old), key[1] / tokens if tokens else 1  # it may have taken several passes
            cell += [f"{passes * total['kernel_launches']:.0f}", f"{passes * total['bytes'] / 1e9:.2f}",
                     f"{old['peak_bytes'] / 1e9:.2f}"]
        table.append(tuple(cell + [""] * (len(HEAD) + 3 - len(cell))))
    return table


def shortened(record: Any) -> Any:
    """Return the record with the largest SAVED_KERNELS of Inductor's kernels."""
    if isinstance(record, dict):
        return {key: value[:SAVED_KERNELS] if key == "triton" and isinstance(value, list) else shortened(value)
                for key, value in record.items()}
    return [shortened(value) for value in record] if isinstance(record, list) else record


def save(records: dict[str, Any]) -> None:
    """Replace the presets' entries in compiled_step.json, and write compiled_step.md from all of them."""
    presets = load("compiled_step") | shortened(records)
    write_result("compiled_step", "compiled_step --save", presets=presets)
    before = load("compiled_step_before")
    table = [row for name in PRESETS if name in presets for row in rows_beside(name, presets[name], before.get(name))]
    write_text(HERE / "compiled_step.md", "\n".join([
        "# What a compiled step does", "",
        "Counted by `python -m benchmarks.compiled_step --save` on a pretended GPU of compute capability 9.0: Inductor",
        "wrote the code of each graph for it, and nothing ran. Kernels and GB are those of Inductor's kernels and of our",
        "own; matrix products and other operators stand apart. An update is that of rank 0. The last three columns were",
        "counted in the same way before the compiled step was looked at, in as many passes as these tokens took then.",
        "Validation is counted in rows of the training pass; speedrun validates in rows of 262,144 tokens.", "",
        *markdown((*HEAD, "kernels before", "GB before", "peak GB before"), table), ""]))


def load(name: str) -> dict[str, Any]:
    """Return the presets in benchmarks/NAME.json; none if there is no such file."""
    path = HERE / f"{name}.json"
    return json.loads(path.read_text())["presets"] if path.exists() else {}


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
