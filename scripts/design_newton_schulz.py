"""Design coefficient tables for Newton-Schulz iterations.

    python -m scripts.design_newton_schulz optimal --lower 1e-3
    python -m scripts.design_newton_schulz radii --inner 0.1725 --outer 0.2

Prints the table as a flag of train_gpt.py, and compares the singular values that it leaves with those of the named tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from configs.notation import Triple, raise_if
from optim.newton_schulz import TABLES
from scripts import command

# An interval [lower, upper] with lower / upper above this is treated as a point: float64 cannot tell the minimax quintic
# from its limit there.
NEARLY_ONE_POINT = 1 - 5e-6


def compose(triples: Sequence[Triple], x: np.ndarray) -> np.ndarray:
    """Return p_k(... p_2(p_1(x))) with p_i(x) = a x + b x^3 + c x^5: singular values x after the iterations."""
    for a, b, c in triples:
        x = x * (a + x**2 * (b + x**2 * c))
    return x


def triples_for_steps(triples: Sequence[Triple], steps: int) -> list[Triple]:
    """Return one triple for each of `steps` iterations; the last triple is repeated."""
    return [triples[min(step, len(triples) - 1)] for step in range(steps)]


def output_range(triples: Sequence[Triple], lower: float, *, safety: float = 1.0, points: int = 20_001
                 ) -> tuple[float, float]:
    """Return the least and the greatest singular value after the iterations, for inputs in [lower, 1] / safety.

    Inputs are `points` samples, evenly spaced in the logarithm.
    """
    y = compose(triples, np.geomspace(lower, 1, points) / safety)
    return float(y.min()), float(y.max())


def format_table(triples: Sequence[Triple], safety: float = 1.0) -> str:
    """Return the notation that --optim.matrix.ns reads, coefficients to six decimals."""
    prefix = f"safety={safety:g};" if safety != 1 else ""
    return prefix + ";".join(",".join(f"{number:.6f}" for number in triple) for triple in triples)


# ---- Radii: quintics with chosen fixed points -----------------------------------------------------------------------


def largest_gammas(inner: float, outer: float) -> tuple[float, float]:
    """Return the largest gammas of `radii_quintic` for which p(x) <= 1 + outer, and for which p(x) >= 0, on [0, 1 + outer].

    Let alpha = (1 - inner)^2, rho = 1 + outer, beta = rho^2.
    Upper bound: p(x) <= rho, divided by rho - x, is gamma x (alpha - x^2)(x + rho) <= 1. The left side has one maximum on
    (0, alpha^0.5), at a root of its derivative, a cubic.
    Lower bound: p(x) >= 0, divided by x, is gamma (x^2 - alpha)(beta - x^2) <= 1. The left side is greatest where x^2 is the
    mean of alpha and beta, so gamma <= 4 / (beta - alpha)^2.
    Raises ValueError outside 0 < inner < 1, outer > 0.
    """
    raise_if(not (0 < inner < 1 and 0 < outer < np.inf),
             f"radii must have 0 < inner < 1 and outer > 0, got {inner:g} and {outer:g}")
    alpha, rho = (1 - inner) ** 2, 1 + outer
    roots = np.roots([-4, -3 * rho, 2 * alpha, rho * alpha])
    # The coefficients change sign once, so one root is positive (Descartes); it is the largest.
    x = roots.real.max()
    return 1 / (x * (alpha - x**2) * (x + rho)), 4 / (rho**2 - alpha) ** 2


def radii_quintic(inner: float, outer: float) -> Triple:
    """Return the quintic that is steepest at 0 among those with fixed points 0, 1 - inner, 1 + outer that map
    [0, 1 + outer] into itself.

    p(x) - x is an odd quintic whose five roots are known, so p(x) = x + gamma x (x^2 - (1 - inner)^2)(x^2 - (1 + outer)^2)
    with one free parameter gamma. The slope p'(0) = 1 + gamma (1 - inner)^2 (1 + outer)^2 grows with gamma, and both
    bounds on p are linear in gamma, so the smaller of `largest_gammas` is the answer. After F. L. Cesista, "Squeezing 1-2%
    efficiency gains out of Muon".
    """
    alpha, beta = (1 - inner) ** 2, (1 + outer) ** 2
    gamma = min(largest_gammas(inner, outer))
    return 1 + gamma * alpha * beta, -gamma * (alpha + beta), gamma


def radii_sequence(inners: Sequence[float], outer: float, steps: int, *, safety: float = 1.0) -> list[Triple]:
    """Return one radii quintic per step, all with the same outer radius, so that no iterate leaves [0, 1 + outer].

    inners: inner radii by step; the last is repeated. safety: each step takes p(x / safety). The peaks reach 1 + outer,
    a fixed point where the slope is large; without safety, rounding in bfloat16 carries a peak beyond it, and the next
    steps multiply the excess. Raises ValueError for no radius, no step, or safety below 1.
    """
    raise_if(not inners or steps < 1 or not 1 <= safety < np.inf,
             "radii needs at least one inner radius, steps >= 1 and safety >= 1, got "
             f"{len(inners)} radii, {steps} steps and safety {safety:g}")
    triples = triples_for_steps([radii_quintic(inner, outer) for inner in inners], steps)
    return [(a / safety, b / safety**3, c / safety**5) for a, b, c in triples]


# ---- Optimal: minimax quintics --------------------------------------------------------------------------------------


def minimax_quintic(lower: float, upper: float) -> Triple:
    """Return the odd quintic with the smallest maximal distance from 1 on [lower, upper], by Remez exchange.

    The error 1 - p is +E, -E, +E, -E at lower, q, r, upper, where p' = 0 at q and r (Amsel et al. 2025, arXiv 2505.16932).
    Raises ValueError unless 0 < lower <= upper.
    """
    raise_if(not 0 < lower <= upper < np.inf, f"an interval has 0 < lower <= upper, got [{lower:g}, {upper:g}]")
    if lower / upper > NEARLY_ONE_POINT:
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5  # the limit: p = 1 and p' = p'' = 0 at upper
    q, r, error, last_error = (3 * lower + upper) / 4, (lower + 3 * upper) / 4, 0.0, np.inf
    while abs(error - last_error) > 1e-14:
        # Solve a linear system for the quintic with errors of equal size and alternating sign at the four points.
        last_error, x = error, np.array([lower, q, r, upper])
        a, b, c, error = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1), np.ones(4)).tolist()
        # Exchange q and r for the roots of p'(x) = a + 3 b x^2 + 5 c x^4.
        root = np.sqrt(9 * b**2 - 20 * a * c)
        q, r = np.sqrt((-3 * b - root) / (10 * c)), np.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


def optimal_sequence(lower: float, steps: int, *, cushion: float = 0.0, safety: float = 1.0) -> list[Triple]:
    """Return a composition of minimax quintics for singular values in [lower, 1], each fitted to the image of the last.

    Without cushion and safety it is the best of all compositions (Amsel et al. 2025, arXiv 2505.16932).
    cushion: every step is fitted to an interval whose lower end is at least cushion times its upper end, and then scaled
    so that the image of the true interval is centred on 1; the first steps become less steep. safety: every step but the
    last takes p(x / safety), so that rounding may carry its input above the upper end. Raises ValueError for values out of
    range.
    """
    raise_if(not (0 < lower <= 1 and steps >= 1 and 0 <= cushion <= 1 and 1 <= safety < np.inf),
             "optimal needs 0 < lower <= 1, steps >= 1, 0 <= cushion <= 1 and safety >= 1, got "
             f"lower {lower:g}, {steps} steps, cushion {cushion:g} and safety {safety:g}")
    upper, triples = 1.0, []
    for step in range(steps):
        a, b, c = minimax_quintic(max(lower, cushion * upper), upper)
        ends = compose([(a, b, c)], np.array([lower, upper]))
        scale = 2 / ends.sum() if cushion * upper > lower else 1.0  # without the cushion, the image is centred already
        s = safety if step < steps - 1 else 1.0
        triples.append((float(scale * a / s), float(scale * b / s**3), float(scale * c / s**5)))
        lower = float(compose(triples[-1:], np.array([lower]))[0])
        upper = 2 - lower
    return triples


# ---- The command line -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """Settings of both designs."""

    steps: int = 5
    """Number of iterations."""
    lower: float = 1e-3
    """Smallest singular value, relative to the Frobenius norm, for which the table is designed or compared."""
    safety: float = 1.02
    """Divisor of each step's input, so that rounding cannot carry it beyond the interval that the step is made for."""


# tyro does not wrap the docstrings of subcommands: keep them below 80 columns.
@dataclass(frozen=True, slots=True, kw_only=True)
class Radii(Design):
    """Steepest quintics whose outputs never exceed 1 + outer."""

    inner: tuple[float, ...] = (0.1725,)
    """Inner radii by step, with a fixed point at 1 - inner; the last is repeated."""
    outer: float = 0.2
    """Outer radius of all steps, with a fixed point at 1 + outer."""

    def table(self) -> tuple[list[Triple], float]:
        """Return the triples, and a safety factor of 1 for the input's Frobenius norm, as 1 is far below 1 + outer."""
        return radii_sequence(self.inner, self.outer, self.steps, safety=self.safety), 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimal(Design):
    """Composed minimax quintics (Polar Express); the speedrun: --cushion 0.02."""

    cushion: float = 0.0
    """Each step is fitted to singular values above this share of its largest input."""

    def table(self) -> tuple[list[Triple], float]:
        """Return the triples, and the safety factor for the input's Frobenius norm: 1 is the end of the first interval."""
        return optimal_sequence(self.lower, self.steps, cushion=self.cushion, safety=self.safety), self.safety


def describe(triples: Sequence[Triple], safety: float, design: Radii | Optimal) -> str:
    """Return the flags for the table, and its output range beside those of the named tables after as many steps."""
    tables = {"this table": (triples, safety)}
    tables |= {name: (triples_for_steps(table.triples, design.steps), table.safety) for name, table in TABLES.items()}
    lines = [f'--optim.matrix.ns "{format_table(triples, safety)}" --optim.matrix.ns_steps {design.steps}', "",
             f"singular values after {design.steps} steps, for inputs in [{design.lower:g}, 1]:",
             f"{'table':>14} {'smallest':>9} {'largest':>9} {'slope at 0':>11}"]
    for name, (row, scale) in tables.items():
        smallest, largest = output_range(row, design.lower, safety=scale)
        slope = np.prod([a for a, _, _ in row]) / scale
        lines.append(f"{name:>14} {smallest:>9.3f} {largest:>9.3f} {slope:>11.0f}")
    return "\n".join(lines)


def main(design: Radii | Optimal) -> None:
    """Design a table and print it. Raises ValueError for radii or bounds that allow no table."""
    raise_if(not 0 < design.lower <= 1, f"lower must lie in (0, 1], got {design.lower:g}")
    triples, safety = design.table()
    print(describe(triples, safety, design))


if __name__ == "__main__":
    command(main, Radii | Optimal, __doc__)
