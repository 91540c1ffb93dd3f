"""Budgets of compiled steps: what a pass may move, launch and hold. Record them anew with

    python -m tests.gpu_free.budgets [CASE ...]

after a change that makes a step cheaper; a change that makes it dearer should be worth it.
"""

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.run.folder import write_json

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("budgets.json")
TOLERANCE = 1.02  # Inductor's order of fusion may change a little
NAMED = 12  # kernels whose bytes are kept, to tell which one grew
QUANTITIES = ("gigabytes", "launches", "peak_gigabytes")


@dataclass(frozen=True)
class Case:
    """A call of `measure`, and what it checks."""

    arguments: str
    capability: str = "9.0"
    triton: str = "none"

    def measure(self) -> dict[str, Any]:
        """Return the record, from a process of its own. Raises AssertionError with its errors if it does not compile."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "record.json"
            options, _, flags = self.arguments.partition(" -- ")
            command = [sys.executable, "-B", "-m", "tests.gpu_free.measure", *options.split(), "--capability",
                       self.capability, "--triton", self.triton, "--out", str(out), "--", *flags.split()]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"
            return json.loads(out.read_text())


# Graphs of five layers or fewer, with every stage of a preset whose stages differ.
SMALL = {
    "speedrun": Case("speedrun --layers 5 --worlds 8 1 --passes training validation update sampling", triton="own"),
    "speedrun on Ampere": Case("speedrun --layers 5 --stages 1 --worlds 1 --passes training validation update", "8.0",
                               "own"),
    "speedrun, shared memory": Case("speedrun --layers 5 --stages 3 --worlds 8 --passes training", triton="all"),
    "speedrun_consumer, shared memory": Case("speedrun_consumer --layers 5 --stages 3 --worlds 1 --passes training update",
                                             "8.9", "all"),
    "speedrun, varlen": Case("speedrun --layers 5 --stages 1 --worlds 8 --passes training validation -- "
                             "--model.attention varlen"),
    "speedrun, fp8": Case("speedrun --layers 5 --stages 1 --worlds 8 --passes training validation -- --model.fp8 head_mlp"),
    "medium": Case("medium --layers 5 --stages 1 8 --worlds 8 --passes training validation update"),
    "track3": Case("track3 --layers 2 --worlds 8 --passes training validation update"),
    "gpt_paper": Case("gpt_paper --layers 2 --worlds 8 --passes training validation update"),
    "ngpt": Case("ngpt --layers 2 --worlds 8 --passes training validation update"),
}
WHOLE = {preset: Case(f"{preset} --worlds {worlds} --passes training validation update") for preset, worlds in {
    "speedrun": "8 1", "speedrun_1gpu": "1", "speedrun_consumer": "1", "medium": "8", "track3": "8 1", "gpt_paper": "8",
    "ngpt": "8"}.items()}


def passes(name: str, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every counted pass of a record by its name in budgets.json."""
    training = {f"{name}, step {stage['first_step']}, {kind}": stage[kind] for stage in record["stages"]
                for kind in ("training", "validation") if kind in stage}
    return training | {f"{name}, update {step['step']} on {world} ranks": step
                       for world, steps in record["update"].items() for step in steps}


def figures(part: dict[str, Any]) -> dict[str, Any]:
    """Return a pass's quantities, and GB by kernel, the largest first. Launches of a pass do not count products."""
    graphs = [part[kind] for kind in ("forward", "backward", "inference") if kind in part]
    kernels: dict[str, float] = {}
    for entry in (entry for graph in graphs for entry in (*graph["triton"], *graph["own"])):
        name = entry["name"].rstrip("0123456789").rstrip("_")  # Inductor numbers kernels in the order of the graph
        kernels[name] = kernels.get(name, 0) + entry["bytes"] / 1e9
    largest = sorted(kernels.items(), key=lambda item: -item[1])
    return {"gigabytes": round(sum(graph["bytes"] for graph in graphs) / 1e9, 4),
            "launches": sum(graph["kernel_launches"] for graph in graphs),
            "peak_gigabytes": round(part["peak_bytes"] / 1e9, 4), "kernels": {name: round(gb, 4) for name, gb in largest}}


def overruns(name: str, part: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    """Return a message for each quantity that is over its budget, with the kernels that grew most."""
    now, before = figures(part), budget.get("kernels", {})
    grown = sorted(((gb - before.get(kernel, 0), kernel) for kernel, gb in now["kernels"].items()), reverse=True)[:5]
    largest = "; ".join(f"{kernel} {more:+.3f} GB" for more, kernel in grown if more > 0.001)
    over = [quantity for quantity in QUANTITIES if now[quantity] > budget.get(quantity, math.inf) * TOLERANCE]
    return [f"{name}: {now[quantity]} {quantity.replace('_', ' ')}, the budget is {budget[quantity]}. "
            f"Grown: {largest or 'none'}" for quantity in over]


def record(cases: dict[str, Case], prefix: str = "") -> dict[str, Any]:
    """Measure cases; return their budgets."""
    budgets = {}
    for name, case in cases.items():
        for title, part in passes(prefix + name, case.measure()).items():
            budget = figures(part)
            budgets[title] = budget | {"kernels": dict(list(budget["kernels"].items())[:NAMED])}
    return budgets


def main() -> None:
    """Record the budgets of the cases that the command line names, `whole` for the whole presets; of all without names."""
    names = sys.argv[1:]
    budgets = json.loads(FILE.read_text()) if FILE.exists() else {}
    budgets |= record({name: case for name, case in SMALL.items() if not names or name in names})
    budgets |= record({name: case for name, case in WHOLE.items() if f"whole {name}" in names or not names}, "whole ")
    write_json(FILE, dict(sorted(budgets.items())))


if __name__ == "__main__":
    main()
