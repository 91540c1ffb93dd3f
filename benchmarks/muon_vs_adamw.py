"""Muon against AdamW on the hidden matrices, tuned with equal care: loss at equal steps, and steps to equal loss.

    python -m benchmarks.muon_vs_adamw bytes
    python -m benchmarks.muon_vs_adamw tiny --seeds 3 --tuning_seeds 1 --horizons 1.0

1. Each side gets the same number of learning rates, each at the preset's own length with `tuning_seeds` seeds; the best
   mean wins. 2. Fresh seeds run the winners. 3. AdamW alone is also given longer schedules (`horizons`, multiples of the
   preset's steps): the shortest whose mean loss is at most Muon's mean says how many steps it needs for the same loss.
Every run ends at the end of its own schedule. Writes muon_vs_adamw_PRESET.json.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks import train_once, write_result
from configs.presets import PRESETS

RUNS = Path("runs") / "muon_vs_adamw"


@dataclass
class Comparison:
    """Arguments of the comparison."""

    preset: Annotated[str, tyro.conf.Positional]
    muon_lrs: tuple[float, ...] = (0.01, 0.02, 0.03, 0.045, 0.07, 0.1)
    adamw_lrs: tuple[float, ...] = (0.00075, 0.0015, 0.003, 0.006, 0.012, 0.024)
    tuning_seeds: int = 2
    seeds: int = 5
    """Fresh seeds of the winners."""
    horizons: tuple[float, ...] = (1.0, 1.75, 2.5)


def run(preset: str, *, lr: float, steps: int, seed: int) -> dict:
    """One run: its figures."""
    name = f"{preset}-lr{lr:g}-steps{steps}-seed{seed}"
    summary = train_once(RUNS / name, preset, ["--optim.matrix.lr", str(lr), "--train.steps", str(steps)], seed=seed)
    return {"lr": lr, "steps": steps, "seed": seed} | {k: summary[k] for k in ("val_bits_per_byte", "train_seconds")}


def mean(runs: list[dict], key: str = "val_bits_per_byte") -> float:
    """Mean of a figure over runs."""
    return statistics.mean(r[key] for r in runs)


def summarise(runs: list[dict]) -> dict:
    """n, mean and standard deviation of bits per byte, and mean seconds."""
    bits = [r["val_bits_per_byte"] for r in runs]
    return {"lr": runs[0]["lr"], "steps": runs[0]["steps"], "n": len(runs), "bits_per_byte_mean": mean(runs),
            "bits_per_byte_sd": statistics.stdev(bits) if len(bits) > 1 else None,
            "train_seconds_mean": mean(runs, "train_seconds")}


def tune(preset: str, lrs: tuple[float, ...], seeds: int) -> tuple[float, list[dict]]:
    """The learning rate with the best mean at the preset's own length, and all that was tried."""
    steps = PRESETS[preset]().train.steps
    tried = [[run(preset, lr=lr, steps=steps, seed=100 + seed) for seed in range(seeds)] for lr in lrs]
    return min(tried, key=mean)[0]["lr"], [summarise(runs) for runs in tried]


def main(args: Comparison) -> None:
    """Tune both sides, run fresh seeds, stretch AdamW, write everything down."""
    muon, adamw = args.preset, f"{args.preset}_adamw"
    steps = PRESETS[muon]().train.steps
    muon_lr, muon_tried = tune(muon, args.muon_lrs, args.tuning_seeds)
    adamw_lr, adamw_tried = tune(adamw, args.adamw_lrs, args.tuning_seeds)
    seeds = range(1, args.seeds + 1)
    lengths = [round(steps * h) for h in args.horizons]
    final = {"muon": [run(muon, lr=muon_lr, steps=steps, seed=s) for s in seeds]}
    final |= {f"adamw, {n} steps": [run(adamw, lr=adamw_lr, steps=n, seed=s) for s in seeds] for n in lengths}
    reached = [n for n in lengths if mean(final[f"adamw, {n} steps"]) <= mean(final["muon"])]
    result = {"tuning": {"muon": muon_tried, "adamw": adamw_tried},
              "final": {name: summarise(runs) for name, runs in final.items()},
              "adamw_steps_to_muon_loss": reached[0] if reached else None}
    write_result(f"muon_vs_adamw_{args.preset}", f"muon_vs_adamw {args.preset}", arguments=vars(args), runs=final, **result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Comparison, description=__doc__))
