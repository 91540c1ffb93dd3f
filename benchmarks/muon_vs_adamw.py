"""Compare Muon with AdamW on the hidden matrices, both tuned alike: loss at equal steps, and steps to equal loss.

    python -m benchmarks.muon_vs_adamw bytes
    python -m benchmarks.muon_vs_adamw tiny --seeds 3 --tuning_seeds 1 --horizons 1.0

1. Tune: each optimizer tries the same number of learning rates at the preset's own length, with `tuning_seeds` seeds each.
   The learning rate with the best mean wins.
2. Run the two winners with fresh seeds.
3. Run AdamW with longer schedules, too (`horizons`, in multiples of the preset's steps). The shortest one whose mean loss is
   at most Muon's mean loss tells how many steps AdamW needs for the same loss.

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
FIRST_TUNING_SEED = 100  # far from the fresh seeds 1, 2, ...: no run takes part in both


@dataclass
class Comparison:
    """Arguments of the comparison."""

    preset: Annotated[str, tyro.conf.Positional]
    """A preset that uses Muon and has a twin PRESET_adamw."""
    muon_lrs: tuple[float, ...] = (0.01, 0.02, 0.03, 0.045, 0.07, 0.1)
    """Learning rates of the matrices to try with Muon."""
    adamw_lrs: tuple[float, ...] = (0.00075, 0.0015, 0.003, 0.006, 0.012, 0.024)
    """Learning rates of the matrices to try with AdamW."""
    tuning_seeds: int = 2
    """Seeds of each learning rate while tuning."""
    seeds: int = 5
    """Fresh seeds of each winner."""
    horizons: tuple[float, ...] = (1.0, 1.75, 2.5)
    """Lengths of AdamW's schedule, in multiples of the preset's steps, in ascending order."""


def run(preset: str, *, lr: float, steps: int, seed: int) -> dict:
    """Make one run and return its settings, bits per byte and training seconds."""
    name = f"{preset}-lr{lr:g}-steps{steps}-seed{seed}"
    summary = train_once(RUNS / name, preset, ["--optim.matrix.lr", str(lr), "--train.steps", str(steps)], seed=seed)
    return {"lr": lr, "steps": steps, "seed": seed} | {k: summary[k] for k in ("val_bits_per_byte", "train_seconds")}


def mean(runs: list[dict], key: str = "val_bits_per_byte") -> float:
    """Return the mean of a figure over runs."""
    return statistics.mean(r[key] for r in runs)


def summarise(runs: list[dict]) -> dict:
    """Return n, mean and standard deviation (None if n = 1) of bits per byte, and mean training seconds."""
    bits = [r["val_bits_per_byte"] for r in runs]
    return {"lr": runs[0]["lr"], "steps": runs[0]["steps"], "n": len(runs), "bits_per_byte_mean": mean(runs),
            "bits_per_byte_sd": statistics.stdev(bits) if len(bits) > 1 else None,
            "train_seconds_mean": mean(runs, "train_seconds")}


def tune(preset: str, lrs: tuple[float, ...], seeds: int) -> tuple[float, list[dict]]:
    """Return the learning rate with the best mean at the preset's own length, and a summary for every one tried."""
    steps = PRESETS[preset]().train.steps
    trials = [[run(preset, lr=lr, steps=steps, seed=FIRST_TUNING_SEED + i) for i in range(seeds)] for lr in lrs]
    return min(trials, key=mean)[0]["lr"], [summarise(runs) for runs in trials]


def main(args: Comparison) -> None:
    """Tune both optimizers, run the winners and the longer AdamW, and write the result."""
    muon, adamw = args.preset, f"{args.preset}_adamw"
    steps = PRESETS[muon]().train.steps
    # Tune.
    muon_lr, muon_trials = tune(muon, args.muon_lrs, args.tuning_seeds)
    adamw_lr, adamw_trials = tune(adamw, args.adamw_lrs, args.tuning_seeds)
    # Fresh seeds.
    seeds = range(1, args.seeds + 1)
    lengths = [round(steps * horizon) for horizon in args.horizons]
    final = {"muon": [run(muon, lr=muon_lr, steps=steps, seed=s) for s in seeds]}
    final |= {f"adamw, {n} steps": [run(adamw, lr=adamw_lr, steps=n, seed=s) for s in seeds] for n in lengths}
    # Steps to equal loss.
    sufficient = [n for n in lengths if mean(final[f"adamw, {n} steps"]) <= mean(final["muon"])]
    result = {"tuning": {"muon": muon_trials, "adamw": adamw_trials},
              "final": {name: summarise(runs) for name, runs in final.items()},
              "adamw_steps_to_muon_loss": sufficient[0] if sufficient else None}
    write_result(f"muon_vs_adamw_{args.preset}", f"muon_vs_adamw {args.preset}", arguments=vars(args), runs=final, **result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Comparison, description=__doc__))
