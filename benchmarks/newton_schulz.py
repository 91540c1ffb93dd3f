"""Newton-Schulz on the small Gram matrix beside the plain iteration: time and accuracy by shape, float32 on a CPU.

    python -m benchmarks.newton_schulz [--repeats 3]

The plain form multiplies the m x n matrix X at each step. The Gram form keeps R = X X^T and the product Q of the steps'
polynomials, both m x m, and multiplies X once: Q X; restarted, it forms X = Q X and R anew after some steps. Accuracy is
the distance from the plain form in float64, relative to its Frobenius norm. Writes newton_schulz.json.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import Tensor

from data.run.environment import describe_environment
from data.run.folder import write_json
from optim.newton_schulz import TABLES, Table, orthogonalize

ROWS = 768
ASPECTS = (1, 2, 4)
SPECTRA = ("gaussian", "1/i", "1/i^2", "rank 1/4")
POLAR_EXPRESS = TABLES["polar_express"]
RESTART_AFTER = 3


@dataclass
class Timing:
    """Arguments of the benchmark."""

    repeats: int = 3
    """Timed calls of each form and shape, after one that is not counted."""


def gram_orthogonalize(G_mn: Tensor, table: Table = POLAR_EXPRESS, *, steps: int = 5, restart_after: int = 0) -> Tensor:
    """The plain iteration's result in exact arithmetic, for m <= n, in the input's precision. restart_after 0: never."""
    X = G_mn / (G_mn.norm() * table.safety)
    triples = table.steps(steps)
    cut = restart_after or steps
    for part in (triples[:cut], triples[cut:]):
        X = _apply(X, part) if part else X
    return X


def _apply(X: Tensor, triples: list[tuple[float, float, float]]) -> Tensor:
    """P_k ... P_1 X with P = a + b R + c R^2 and R <- P R P; all are polynomials of one symmetric matrix and commute."""
    R = X @ X.mT
    Q: Tensor | None = None
    for step, (a, b, c) in enumerate(triples):
        P = torch.addmm(R, R, R, beta=b, alpha=c)
        P.diagonal().add_(a)
        Q = P if Q is None else P @ Q
        if step < len(triples) - 1:
            R = P @ (R @ P)
    return Q @ X


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": orthogonalize,
    "gram": gram_orthogonalize,
    "gram, restarted": partial(gram_orthogonalize, restart_after=RESTART_AFTER),
}


def matrix(spectrum: str, m: int, n: int) -> Tensor:
    """A float64 matrix (m, n): Gaussian, or with the singular values that the name says."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(m, n, generator=generator, dtype=torch.float64)
    if spectrum == "gaussian":
        return G
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    i = torch.arange(1, m + 1, dtype=torch.float64)
    values = {"1/i": 1 / i, "1/i^2": i**-2, "rank 1/4": (i <= m / 4).double()}[spectrum]
    return (U * values) @ Vh


def errors(m: int, n: int) -> dict[str, dict[str, dict[str, float]]]:
    """By spectrum, precision and form: relative distance from the plain form in float64."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for spectrum in SPECTRA:
        G = matrix(spectrum, m, n)
        exact = orthogonalize(G)
        found[spectrum] = {
            str(dtype).removeprefix("torch."): {
                name: ((form(G.to(dtype)).double() - exact).norm() / exact.norm()).item() for name, form in FORMS.items()}
            for dtype in (torch.float32, torch.bfloat16)}
    return found


def seconds(m: int, n: int, repeats: int) -> dict[str, float]:
    """Median seconds of each form on one float32 Gaussian, in turns."""
    G = matrix("gaussian", m, n).float()
    taken: dict[str, list[float]] = {name: [] for name in FORMS}
    for repeat in range(repeats + 1):
        for name, form in FORMS.items():
            began = time.perf_counter()
            form(G)
            if repeat:
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def main(args: Timing) -> None:
    """Measure, write and print."""
    shapes = [(ROWS, ROWS * aspect) for aspect in ASPECTS]
    result = {f"{m} x {n}": {"median_seconds": seconds(m, n, args.repeats), "relative_error": errors(m // 4, n // 4)}
              for m, n in shapes}
    environment = describe_environment()
    environment.pop("variables")
    write_json(Path(__file__).with_suffix(".json"), {
        "command": "python -m benchmarks.newton_schulz", "environment": environment, "threads": torch.get_num_threads(),
        "error_shapes": "a quarter of the timed sides", "restart_after_steps": RESTART_AFTER, "shapes": result})
    for shape, found in result.items():
        times = ", ".join(f"{name} {value * 1000:.0f} ms" for name, value in found["median_seconds"].items())
        print(f"{shape}: {times}")
        for spectrum, by_dtype in found["relative_error"].items():
            for dtype, by_form in by_dtype.items():
                print(f"    {spectrum:>9} {dtype:>8}: " + ", ".join(f"{name} {e:.1e}" for name, e in by_form.items()))


if __name__ == "__main__":
    main(tyro.cli(Timing, description=__doc__))
