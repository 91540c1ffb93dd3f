"""Winning tickets: how much of a search space is good? One seeded random sweep for every optimizer, on a very short run.

    python -m benchmarks.winning_tickets --draws 24

After Nestler 2022: each optimizer gets the same number of draws of learning rate, average and weight decay, its lr over two
decades; a ticket wins where its loss is within 2 % of the best that anyone found. All runs are made in one process; those
that are there already are not made again. Writes winning_tickets.json and, with Chromium, winning_tickets.png.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import draw_lines, train_once, write_result
from scripts.lab.tuning import draw, flags_of, parse_range

SHORT = ("--train.steps", "60", "--train.val_every_steps", "0", "--data.val_bytes", "32768")
WITHIN = 1.02
DECAY = "optim.matrix.weight_decay=0.001:1:log"
BETA = "optim.matrix.beta1=0.5:0.98:one_minus"
MOMENTUM = "optim.matrix.momentum=0.5:0.98:one_minus"
# Two decades of lr around what each needs elsewhere.
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


@dataclass
class Arguments:
    """Arguments of the sweep."""

    draws: int = 24
    seed: int = 1
    dir: Path = Path("runs") / "winning_tickets"


def tickets(args: Arguments) -> list[dict]:
    """All draws of all methods, in turn over the methods, and the losses that they ended with; infinite where one broke
    down."""
    drawn = {name: draw([parse_range(text) for text in space], args.draws, seed=args.seed, quasi=False)
             for name, (_, space) in METHODS.items()}
    found = []
    for number in range(args.draws):
        for name, (flags, _) in METHODS.items():
            own = (*flags.split(), *flags_of(drawn[name][number]), *SHORT)
            folder = args.dir / f"{name.replace('#', '-on-')}-draw{number:02}"
            summary = train_once(folder, "bench_cpu", own, seed=args.seed)
            loss = summary["val_loss_nats"] if summary else math.inf
            found.append({"method": name, "flags": " ".join(own), "val_loss_nats": loss})
    return found


def share_within(values: list[float], best: float) -> float:
    """Share of draws within 2 % of the best loss."""
    return sum(value <= best * WITHIN for value in values) / len(values)


def plot(found: dict[str, list[float]], best: float) -> None:
    """Every draw's loss, best first, one line a method; the dashed line is within 2 % of the best."""
    lines = {f"{name}: {share_within(values, best):.0%} win": (list(range(1, len(values) + 1)), values)
             for name, values in found.items()}
    draw_lines("winning_tickets", lines, xaxis=dict(title="draws, best first"), level=best * WITHIN,
               yaxis=dict(title="validation loss (nats per token)", range=[best - 0.05, best + 1.5]))


def main(args: Arguments) -> None:
    """Run the sweep, write down every draw, and draw the picture."""
    drawn = tickets(args)
    found = {name: sorted(one["val_loss_nats"] for one in drawn if one["method"] == name) for name in METHODS}
    best = min(map(min, found.values()))
    shares = {name: share_within(values, best) for name, values in found.items()}
    write_result("winning_tickets", f"winning_tickets --draws {args.draws} --seed {args.seed}", best_val_loss_nats=best,
                 share_within_2_percent=shares, draws=drawn)
    for name, values in sorted(found.items(), key=lambda item: -shares[item[0]]):
        print(f"{name:14} best {values[0]:.4f}  median {values[len(values) // 2]:.4f}  within 2 %: {shares[name]:.0%}")
    plot(found, best)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__, use_underscores=True))
