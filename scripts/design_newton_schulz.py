"""Coefficient tables for Newton-Schulz iterations: `python -m scripts.design_newton_schulz optimal --lower 1e-3`.

Prints a table as `--optim.matrix.ns` reads it, and the singular values that it gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from configs.notation import Triple
from optim.newton_schulz import TABLES
from scripts import command

NEARLY_ONE_POINT = 1 - 5e-6  # lower / upper from which float64 cannot tell the minimax quintic from its limit


def compose(triples: Sequence[Triple], x: np.ndarray) -> np.ndarray:
    """p_k(... p_2(p_1(x))): what the steps make of singular values x."""
    for a, b, c in triples:
        x = x * (a + x**2 * (b + x**2 * c))
    return x


def first_triples(triples: Sequence[Triple], steps: int) -> list[Triple]:
    """One triple a step; the last repeats."""
    return [triples[min(step, len(triples) - 1)] for step in range(steps)]


def band(triples: Sequence[Triple], lower: float, *, safety: float = 1.0, points: int = 20_001) -> tuple[float, float]:
    """Least and greatest composed value over relative singular values in [lower, 1], sampled log-evenly."""
    y = compose(triples, np.geomspace(lower, 1, points) / safety)
    return float(y.min()), float(y.max())


def as_inline(triples: Sequence[Triple], safety: float = 1.0) -> str:
    """The notation that `--optim.matrix.ns` reads, coefficients to six decimals."""
    head = f"safety={safety:g};" if safety != 1 else ""
    return head + ";".join(",".join(f"{number:.6f}" for number in triple) for triple in triples)


# ---- Radii ----------------------------------------------------------------------------------------------------------


def steepest_gamma(inner: float, outer: float) -> tuple[float, float]:
    """Greatest gammas of `radii_quintic` that keep the peak at or below 1 + outer, and the trough at or above 0.

    With alpha = (1 - inner)^2, rho = 1 + outer, beta = rho^2: p(x) <= rho on [0, rho] divides by rho - x into
    gamma x (alpha - x^2)(x + rho) <= 1, whose left side has one maximum on (0, alpha^.5), a root of its derivative's cubic;
    p(x) >= 0 divides by x into gamma (x^2 - alpha)(beta - x^2) <= 1, greatest half way: 4 / (beta - alpha)^2.
    Raises ValueError outside 0 < inner < 1, outer > 0.
    """
    if not (0 < inner < 1 and 0 < outer < np.inf):
        raise ValueError(f"radii must have 0 < inner < 1 and outer > 0, got {inner:g} and {outer:g}")
    alpha, rho = (1 - inner) ** 2, 1 + outer
    roots = np.roots([-4, -3 * rho, 2 * alpha, rho * alpha])
    x = roots.real.max()  # one sign change: a single positive root, beside the negative ones
    return 1 / (x * (alpha - x**2) * (x + rho)), 4 / (rho**2 - alpha) ** 2


def radii_quintic(inner: float, outer: float) -> Triple:
    """The steepest quintic at 0 with fixed points 0, 1 - inner, 1 + outer that maps [0, 1 + outer] into itself.

    p(x) - x is an odd quintic with five known roots, so p(x) = x + gamma x (x^2 - (1 - inner)^2)(x^2 - (1 + outer)^2): one
    parameter is free, and p'(0) = 1 + gamma (1 - inner)^2 (1 + outer)^2 grows with it. Both bounds of `steepest_gamma`
    are linear in gamma, so the smaller is the answer. After F. L. Cesista, "Squeezing 1-2% efficiency gains out of Muon".
    """
    alpha, beta = (1 - inner) ** 2, (1 + outer) ** 2
    gamma = min(steepest_gamma(inner, outer))
    return 1 + gamma * alpha * beta, -gamma * (alpha + beta), gamma


def radii_sequence(inners: Sequence[float], outer: float, steps: int, *, safety: float = 1.0) -> list[Triple]:
    """One radii quintic a step, all of one outer radius, so that no iterate leaves [0, 1 + outer]; the last repeats.

    safety: each step takes p(x / safety). 1 + outer, where peaks end, is a fixed point of great slope: without it rounding
    in bfloat16 carries a peak across, and the next steps multiply the excess. Raises ValueError for no step or safety < 1.
    """
    if not inners or steps < 1 or not 1 <= safety < np.inf:
        raise ValueError(f"radii needs an inner radius, a step and safety >= 1, got {len(inners)}, {steps} and {safety:g}")
    found = first_triples([radii_quintic(inner, outer) for inner in inners], steps)
    return [(a / safety, b / safety**3, c / safety**5) for a, b, c in found]


# ---- Optimal --------------------------------------------------------------------------------------------------------


def minimax_quintic(lower: float, upper: float) -> Triple:
    """The odd quintic nearest to 1 in the worst place of [lower, upper], by Remez exchange.

    Its error is +E, -E, +E, -E at lower, q, r, upper, q and r where p' = 0 (Amsel et al. 2025, arXiv 2505.16932).
    Raises ValueError unless 0 < lower <= upper.
    """
    if not 0 < lower <= upper < np.inf:
        raise ValueError(f"an interval has 0 < lower <= upper, got [{lower:g}, {upper:g}]")
    if lower / upper > NEARLY_ONE_POINT:
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    q, r, error, before = (3 * lower + upper) / 4, (lower + 3 * upper) / 4, 0.0, np.inf
    while abs(error - before) > 1e-14:
        before, x = error, np.array([lower, q, r, upper])
        a, b, c, error = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1), np.ones(4)).tolist()
        root = np.sqrt(9 * b**2 - 20 * a * c)
        q, r = np.sqrt((-3 * b - root) / (10 * c)), np.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


def optimal_sequence(lower: float, steps: int, *, cushion: float = 0.0, safety: float = 1.0) -> list[Triple]:
    """Greedy composition of minimax quintics for singular values in [lower, 1]: with neither cushion nor safety the best
    of all compositions (Amsel et al. 2025, arXiv 2505.16932).

    cushion: no step is fitted to less than cushion times its upper end, then rescaled so that the image of the true
    interval is centred on 1: gentler first steps. safety: every step but the last takes p(x / safety), so that rounding
    may carry its input above the upper end. Raises ValueError for values outside their ranges.
    """
    if not (0 < lower <= 1 and steps >= 1 and 0 <= cushion <= 1 and 1 <= safety < np.inf):
        raise ValueError("optimal needs 0 < lower <= 1, steps >= 1, 0 <= cushion <= 1 and safety >= 1, got "
                         f"{lower:g}, {steps}, {cushion:g} and {safety:g}")
    upper, triples = 1.0, []
    for step in range(steps):
        a, b, c = minimax_quintic(max(lower, cushion * upper), upper)
        ends = compose([(a, b, c)], np.array([lower, upper]))
        scale = 2 / ends.sum() if cushion * upper > lower else 1.0
        s = safety if step < steps - 1 else 1.0
        triples.append((float(scale * a / s), float(scale * b / s**3), float(scale * c / s**5)))
        lower = float(compose(triples[-1:], np.array([lower]))[0])
        upper = 2 - lower
    return triples


# ---- The command line -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What both designs share."""

    steps: int = 5
    """Iterations."""
    lower: float = 1e-3
    """Least singular value, relative to the Frobenius norm, that the table is designed or judged for."""
    safety: float = 1.02
    """Each step's input is divided by this, so that rounding cannot carry it beyond the map's range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Radii(Design):
    """Steepest quintics with fixed points 0, 1 - inner and 1 + outer; no singular value ever exceeds 1 + outer."""

    inner: tuple[float, ...] = (0.1725,)
    """Inner radii, one a step; the last repeats."""
    outer: float = 0.2
    """Outer radius, of all steps."""

    def table(self) -> tuple[list[Triple], float]:
        """The triples, and the safety factor of their inputs' Frobenius norm: norm 1 is far below 1 + outer."""
        return radii_sequence(self.inner, self.outer, self.steps, safety=self.safety), 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimal(Design):
    """Minimax quintics, composed (Polar Express, Amsel et al. 2025, arXiv 2505.16932). The speedrun's: --cushion 0.02."""

    cushion: float = 0.0
    """No step is fitted to less than so much of its interval's upper end."""

    def table(self) -> tuple[list[Triple], float]:
        """The triples, and the safety factor of their inputs' Frobenius norm: norm 1 is the end of the map's range."""
        return optimal_sequence(self.lower, self.steps, cushion=self.cushion, safety=self.safety), self.safety


def describe(triples: Sequence[Triple], safety: float, design: Radii | Optimal) -> str:
    """The table, how to use it, and its band beside those of the named tables after as many steps."""
    rows = {"this table": (triples, safety)}
    rows |= {name: (first_triples(table.triples, design.steps), table.safety) for name, table in TABLES.items()}
    lines = [f'--optim.matrix.ns "{as_inline(triples, safety)}" --optim.matrix.ns_steps {design.steps}', "",
             f"{'':>14}  least  greatest  slope at 0   (singular values in [{design.lower:g}, 1], {design.steps} steps)"]
    for name, (row, scale) in rows.items():
        low, high = band(row, design.lower, safety=scale)
        slope = np.prod([a for a, _, _ in row]) / scale
        lines.append(f"{name:>14} {low:6.3f} {high:9.3f} {slope:11.0f}")
    return "\n".join(lines)


def main(design: Radii | Optimal) -> None:
    """Design and print. Raises ValueError for radii or bounds that allow no table."""
    if not 0 < design.lower <= 1:
        raise ValueError(f"lower must lie in (0, 1], got {design.lower:g}")
    triples, safety = design.table()
    print(describe(triples, safety, design))


if __name__ == "__main__":
    command(main, Radii | Optimal, __doc__)
