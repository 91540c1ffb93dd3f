"""Manifold Muon: how tangent its steps are after so many iterations, and what they cost beside Muon's.

    python -m benchmarks.stiefel_step

Random orthogonal weights and Gaussian gradients of the shapes of a GPT; rms(A^T W + W^T A) / rms(A) after k iterations of
the accelerated reweighted least squares, of the same without acceleration, and of gradient ascent on the dual
(step rms(G) (1 - k / K), the sources' scheme); then along a training run, warm-started. Writes stiefel_step.json.
"""

import statistics
import time
from pathlib import Path

import torch
import tyro

from configs.cli import parse
from configs.groups import Group
from data.run.environment import describe_environment
from data.run.folder import write_json
from optim.newton_schulz import orthogonalize_svd
from optim.rules import Hyper, build_rule
from optim.rules.stiefel import Split, residual, solve
from train_gpt import Trainer

HERE = Path(__file__).resolve().parent
SHAPES = ((128, 128), (512, 128), (160, 128), (768, 768), (3072, 768))
COUNTS = (1, 5, 10, 20)
HYPER = Hyper(*(torch.tensor(x) for x in (0.05, 0.0, 0.9, 1.0)))


def matrices(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthogonal weights and a gradient with largest entry 1, float64."""
    rng = torch.Generator().manual_seed(seed)
    W, G = (torch.randn(1, *shape, generator=rng, dtype=torch.float64) for _ in range(2))
    return orthogonalize_svd(W), G / G.abs().max()


def ascent(W: torch.Tensor, G: torch.Tensor, count: int) -> torch.Tensor:
    """The step after gradient ascent on the dual, exact polar factors."""
    L, size = -(W.mT @ G + G.mT @ W) / 4, G.square().mean().sqrt()
    for k in range(count):
        A = orthogonalize_svd(G + 2 * W @ L)
        L = L - size * (1 - k / count) * (W.mT @ A + A.mT @ W)
    return orthogonalize_svd(G + 2 * W @ L)


def plain(W: torch.Tensor, G: torch.Tensor, count: int) -> torch.Tensor:
    """Reweighted least squares without acceleration."""
    split, S = Split.at(W, G), torch.zeros(1, W.size(-1), W.size(-1), dtype=W.dtype)
    for _ in range(count):
        S = split.next(S)
    return split.primal(S)


def residuals(shape: tuple[int, int]) -> dict[str, list[float]]:
    """Of each method after each count of iterations."""
    W, G = matrices(shape)
    start = torch.zeros(1, shape[1], shape[1], dtype=W.dtype)
    methods = {"accelerated": lambda k: solve(W, G, start, k)[0], "plain": lambda k: plain(W, G, k),
               "ascent": lambda k: ascent(W, G, k)}
    return {name: [residual(W, method(k)).item() for k in COUNTS] for name, method in methods.items()}


def milliseconds(group: Group, shape: tuple[int, int]) -> float:
    """Median of three directions after one."""
    rule, (W, G) = build_rule(group), (x.float() for x in matrices(shape))
    state, found = rule.init_state(W), []
    for _ in range(4):
        began = time.perf_counter()
        rule.direction(W, G, state, HYPER)
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found[1:])


def training(steps: int) -> dict[str, list[float]]:
    """Along `bytes`: at each step the largest distance of a singular value from 1, and the largest residual."""
    flags = ["--optim.matrix.rule", "stiefel", "--optim.matrix.dual_steps", "6", "--model.no_zero_init_projections",
             "--run.device", "cpu", "--train.steps", str(steps)]
    trainer = Trainer(parse(["bytes", *flags]))
    batches, found = trainer.start_batches(), {"singular_values": [], "residuals": []}
    banks = [bank for bank in trainer.optimizer.banks if bank.group.role == "matrix"]
    for _ in range(steps):
        before = [bank.weights.clone() for bank in banks]
        lr = trainer.run.optim.matrix.lr * trainer.schedule.values(trainer.progress.step).lr
        trainer.step(batches)
        # W' is the polar factor of W - lr A, whose other factor is (1 + lr^2 A^T A)^1/2: A to second order in lr.
        moves = [(w - bank.weights) / lr for w, bank in zip(before, banks, strict=True)]
        found["residuals"].append(max(residual((w + bank.weights) / 2, a).max().item()
                                      for w, bank, a in zip(before, banks, moves, strict=True)))
        found["singular_values"].append(max((torch.linalg.svdvals(bank.weights) - 1).abs().max().item() for bank in banks))
    batches.close()
    return found


def main(steps: int = 60) -> None:
    """Measure and write down."""
    environment = describe_environment()
    environment.pop("variables")
    shapes = {f"{m} x {n}": {"residuals": residuals((m, n)) if m <= 512 else None,
                             "stiefel_ms": milliseconds(Group(rule="stiefel", dual_steps=6), (m, n)),
                             "muon_ms": milliseconds(Group(rule="steepest"), (m, n))} for m, n in SHAPES}
    run = training(steps)
    write_json(HERE / "stiefel_step.json", {
        "command": f"python -m benchmarks.stiefel_step --steps {steps}", "environment": environment,
        "threads": torch.get_num_threads(), "iterations": COUNTS, "shapes": shapes,
        "training": {"steps": steps, "largest_singular_value_error": max(run["singular_values"]),
                     "residual_median": statistics.median(run["residuals"]), "residual_largest": max(run["residuals"]),
                     "residuals": run["residuals"]}})
    for name, found in shapes.items():
        print(name, found)
    print({name: (statistics.median(values), max(values)) for name, values in run.items()})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
