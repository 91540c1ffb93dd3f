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


def nanogpt_rows(result: dict, compression: dict) -> list[Row]:
    """Return the rows on the newcomer's minute: `tiny` beside nanoGPT and compressors; how soon we reach nanoGPT's loss."""
    nanogpt, tiny, small = (result["runs"][name] for name in ("nanoGPT", "tiny", "bytes"))
    # Steps times their median: the wall time would include nanoGPT's imports, evaluations and checkpoints.
    seconds = statistics.mean(run["steps"] * run["median_step_ms"] / 1000 for run in nanogpt)
    speedup = seconds / statistics.mean(run["target_seconds"] for run in tiny)
    target = result["target_bits_per_byte"]
    xz, ppmd = (compression["compressors"][name]["bits_per_byte_after_train"] for name in ("xz -9e", "PPMd H, order 64"))
    return [
        ("`tiny`: bits per byte after its minute", f"**{mean_and_sd(tiny, 'bits_per_byte', 3)}** in "
         f"{statistics.mean(run['train_seconds'] for run in tiny):.0f} s of training",
         f"nanoGPT on bytes {mean_and_sd(nanogpt, 'bits_per_byte', 3)} in {seconds:.0f} s; after the same training text "
         f"xz {xz:.3f}, PPMd {ppmd:.3f}", f"n = {len(tiny)}"),
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
    return ("one Muon step on `track3`'s 72 matrices", f"{our_seconds:.1f} s", "torch.optim.Muon "
            f"{ratio['torch.optim.Muon']:.1f} x that; in float32 {ratio['torch.optim.Muon, float32']:.2f} x",
            f"n = {len(result['seconds']['ours'])}")


def leaderboard_row(preset: str, *, budget: int = 5) -> Row:
    """Return the row on the leaderboard of a preset: its first place and Muon, each tuned with `budget` trials."""
    board = leaderboard_rows(read_records(RECORDS / f"{preset}.jsonl"), steps=base_steps(preset), budget=budget)
    best, muon = board[0], next(row for row in board if row.entry == "muon")
    return (f"`{preset}`: the best of {len(board)} tuned optimizers, nats after {base_steps(preset)} steps",
            f"{best.entry} **{best.loss.mean:.3f} ± {best.loss.sd:.3f}**",
            f"Muon {muon.loss.mean:.3f} ± {muon.loss.sd:.3f} (Holm p = {best.p_holm:.1g})",
            f"n = {best.loss.n}, {muon.loss.n}")


def ngpt_row(result: dict, *, context: int = 1024, steps: int = 1000) -> Row:
    """Return the row on nGPT: steps of its paper's baseline, and of our GPT with Muon, over nGPT's steps to equal loss."""
    speedup = {row["against"]: row["speedup"] for row in result["factors"]
               if row["context"] == context and row["steps"] == steps}
    return (f"nGPT: steps of a GPT over nGPT's steps to equal loss, context {context}, {steps} steps",
            f"**{speedup['GPT, AdamW']:.2f} x** over the paper's baseline",
            f"{speedup['GPT, Muon']:.2f} x over our GPT with Muon", "n = 3")


def table() -> str:
    """Return the README's table of results, in Markdown."""
    rows = [*nanogpt_rows(load("beside_nanogpt"), load("compression")), muon_row("bytes", load("muon_vs_adamw_bytes")),
            leaderboard_row("bench_cpu"), ngpt_row(load("ngpt_speedup")), step_row(load("muon_step"))]
    return "\n".join(markdown(("measured on two CPU cores", "result", "beside it", "seeds"), rows))


def flags_table() -> str:
    """Return the README's table of flags and what each changes in `tiny`, in Markdown."""
    rows = [(f"`{' '.join(row['flags'])}`", f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})", row["n"])
            for row in load("ablate_tiny")["rows"] if row["difference"] is not None]
    return "\n".join(markdown(("flag", "bits per byte, with 95 % interval", "seeds"), rows))


if __name__ == "__main__":
    print(table(), flags_table(), sep="\n\n")
