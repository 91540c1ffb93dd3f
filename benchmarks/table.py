"""The README's tables of results, made from the files beside this one and from records/: `python -m benchmarks.table`."""

import json
import statistics

from benchmarks import HERE
from scripts.lab.records import markdown, read_records
from scripts.lab.tuning import base_steps, leaderboard_rows
from scripts.leaderboard import RECORDS


def load(name: str) -> dict:
    """The result file of a benchmark."""
    return json.loads((HERE / f"{name}.json").read_text())


def spread(runs: list[dict], key: str, digits: int) -> str:
    """Mean and standard deviation of a figure over runs."""
    values = [run[key] for run in runs]
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


Row = tuple[str, str, str, str]


def nanogpt_rows(result: dict) -> list[Row]:
    """The newcomer's minute, and how soon each side reaches nanoGPT's final loss."""
    runs, peer = result["runs"], result["runs"]["nanoGPT"]
    tiny, small = runs["tiny"], runs["bytes"]
    seconds = statistics.mean(run["steps"] * run["median_step_ms"] / 1000 for run in peer)  # its loop alone
    sooner = seconds / statistics.mean(run["target_seconds"] for run in tiny)
    target = result["target_bits_per_byte"]
    return [
        ("`tiny`: bits per byte when its minute ends", f"**{spread(tiny, 'bits_per_byte', 3)}** in "
         f"{statistics.mean(run['train_seconds'] for run in tiny):.0f} s of training",
         f"nanoGPT on bytes {spread(peer, 'bits_per_byte', 3)} in {seconds:.0f} s; xz -9 1.594", f"n = {len(tiny)}"),
        (f"`tiny`: training seconds to nanoGPT's {target:.4f}", f"**{spread(tiny, 'target_seconds', 2)}**",
         f"{seconds:.0f} ({sooner:.0f} x sooner)", f"n = {len(tiny)}"),
        ("`bytes`: steps to the same, at nanoGPT's size", f"**{spread(small, 'target_step', 0)}** of 240", "2000",
         f"n = {len(small)}"),
    ]


def muon_row(preset: str, result: dict) -> Row:
    """Muon against AdamW at equal steps, and AdamW's steps to the same loss."""
    muon, final = result["final"]["muon"], result["final"]
    equal = next(found for name, found in final.items() if name.startswith("adamw") and found["steps"] == muon["steps"])
    short = max(f["steps"] for f in final.values() if f["bits_per_byte_mean"] > muon["bits_per_byte_mean"])
    enough = result["adamw_steps_to_muon_loss"]
    needed = f"more than {short}" + (f" and at most {enough}" if enough else "")

    def figure(found: dict) -> str:
        return f"{found['bits_per_byte_mean']:.3f} ± {found['bits_per_byte_sd']:.3f}"

    return (f"`{preset}`, {muon['steps']} steps: Muon against tuned AdamW on the matrices", f"**{figure(muon)}**",
            f"{figure(equal)}; AdamW needs {needed} steps for Muon's loss", f"n = {muon['n']}")


def step_row(result: dict) -> Row:
    """Our optimizer step beside PyTorch's Muon."""
    ratio, ours = result["ratio_to_ours"], result["median_seconds"]["ours"]
    return ("one Muon step on `track3`'s 72 matrices", f"**{ours:.1f} s**", "torch.optim.Muon "
            f"{ratio['torch.optim.Muon']:.1f} x that; in float32 {ratio['torch.optim.Muon, float32']:.2f} x",
            f"n = {len(result['seconds']['ours'])}")


def table() -> str:
    """All rows."""
    rows = [*nanogpt_rows(load("beside_nanogpt")), step_row(load("muon_step"))]
    rows += [muon_row("bytes", load("muon_vs_adamw_bytes"))]
    return "\n".join(markdown(("what", "ours", "beside it", "measured"), rows))


def leaderboard(preset: str = "bench_cpu", *, budget: int = 5) -> str:
    """The optimization benchmark in short: places at the preset's own length, each tuned with `budget` trials."""
    board = leaderboard_rows(read_records(RECORDS / f"{preset}.jsonl"), steps=base_steps(preset), budget=budget)
    rows = []
    for place in board:
        spread = "" if place.loss.sd is None else f" ± {place.loss.sd:.3f}"
        difference = "" if place.versus is None else f"{place.versus.difference:+.3f}"
        p = "" if place.p_holm is None else f"{place.p_holm:.1g}"
        rows.append((place.entry, f"{place.loss.mean:.3f}{spread}", place.loss.n, difference, p))
    head = ("optimizer of the matrices", "loss after 240 steps (nats)", "n", "minus Muon", "p (Holm)")
    return "\n".join(markdown(head, rows))


if __name__ == "__main__":
    print(table(), leaderboard(), sep="\n\n")
