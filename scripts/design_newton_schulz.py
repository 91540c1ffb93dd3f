"""Coefficient tables for Newton-Schulz iterations: `python -m scripts.design_newton_schulz optimal --lower 1e-3`.

Prints a table as `--optim.matrix.ns` reads it, and the singular values that it gives; --figure draws the composed map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from configs.cli import fail
from configs.notation import Triple
from data.files import replacing
from optim.newton_schulz import TABLES, Table
from scripts.lab.polynomials import as_inline, band, compose, optimal_sequence, radii_sequence

LEAST_DRAWN = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What both designs share."""

    steps: int = 5
    """Iterations."""
    lower: float = 1e-3
    """Least singular value, relative to the Frobenius norm, that the table is designed or judged for."""
    safety: float = 1.02
    """Each step's input is divided by this, so that rounding cannot carry it beyond the map's range."""
    figure: Path | None = None
    """Draw the composed map to this file: .html, or .png, .svg or .pdf (with the package kaleido and a Chromium)."""


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


def first_steps(table: Table, count: int) -> list[Triple]:
    """The triples of so many steps: the last repeats."""
    return [table.triples[min(i, len(table.triples) - 1)] for i in range(count)]


def describe(triples: Sequence[Triple], safety: float, design: Radii | Optimal) -> str:
    """The table, how to use it, and its band beside those of the named tables after as many steps."""
    rows = {"this table": (triples, safety)}
    rows |= {name: (first_steps(table, design.steps), table.safety) for name, table in TABLES.items()}
    lines = [f'--optim.matrix.ns "{as_inline(triples, safety)}" --optim.matrix.ns_steps {design.steps}', "",
             f"{'':>14}  least  greatest  slope at 0   (singular values in [{design.lower:g}, 1], {design.steps} steps)"]
    for name, (row, scale) in rows.items():
        low, high = band(row, design.lower, safety=scale)
        slope = np.prod([a for a, _, _ in row]) / scale
        lines.append(f"{name:>14} {low:6.3f} {high:9.3f} {slope:11.0f}")
    return "\n".join(lines)


def draw(triples: Sequence[Triple], safety: float, design: Radii | Optimal) -> None:
    """The composed map beside Jordan's quintic, and the band over [s, 1] against s, in design.figure.

    Raises ValueError for an ending that is no figure's, or where kaleido or its browser is missing.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    x = np.geomspace(LEAST_DRAWN, 1, 4001)
    figure = make_subplots(1, 2, subplot_titles=("composed map", "band over [s, 1]"))
    quintic = first_steps(TABLES["quintic"], design.steps)
    for name, row, scale, colour in [("quintic", quintic, 1.0, "#999"), ("this table", triples, safety, "#06c")]:
        y = compose(row, x / scale)
        figure.add_scatter(x=x, y=y, name=name, line_color=colour, row=1, col=1)
        for ends in (np.minimum.accumulate(y[::-1])[::-1], np.maximum.accumulate(y[::-1])[::-1]):
            figure.add_trace(go.Scatter(x=x, y=ends, line_color=colour, showlegend=False), row=1, col=2)
    figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.update_xaxes(title_text="relative singular value", col=1)
    figure.update_xaxes(title_text="s", col=2)
    figure.update_yaxes(range=[0, 1.3])
    figure.add_hline(y=1, line_dash="dot", line_width=1)
    figure.update_layout(template="plotly_white", width=1000, height=420, margin_t=40, legend_x=0.02, legend_y=0.98)
    _write(figure, design.figure)


def _write(figure: object, path: Path) -> None:
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("html", "png", "svg", "pdf"):
        raise ValueError(f"cannot draw {path}: its name must end with .html, .png, .svg or .pdf")
    try:
        with replacing(path) as aside:
            if kind == "html":
                figure.write_html(aside, include_plotlyjs="cdn")
            else:
                figure.write_image(aside, format=kind, scale=2)
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"cannot draw {path} ({str(error).strip().splitlines()[0]}); .html needs no browser") from None


def main(design: Radii | Optimal) -> None:
    """Design, print and, where asked, draw. Raises ValueError for radii or bounds that allow no table."""
    if not 0 < design.lower <= 1:
        raise ValueError(f"lower must lie in (0, 1], got {design.lower:g}")
    triples, safety = design.table()
    print(describe(triples, safety, design))
    if design.figure:
        draw(triples, safety, design)


if __name__ == "__main__":
    try:
        main(tyro.cli(Radii | Optimal, description=__doc__))
    except ValueError as error:
        fail(str(error))
