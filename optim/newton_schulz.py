"""Orthogonalisation by Newton-Schulz: the polar factor U V^T of G = U S V^T, by matrix products alone.

With A = X X^T, the iteration X <- a X + (b A + c A^2) X keeps U and V and maps each singular value x to the odd polynomial
p(x) = a x + b x^3 + c x^5. Repeated, it drives all singular values towards 1 (Kovarik 1970; Higham 2008; Bernstein &
Newhouse 2024, arXiv 2409.20325). Unlike an SVD it needs nothing but matrix products, which GPUs do fast in bfloat16.

Iterating on A alone and multiplying the polynomials into X once takes about half the time for n = 4m (float32 on a CPU),
but diverges in bfloat16 where singular values fall like 1/i.

Shapes: K matrices in a stack, m rows, n columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.notation import Triple, parse_table
from kernels.symmetric import gram_polynomial

LARGE_MATRIX_ELEMENTS = 2**18  # on CPUs, matrices of this size gain nothing from a batch, and lose the cache


@dataclass(frozen=True, slots=True)
class Table:
    """Coefficients of a Newton-Schulz iteration."""

    triples: tuple[Triple, ...]
    """(a, b, c) of each step; the last repeats if there are more steps."""
    safety: float
    """Inputs are scaled to Frobenius norm 1 / safety. Above 1 it keeps singular values that rounding lifts a little beyond 1
    inside the interval [0, 1] for which the coefficients were designed."""
    band: tuple[float, float] | None
    """Least and greatest singular value after 5 steps, or after all triples if there are more, for inputs in [3e-3, 1];
    measured. None: not measured."""
    source: str
    """Author and year, or the command that designed the coefficients."""


TABLES = {
    "quintic": Table(((3.4445, -4.7750, 2.0315),), 1.0, (0.68, 1.21), "Jordan et al. 2024, Muon"),
    "polar_express": Table(
        ((8.156555, -22.483293, 15.878770), (4.042930, -2.808917, 0.500018), (3.891668, -2.772484, 0.506065),
         (3.285754, -2.368129, 0.464490), (2.346541, -1.709783, 0.423236)),
        1.02, (0.85, 1.15), "Amsel et al. 2025, arXiv 2505.16932"),
    "convergent": Table(((2.0, -1.5, 0.5),), 1.0, (0.095, 1.002), "p(1) = 1, p'(1) = 0: converges, slowly"),
    "dion": Table(
        ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
         (2.8366, -3.0525, 1.2012)),
        1.0, (0.977, 1.146), "Microsoft's dion"),
    "radii": Table(
        ((4.170751, -8.255628, 4.089060), (4.160482, -8.198100, 4.055237), (4.118276, -7.964501, 3.918119),
         (3.943637, -7.045384, 3.382435), (3.308953, -4.303330, 1.834942)),
        1.0, (0.828, 1.201), "scripts/design_newton_schulz.py radii --inner .2925 .2907 .2832 .2503 .0977"),
    "anvil": Table(  # for 6 steps
        ((4.447394, -8.659283, 4.484454), (3.000338, -3.180036, 0.959299), (3.599774, -5.129962, 1.946241),
         (3.238755, -3.988313, 1.407364), (2.558665, -2.562643, 0.981593), (2.386658, -2.223182, 0.835163)),
        1.02, (0.997, 1.0125), "ANVIL, August 2026, modded-nanogpt's pull request 349"),
}


def coefficient_table(text: str) -> Table | None:
    """Return the table named `text`, or parse it as an inline table (configs/notation.py); None for "svd".

    Raises ValueError if it is neither.
    """
    if text == "svd" or text in TABLES:
        return TABLES.get(text)
    safety, triples = parse_table(text)
    return Table(triples, safety, None, "inline")


def orthogonalize(G_Kmn: Tensor, table: str | Table | None = "polar_express", *, steps: int = 5) -> Tensor:
    """Return the approximate polar factor of each matrix: (K, m, n) or (m, n) -> the same shape and dtype, a new tensor.

    `table` is a Table, a name in TABLES or an inline table; None or "svd" computes the exact polar factor. The iteration
    runs in bfloat16 on CUDA and in the input's dtype elsewhere. A zero matrix stays zero.
    """
    table = coefficient_table(table) if isinstance(table, str) else table
    if table is None:
        return orthogonalize_svd(G_Kmn)
    if G_Kmn.ndim == 2:
        return orthogonalize(G_Kmn[None], table, steps=steps)[0]
    if G_Kmn.device.type == "cpu" and len(G_Kmn) > 1 and G_Kmn[0].numel() >= LARGE_MATRIX_ELEMENTS:
        return torch.cat([orthogonalize(G_1mn, table, steps=steps) for G_1mn in G_Kmn.split(1)])
    # Transpose tall matrices: X X^T then has the smaller side, and every product costs less.
    is_tall = G_Kmn.size(-2) > G_Kmn.size(-1)
    X = G_Kmn.mT if is_tall else G_Kmn
    # Divide by the largest entry first, so that the squares in the norm neither overflow nor underflow.
    X = X / X.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    # The polynomials need singular values in [0, 1]. The Frobenius norm bounds the largest one and is cheap.
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * table.safety).clamp_min(1e-7)
    # bfloat16 is the fast type of a GPU's matrix units, and enough: each table's band around 1 is wider than its rounding.
    X = X.to(torch.bfloat16 if X.is_cuda else X.dtype)
    for i in range(steps):
        a, b, c = table.triples[min(i, len(table.triples) - 1)]
        X = torch.baddbmm(X, gram_polynomial(X, b, c), X, beta=a)
    return (X.mT if is_tall else X).to(G_Kmn.dtype)


def unit_length(unit: str, m: int, n: int) -> float:
    """Return the spectral norm of an m x n step at lr 1 in a unit; the field's learning-rate corrections by shape.

    Sources: configs.optim.Muon.unit.
    """
    return {"spectral": 1.0, "rms_operator": (m / n) ** 0.5, "at_least_one": max(1.0, m / n) ** 0.5,
            "match_adam": 0.2 * max(m, n) ** 0.5}[unit]


def orthogonalize_svd(G_Kmn: Tensor) -> Tensor:
    """Return the exact polar factor U V^T by an SVD in float64: the slow reference for `orthogonalize`.

    Directions whose singular value is below 1e-12 of the largest count as zero. The polar factor of a zero or rank-deficient
    matrix is not unique; this gives the one of least norm.
    """
    U, S, Vh = torch.linalg.svd(G_Kmn.double(), full_matrices=False)
    is_nonzero = S > 1e-12 * S.amax(dim=-1, keepdim=True)
    return ((U * is_nonzero.unsqueeze(-2)) @ Vh).to(G_Kmn.dtype)
