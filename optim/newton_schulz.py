"""Orthogonalization: the polar factor U V^T of G = U S V^T, by matrix products alone.

An odd polynomial p(x) = a x + b x^3 + c x^5 acts on the singular values when computed as X <- a X + (b A + c A^2) X with
A = X X^T; iterating it drives every singular value towards 1 and never touches U and V (Kovarik 1970; Higham 2008;
Bernstein & Newhouse 2024, arXiv 2409.20325). Iterating on A alone and applying the product of the polynomials once takes
about half the time for n = 4m (float32 on a CPU), but diverges in bfloat16 where singular values fall like 1/i.
Shapes: K stacked matrices, m rows, n columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.notation import Triple, parse_table
from kernels.symmetric import gram_polynomial

LARGE_MATRIX_ELEMENTS = 2**18  # on CPUs, matrices of this size gain nothing from a batch, and lose the cache


@dataclass(frozen=True, slots=True)
class Table:
    """Coefficients of a Newton-Schulz iteration, one triple a step; the last repeats. Inputs are scaled to Frobenius
    norm 1 / safety. `band` bounds the singular values that 5 steps give for inputs in [3e-3, 1] (measured; None: not)."""

    triples: tuple[Triple, ...]
    safety: float
    band: tuple[float, float] | None
    source: str


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
}


def coefficient_table(text: str) -> Table | None:
    """The table of a name, or of the inline notation of configs/notation.py; None for `svd`. Raises ValueError otherwise."""
    if text == "svd" or text in TABLES:
        return TABLES.get(text)
    safety, triples = parse_table(text)
    return Table(triples, safety, None, "inline")


def orthogonalize(G_Kmn: Tensor, table: str | Table | None = "polar_express", *, steps: int = 5) -> Tensor:
    """Approximate polar factor of each matrix: (K, m, n) or (m, n) -> the same shape and dtype, a new tensor.

    Computed in bfloat16 on CUDA, in the input's precision elsewhere; tall matrices are transposed, so that A is the
    smaller Gram matrix. Zero stays zero. `table` is a Table, a key of TABLES, an inline table, or None (`svd`) for the exact
    twin.
    """
    table = coefficient_table(table) if isinstance(table, str) else table
    if table is None:
        return orthogonalize_svd(G_Kmn)
    if G_Kmn.ndim == 2:
        return orthogonalize(G_Kmn[None], table, steps=steps)[0]
    if G_Kmn.device.type == "cpu" and len(G_Kmn) > 1 and G_Kmn[0].numel() >= LARGE_MATRIX_ELEMENTS:
        return torch.cat([orthogonalize(G_1mn, table, steps=steps) for G_1mn in G_Kmn.split(1)])
    tall = G_Kmn.size(-2) > G_Kmn.size(-1)
    X = G_Kmn.mT if tall else G_Kmn
    # First by the largest entry, so that the squares in the norm neither over- nor underflow.
    X = X / X.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * table.safety).clamp_min(1e-7)
    X = X.to(torch.bfloat16 if X.is_cuda else X.dtype)
    for i in range(steps):
        a, b, c = table.triples[min(i, len(table.triples) - 1)]  # the last triple repeats
        X = torch.baddbmm(X, gram_polynomial(X, b, c), X, beta=a)
    return (X.mT if tall else X).to(G_Kmn.dtype)


def unit_length(unit: str, m: int, n: int) -> float:
    """Spectral norm of an m x n step of size 1 in a unit: the field's lr corrections (configs.optim.Muon.unit)."""
    return {"spectral": 1.0, "rms_operator": (m / n) ** 0.5, "at_least_one": max(1.0, m / n) ** 0.5,
            "match_adam": 0.2 * max(m, n) ** 0.5}[unit]


def orthogonalize_svd(G_Kmn: Tensor) -> Tensor:
    """The exact polar factor U V^T over the non-zero singular values, by SVD in float64: slow twin of `orthogonalize`.

    Directions with singular value below 1e-12 of the largest count as zero, so that zero and rank-deficient matrices
    have one answer: the dual of least norm.
    """
    U, S, Vh = torch.linalg.svd(G_Kmn.double(), full_matrices=False)
    keep = S > 1e-12 * S.amax(dim=-1, keepdim=True)
    return ((U * keep.unsqueeze(-2)) @ Vh).to(G_Kmn.dtype)
