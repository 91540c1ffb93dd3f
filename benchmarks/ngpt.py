"""Compare nGPT with its paper's baseline and with a GPT trained by Muon: steps to equal loss, and sensitivity to the lr.

    python -m benchmarks.ngpt speedup     # contexts x horizons; writes ngpt_speedup.json and .png
    python -m benchmarks.ngpt robustness  # lr over two decades, no warm-up, no decay; writes ngpt_robustness.json and .png

Byte models, 4 layers, 64 wide, on the standard library's source, in float32. Every step has 1024 tokens at every context, so
that contexts differ in nothing else. At each context and horizon (number of steps) every method tries the same number of
learning rates with the tuning seed, and its best one is run with fresh seeds; every run ends at the end of its own schedule.

The speed-up follows the paper (Loshchilov et al. 2024, arXiv 2410.01131, figure 3): baseline steps / steps that nGPT needs
for the baseline's final loss. nGPT's loss as a function of its steps is the straight line in log(steps) through its mean
losses at the two horizons.
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
CONTEXTS, HORIZONS = (64, 256, 1024), (250, 1000)  # tokens, steps
SEEDS, TUNING_SEED = (1, 2, 3), 1000
SIZE = ("--model.layers 4 --model.dim 64 --model.head_dim 32 --train.batch_tokens 1024 --data.val_bytes 131072 "
        "--run.compile off")
# The paper's architecture in the sizes of `bytes`: SwiGLU, RMS norms with gains, no skips, no tricks of the speedrun.
PAPER = ("--model.activation swiglu --model.no_zero_init_projections --model.softcap none --model.no_x0_skip "
         "--model.no_smear --model.attention_scale None --model.rotary_base 10000")
BASELINE = f"{PAPER} --model.norm_gains --model.no_norm_embedding --model.no_qk_norm --model.embed_std 0.02"
SPHERE = f"{PAPER} --model.geometry sphere --model.eigen_lr 0.25 --model.logit_scale 8"
MATRIX_ROLES, VECTOR_ROLES = ("matrix", "embed", "head"), ("gain", "scale")


def adam(lr: float, matrix_flags: str) -> str:
    """Return flags for Adam with the paper's betas and one learning rate in all roles.

    `matrix_flags` are further flags of the matrix roles, which are those with decay or a constraint; {} stands for the role.
    """
    flags = f"--optim.{{}}.rule adam --optim.{{}}.lr {lr:g} --optim.{{}}.beta1 0.9 --optim.{{}}.beta2 0.95"
    matrix = [f"{flags} {matrix_flags}".replace("{}", role) for role in MATRIX_ROLES]
    vector = [flags.replace("{}", role) for role in VECTOR_ROLES]
    return " ".join((*matrix, *vector))


class Method(NamedTuple):
    """A model with its optimizer, as flags, and the learning rates to try."""

    model: str
    optim: Callable[[float], str]
    """The optimizer's flags as a function of the learning rate."""
    schedule: str
    """The value of --schedule.lr."""
    lrs: tuple[float, ...]


METHODS = {
    "GPT, AdamW": Method(BASELINE, lambda lr: adam(lr, "--optim.{}.weight_decay 0.1"), "0=0 10%=1 cos 100%=0",
                         (0.002, 0.004, 0.008, 0.016, 0.032)),
    "nGPT": Method(SPHERE, lambda lr: adam(lr, "--optim.{}.constraint sphere"), "0=1 cos 100%=0",
                   (0.005, 0.01, 0.02, 0.04, 0.08)),
    "GPT, Muon": Method("", lambda lr: f"--optim.matrix.lr {lr:g}", "0=1 40%=1 100%=0.1", (0.01, 0.02, 0.04, 0.08, 0.16)),
}
# For the robustness part: a constraint or nothing in place of weight decay.
NO_DECAY = {
    "GPT, AdamW": METHODS["GPT, AdamW"]._replace(optim=lambda lr: adam(lr, "")),
    "nGPT": METHODS["nGPT"],
    "GPT, Muon": METHODS["GPT, Muon"],
    "GPT, MuonH": METHODS["GPT, Muon"]._replace(
        model="--model.no_zero_init_projections",
        optim=lambda lr: f"--optim.matrix.constraint hyperball --optim.matrix.lr {lr:g}"),
}
# The middle of each method's learning rates in the robustness part, near its best one.
CENTRES = {"GPT, AdamW": 0.008, "nGPT": 0.02, "GPT, Muon": 0.04, "GPT, MuonH": 0.04}


def final_loss(part: str, name: str, method: Method, *, lr: float, context: int, steps: int, seed: int) -> float:
    """Make one run and return its final validation loss in nats per token; infinite if it diverged."""
    folder = f"{part}-{name.replace(', ', '-')}-lr{lr:.4g}-context{context}-steps{steps}-seed{seed}"
    flags = f"{SIZE} {method.model} {method.optim(lr)} --data.sequence_tokens {context} --train.steps {steps}".split()
    summary = train_once(RUNS / folder, "bytes", [*flags, "--schedule.lr", method.schedule], seed=seed)
    return summary["val_loss_nats"] if summary else math.inf


def tune(name: str, *, context: int, steps: int) -> dict:
    """Find a method's best learning rate with the tuning seed, run it with the fresh seeds, and return all losses."""
    setting = {"context": context, "steps": steps}
    tried = {lr: final_loss("speedup", name, METHODS[name], lr=lr, seed=TUNING_SEED, **setting) for lr in METHODS[name].lrs}
    best = min(tried, key=tried.get)
    losses = [final_loss("speedup", name, METHODS[name], lr=best, seed=seed, **setting) for seed in SEEDS]
    return {"method": name, **setting, "tried": {f"{lr:g}": value for lr, value in tried.items()}, "lr": best,
            "n": len(losses), "losses": losses, "mean": statistics.mean(losses), "sd": statistics.stdev(losses)}


def steps_to_loss(target: float, rows: list[dict]) -> float:
    """Return the steps at which the line through a method's mean losses at its two horizons, in log(steps), is `target`."""
    (s0, l0), (s1, l1) = ((row["steps"], row["mean"]) for row in rows)
    slope = (l1 - l0) / math.log(s1 / s0)
    return s0 * math.exp((target - l0) / slope)


def compute_speedups(rows: list[dict]) -> list[dict]:
    """Return nGPT's speed-up over each other method at each context and horizon.

    `read_within_horizons` is False if nGPT's steps lie outside the two horizons: then the line is extrapolated.
    """
    speedups = []
    for context in CONTEXTS:
        of = {name: [r for r in rows if r["method"] == name and r["context"] == context] for name in METHODS}
        for name in ("GPT, AdamW", "GPT, Muon"):
            for row in of[name]:
                ngpt_steps = steps_to_loss(row["mean"], of["nGPT"])
                speedups.append({"against": name, "context": context, "steps": row["steps"], "loss": row["mean"],
                                 "ngpt_steps": ngpt_steps, "speedup": row["steps"] / ngpt_steps,
                                 "read_within_horizons": HORIZONS[0] <= ngpt_steps <= HORIZONS[1]})
    return speedups


def measure_speedup() -> dict:
    """Tune every method at every context and horizon, draw the picture, and return all losses and speed-ups.

    The picture has one line for each other method and horizon: the speed-up against the context.
    """
    rows = [tune(name, context=context, steps=steps) for steps in HORIZONS for context in CONTEXTS for name in METHODS]
    speedups = compute_speedups(rows)
    lines = {}
    for name, steps in itertools.product(("GPT, AdamW", "GPT, Muon"), HORIZONS):
        line = [r for r in speedups if r["against"] == name and r["steps"] == steps]
        lines[f"against {name}, {steps} steps"] = [r["context"] for r in line], [r["speedup"] for r in line]
    draw_lines("ngpt_speedup", lines, xaxis=dict(title="context (tokens)", type="log", tickvals=CONTEXTS),
               yaxis=dict(title="speed-up of nGPT (steps / its steps to equal loss)", type="log"), level=1)
    return {"rows": rows, "factors": speedups}


def measure_robustness() -> dict:
    """Return the losses at nine learning rates over two decades: context 64, the shorter horizon, one seed.

    The picture shows the loss against the learning rate, relative to each method's own centre.
    """
    rows = []
    for name, method in NO_DECAY.items():
        method = method._replace(schedule="0=1 cos 100%=0")  # no warm-up, for all alike
        for power in range(-4, 5):
            lr = CENTRES[name] * 10 ** (power / 4)
            loss = final_loss("robust", name, method, lr=lr, context=64, steps=HORIZONS[0], seed=SEEDS[0])
            rows.append({"method": name, "lr": lr, "losses": [loss], "mean": loss})
    lines = {}
    for name, centre in CENTRES.items():
        own_rows = [r for r in rows if r["method"] == name]
        lines[f"{name} (centre {centre:g})"] = [r["lr"] / centre for r in own_rows], [r["mean"] for r in own_rows]
    draw_lines("ngpt_robustness", lines, xaxis=dict(title="learning rate / the method's own centre", type="log"),
               yaxis=dict(title="validation loss (nats per token)", range=[1.4, 4.0]))
    return {"rows": rows}


def main(part: Annotated[Literal["speedup", "robustness"], tyro.conf.Positional]) -> None:
    """Measure one part and write its JSON file."""
    result = measure_speedup() if part == "speedup" else measure_robustness()
    write_result(f"ngpt_{part}", f"ngpt {part}", **result)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
