"""nGPT beside its paper's baseline and beside a GPT trained by Muon: steps to equal loss, and loss against learning rate.

    python -m benchmarks.ngpt speedup     # contexts x horizons; writes ngpt_speedup.json and .png
    python -m benchmarks.ngpt robustness  # lr over two decades, no warm-up, no decay; writes ngpt_robustness.json and .png

Byte models of 4 layers, 64 wide, on Python's own source, everything in float32, 1024 tokens a step, so that contexts differ
in nothing else. Every method gets the same number of learning rates with the tuning seed, at each context and horizon anew,
then fresh seeds; every run ends at the end of its own schedule. The speed-up is read as in the paper (Loshchilov et al.
2024, arXiv 2410.01131, figure 3): how many steps nGPT needs for the loss that the baseline ends with, on the straight line
through its own two horizons in log steps.
"""

import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from benchmarks import draw_lines, train_once, write_result

RUNS = Path("runs") / "ngpt"
CONTEXTS, HORIZONS, SEEDS, TUNING_SEED = (64, 256, 1024), (250, 1000), (1, 2, 3), 1000
SIZE = ("--model.layers 4 --model.dim 64 --model.head_dim 32 --train.batch_tokens 1024 --data.val_bytes 131072 "
        "--run.compile off")
# The paper's architecture in the sizes of `bytes`: SwiGLU, RMS norms with gains, no skips, no tricks of the speedrun.
PAPER = ("--model.activation swiglu --model.no_zero_init_projections --model.softcap none --model.no_x0_skip "
         "--model.no_smear --model.attention_scale None --model.rotary_base 10000")
BASELINE = f"{PAPER} --model.norm_gains --model.no_norm_embedding --model.no_qk_norm --model.embed_std 0.02"
SPHERE = f"{PAPER} --model.geometry sphere --model.eigen_lr 0.25 --model.logit_scale 8"
ROLES = ("matrix", "embed", "head", "gain", "scale")


def adam(roles: tuple[str, ...], lr: float, more: str) -> str:
    """Adam with the paper's betas and one learning rate for these roles."""
    flags = f"--optim.{{}}.rule adam --optim.{{}}.lr {lr:g} --optim.{{}}.beta1 0.9 --optim.{{}}.beta2 0.95"
    held = " ".join(f"{flags} {more}".replace("{}", role) for role in roles[:3])
    return " ".join((held, *(flags.replace("{}", role) for role in roles[3:])))


class Method(NamedTuple):
    """A model, its optimizer at a learning rate, its schedule, and the learning rates to try."""

    model: str
    optim: Callable[[float], str]
    schedule: str
    lrs: tuple[float, ...]


METHODS = {
    "GPT, AdamW": Method(BASELINE, lambda lr: adam(ROLES, lr, "--optim.{}.weight_decay 0.1"), "0=0 10%=1 cos 100%=0",
                         (0.002, 0.004, 0.008, 0.016, 0.032)),
    "nGPT": Method(SPHERE, lambda lr: adam(ROLES, lr, "--optim.{}.constraint sphere"), "0=1 cos 100%=0",
                   (0.005, 0.01, 0.02, 0.04, 0.08)),
    "GPT, Muon": Method("", lambda lr: f"--optim.matrix.lr {lr:g}", "0=1 40%=1 100%=0.1", (0.01, 0.02, 0.04, 0.08, 0.16)),
}
NO_DECAY = {
    "GPT, AdamW": METHODS["GPT, AdamW"]._replace(optim=lambda lr: adam(ROLES, lr, "")),
    "nGPT": METHODS["nGPT"],
    "GPT, Muon": METHODS["GPT, Muon"],
    "GPT, MuonH": METHODS["GPT, Muon"]._replace(
        model="--model.no_zero_init_projections",
        optim=lambda lr: f"--optim.matrix.constraint hyperball --optim.matrix.lr {lr:g}"),
}
CENTRES = {"GPT, AdamW": 0.008, "nGPT": 0.02, "GPT, Muon": 0.04, "GPT, MuonH": 0.04}


def loss(part: str, name: str, method: Method, *, lr: float, context: int, steps: int, seed: int) -> float:
    """Validation loss at the end of one run, in nats per token; infinite where it broke down."""
    folder = f"{part}-{name.replace(', ', '-')}-lr{lr:.4g}-context{context}-steps{steps}-seed{seed}"
    flags = f"{SIZE} {method.model} {method.optim(lr)} --data.sequence_tokens {context} --train.steps {steps}".split()
    summary = train_once(RUNS / folder, "bytes", [*flags, "--schedule.lr", method.schedule], seed=seed)
    return summary["val_loss_nats"] if summary else math.inf


def tuned(name: str, *, context: int, steps: int) -> dict:
    """The best learning rate by the tuning seed, and the fresh seeds' losses there."""
    at = {"context": context, "steps": steps}
    tried = {lr: loss("speedup", name, METHODS[name], lr=lr, seed=TUNING_SEED, **at) for lr in METHODS[name].lrs}
    best = min(tried, key=tried.get)
    losses = [loss("speedup", name, METHODS[name], lr=best, seed=seed, **at) for seed in SEEDS]
    return {"method": name, **at, "tried": {f"{lr:g}": value for lr, value in tried.items()}, "lr": best, "n": len(losses),
            "losses": losses, "mean": statistics.mean(losses), "sd": statistics.stdev(losses)}


def steps_for(target: float, rows: list[dict]) -> float:
    """Steps at which a method's mean losses, a line in log steps through its two horizons, reach the target."""
    (s0, l0), (s1, l1) = ((row["steps"], row["mean"]) for row in rows)
    slope = (l1 - l0) / math.log(s1 / s0)
    return s0 * math.exp((target - l0) / slope)


def factors(rows: list[dict]) -> list[dict]:
    """For each context and horizon: steps of nGPT for each other method's final loss, and the speed-up."""
    found = []
    for context in CONTEXTS:
        of = {name: [r for r in rows if r["method"] == name and r["context"] == context] for name in METHODS}
        for name in ("GPT, AdamW", "GPT, Muon"):
            for row in of[name]:
                needed = steps_for(row["mean"], of["nGPT"])
                found.append({"against": name, "context": context, "steps": row["steps"], "loss": row["mean"],
                              "ngpt_steps": needed, "speedup": row["steps"] / needed,
                              "read_within_horizons": HORIZONS[0] <= needed <= HORIZONS[1]})
    return found


def plot_speedup(found: list[dict]) -> None:
    """Speed-up against context, one line for each opponent and horizon."""
    lines = {}
    for name, steps in itertools.product(("GPT, AdamW", "GPT, Muon"), HORIZONS):
        at = [f for f in found if f["against"] == name and f["steps"] == steps]
        lines[f"against {name}, {steps} steps"] = [f["context"] for f in at], [f["speedup"] for f in at]
    draw_lines("ngpt_speedup", lines, xaxis=dict(title="context (tokens)", type="log", tickvals=CONTEXTS),
         yaxis=dict(title="speed-up of nGPT (steps / its steps to equal loss)", type="log"), level=1)


def plot_robustness(rows: list[dict]) -> None:
    """Loss against lr relative to each method's own centre."""
    lines = {}
    for name, centre in CENTRES.items():
        at = [r for r in rows if r["method"] == name]
        lines[f"{name} (centre {centre:g})"] = [r["lr"] / centre for r in at], [r["mean"] for r in at]
    draw_lines("ngpt_robustness", lines, xaxis=dict(title="learning rate / the method's own centre", type="log"),
         yaxis=dict(title="validation loss (nats per token)", range=[1.4, 4.0]))


def speedup() -> dict:
    """Every method at every context and horizon, and what follows."""
    rows = [tuned(name, context=context, steps=steps) for steps in HORIZONS for context in CONTEXTS for name in METHODS]
    found = factors(rows)
    plot_speedup(found)
    return {"rows": rows, "factors": found}


def robustness() -> dict:
    """Losses at nine learning rates over two decades, context 64, the shorter horizon, one seed."""
    rows = []
    for name, method in NO_DECAY.items():
        for power in range(-4, 5):
            lr = CENTRES[name] * 10 ** (power / 4)
            reached = loss("robust", name, method._replace(schedule="0=1 cos 100%=0"), lr=lr, context=64, steps=HORIZONS[0],
                           seed=SEEDS[0])
            rows.append({"method": name, "lr": lr, "losses": [reached], "mean": reached})
    plot_robustness(rows)
    return {"rows": rows}


def main(part: Annotated[Literal["speedup", "robustness"], tyro.conf.Positional]) -> None:
    """Measure one part and write it down."""
    write_result(f"ngpt_{part}", f"ngpt {part}", **(speedup() if part == "speedup" else robustness()))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
