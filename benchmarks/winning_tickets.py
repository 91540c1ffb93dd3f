"""Share of random hyperparameters that train well: one random search per optimizer, on a very short run.

    python -m benchmarks.winning_tickets --draws 24

After Nestler 2022. Each optimizer gets the same number of random draws of learning rate (two decades), momentum and weight
decay. A draw wins if its loss is within 2 % of the best loss of all optimizers. Runs that exist are not repeated. Writes
winning_tickets.json and, if Chromium is installed, winning_tickets.png.
"""

import math
from pathlib import Path

import tyro

from benchmarks import draw_lines, train_once, write_result
from scripts.lab.tuning import draw, flags_of, parse_range

SHORT = ("--train.steps", "60", "--train.val_every_steps", "0", "--data.val_bytes", "32768")
WITHIN = 1.02
DECAY = "optim.matrix.weight_decay=0.001:1:log"
BETA = "optim.matrix.beta1=0.5:0.98:one_minus"
MOMENTUM = "optim.matrix.momentum=0.5:0.98:one_minus"
# Name > (flags, search space). Each range of lr is two decades around the values that the optimizer needs elsewhere.
METHODS = {
    "AdamW": ("--optim.matrix.rule adam", ("optim.matrix.lr=0.0003:0.03:log", BETA, DECAY)),
    "SM3": ("--optim.matrix.rule sm3", ("optim.matrix.lr=0.001:0.1:log", MOMENTUM, DECAY)),
    "Shampoo#Adam": ("--optim.matrix.rule shampoo --optim.matrix.graft.rule adam --optim.matrix.eps 1e-8 "
                     "--optim.matrix.graft.eps 1e-8",
                     ("optim.matrix.lr=0.0003:0.03:log", MOMENTUM, DECAY)),
    "SOAP": ("--optim.matrix.rule soap --optim.matrix.eps 1e-8", ("optim.matrix.lr=0.0003:0.03:log", BETA, DECAY)),
    "Muon": ("", ("optim.matrix.lr=0.004:0.4:log", MOMENTUM, DECAY)),
    "Scion": ("--optim.embed.rule steepest --optim.embed.norm row --optim.embed.lr 0.03 --optim.head.rule steepest "
              "--optim.head.norm sign --optim.head.lr 0.004", ("optim.matrix.lr=0.004:0.4:log", MOMENTUM, DECAY)),
}


def run_draws(count: int, seed: int, dir: Path) -> list[dict]:
    """Run all draws, in turns over the optimizers; return each one's flags and final loss, infinite if it diverged."""
    draws = {name: draw([parse_range(text) for text in space], count, seed=seed, quasi=False)
             for name, (_, space) in METHODS.items()}
    results = []
    for number in range(count):
        for name, (method_flags, _) in METHODS.items():
            flags = (*method_flags.split(), *flags_of(draws[name][number]), *SHORT)
            folder = dir / f"{name.replace('#', '-on-')}-draw{number:02}"
            summary = train_once(folder, "bench_cpu", flags, seed=seed)
            loss = summary["val_loss_nats"] if summary else math.inf
            results.append({"method": name, "flags": " ".join(flags), "val_loss_nats": loss})
    return results


def share_within(losses: list[float], best: float) -> float:
    """Return the share of draws whose loss is within 2 % of the best."""
    return sum(loss <= best * WITHIN for loss in losses) / len(losses)


def plot(losses: dict[str, list[float]], best: float) -> None:
    """Draw each optimizer's losses from best to worst; the dashed line is 2 % above the best of all."""
    lines = {f"{name}: {share_within(values, best):.0%} win": (list(range(1, len(values) + 1)), values)
             for name, values in losses.items()}
    draw_lines("winning_tickets", lines, xaxis=dict(title="draws, best first"), level=best * WITHIN,
               yaxis=dict(title="validation loss (nats per token)", range=[best - 0.05, best + 1.5]))


def main(draws: int = 24, seed: int = 1, dir: Path = Path("runs") / "winning_tickets") -> None:
    """Run the search, write every draw, print a line for each optimizer, and draw the picture.

    Args:
        draws: Random draws of each optimizer.
        seed: Seed of the draws and of every run.
        dir: Folder of the runs.
    """
    results = run_draws(draws, seed, dir)
    losses = {name: sorted(row["val_loss_nats"] for row in results if row["method"] == name) for name in METHODS}
    best = min(map(min, losses.values()))
    shares = {name: share_within(values, best) for name, values in losses.items()}
    write_result("winning_tickets", f"winning_tickets --draws {draws} --seed {seed}", best_val_loss_nats=best,
                 share_within_2_percent=shares, draws=results)
    for name, values in sorted(losses.items(), key=lambda item: -shares[item[0]]):
        print(f"{name:14} best {values[0]:.4f}  median {values[len(values) // 2]:.4f}  within 2 %: {shares[name]:.0%}")
    plot(losses, best)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
