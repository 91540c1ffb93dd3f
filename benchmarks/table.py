"""Print the README's tables of results, from the JSON files here and from records/: `python -m benchmarks.table`."""

import json
import statistics

from benchmarks import HERE
from scripts.lab.records import markdown, read_records
from scripts.lab.tuning import base_steps, leaderboard_rows
from scripts.leaderboard import RECORDS


def load(name: str) -> dict:
    """Load benchmarks/NAME.json."""
    return json.loads((HERE / f"{name}.json").read_text())


Row = tuple[str, str, str, str]
"""What is measured, our result, the result to compare with, and the number of runs."""


def mean_and_sd(runs: list[dict], key: str, digits: int) -> str:
    """Return `mean ± standard deviation` of a figure over runs."""
    values = [run[key] for run in runs]
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def nanogpt_rows(result: dict) -> list[Row]:
    """Return the rows on nanoGPT: the final losses of `tiny` and nanoGPT, and how soon our presets reach nanoGPT's."""
    nanogpt, tiny, small = (result["runs"][name] for name in ("nanoGPT", "tiny", "bytes"))
    # Steps times their median: the wall time would include nanoGPT's imports, evaluations and checkpoints.
    seconds = statistics.mean(run["steps"] * run["median_step_ms"] / 1000 for run in nanogpt)
    speedup = seconds / statistics.mean(run["target_seconds"] for run in tiny)
    target = result["target_bits_per_byte"]
    return [
        ("`tiny`: bits per byte when its minute ends", f"**{mean_and_sd(tiny, 'bits_per_byte', 3)}** in "
         f"{statistics.mean(run['train_seconds'] for run in tiny):.0f} s of training",
         f"nanoGPT on bytes {mean_and_sd(nanogpt, 'bits_per_byte', 3)} in {seconds:.0f} s; xz -9 1.594", f"n = {len(tiny)}"),
        (f"`tiny`: training seconds to nanoGPT's {target:.4f}", f"**{mean_and_sd(tiny, 'target_seconds', 2)}**",
         f"{seconds:.0f} ({speedup:.0f} x sooner)", f"n = {len(tiny)}"),
        ("`bytes`: steps to the same, at nanoGPT's size", f"**{mean_and_sd(small, 'target_step', 0)}** of 240", "2000",
         f"n = {len(small)}"),
    ]


def muon_row(preset: str, result: dict) -> Row:
    """Return the row on Muon and AdamW: bits per byte at equal steps, and the steps that AdamW needs for Muon's loss."""
    final, muon = result["final"], result["final"]["muon"]
    adamw = next(row for name, row in final.items() if name.startswith("adamw") and row["steps"] == muon["steps"])
    # AdamW was run at a few lengths only: the longest that is worse than Muon, and the shortest that is as good.
    too_few = max(row["steps"] for row in final.values() if row["bits_per_byte_mean"] > muon["bits_per_byte_mean"])
    enough = result["adamw_steps_to_muon_loss"]
    needed = f"more than {too_few}" + (f" and at most {enough}" if enough else "")

    def figure(row: dict) -> str:
        return f"{row['bits_per_byte_mean']:.3f} ± {row['bits_per_byte_sd']:.3f}"

    return (f"`{preset}`, {muon['steps']} steps: Muon against tuned AdamW on the matrices", f"**{figure(muon)}**",
            f"{figure(adamw)}; AdamW needs {needed} steps for Muon's loss", f"n = {muon['n']}")


def step_row(result: dict) -> Row:
    """Return the row on the time of a Muon step: ours and PyTorch's."""
    ratio, our_seconds = result["ratio_to_ours"], result["median_seconds"]["ours"]
    return ("one Muon step on `track3`'s 72 matrices", f"**{our_seconds:.1f} s**", "torch.optim.Muon "
            f"{ratio['torch.optim.Muon']:.1f} x that; in float32 {ratio['torch.optim.Muon, float32']:.2f} x",
            f"n = {len(result['seconds']['ours'])}")


def table() -> str:
    """Return the README's first table, in Markdown."""
    rows = [*nanogpt_rows(load("beside_nanogpt")), step_row(load("muon_step"))]
    rows += [muon_row("bytes", load("muon_vs_adamw_bytes"))]
    return "\n".join(markdown(("what", "ours", "beside it", "measured"), rows))


def leaderboard(preset: str = "bench_cpu", *, budget: int = 5) -> str:
    """Return the leaderboard of a preset in Markdown: runs of its own length, each entry tuned with `budget` trials."""
    board = leaderboard_rows(read_records(RECORDS / f"{preset}.jsonl"), steps=base_steps(preset), budget=budget)
    rows = []
    for place in board:
        sd = "" if place.loss.sd is None else f" ± {place.loss.sd:.3f}"
        difference = "" if place.versus is None else f"{place.versus.difference:+.3f}"
        p = "" if place.p_holm is None else f"{place.p_holm:.1g}"
        rows.append((place.entry, f"{place.loss.mean:.3f}{sd}", place.loss.n, difference, p))
    head = ("optimizer of the matrices", "loss after 240 steps (nats)", "n", "minus Muon", "p (Holm)")
    return "\n".join(markdown(head, rows))


if __name__ == "__main__":
    print(table(), leaderboard(), sep="\n\n")
