"""Norms on tensors, each with the three functions that steepest descent needs (Bernstein & Newhouse 2024, arXiv 2409.20325).

    dual(G)       argmax { <G, A> : ||A|| = 1 }, the direction of steepest descent
    project(W)    nearest point of the unit ball { ||W|| <= 1 }
    size(W)       ||W||

Shapes: K stacked matrices G_Kmn and W_Kmn with m = outputs and n = inputs; sizes are (K,). A vector is a matrix of one row;
its RMS norm is `Row`. A unit multiplies dual and ball by a length that depends only on the shape: the field's learning-rate
corrections. `scope` is the finest piece of a tensor whose dual can be computed alone: an element, a row or a matrix. The
sharded optimizer cuts tensors only between such pieces.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from optim.constraint import Scope
from optim.newton_schulz import orthogonalize, unit_length

TINY = torch.finfo(torch.float32).tiny


class Norm(Protocol):
    """Interface of a norm."""

    scope: Scope

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """Return the tensor A of size 1 that maximises <G, A>, a new tensor of G's dtype; zero where G is zero."""

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Return the nearest tensor of size at most 1, in Frobenius distance; a new tensor."""

    def size(self, W_Kmn: Tensor) -> Tensor:
        """Return ||W|| of each matrix: (K, m, n) -> (K,)."""


def _normalise(G: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return G divided by its Euclidean norm along `dim`; zero stays zero."""
    # First by the largest entry, so that the squares in the norm neither overflow nor underflow.
    G = G / G.abs().amax(dim=dim, keepdim=True).clamp_min(TINY)
    return G / G.norm(dim=dim, keepdim=True).clamp_min(TINY)


@dataclass(frozen=True, slots=True)
class Spectral:
    """Largest singular value, ||W|| = sigma_max / scale; the dual is scale * U V^T of G = U S V^T.

    scale by unit: `spectral` 1; `rms_operator` (m/n)^.5, which makes it the RMS -> RMS operator norm (Bernstein & Newhouse
    2024; Large et al. 2024, arXiv 2405.14813); `at_least_one` max(1, m/n)^.5 (Jordan 2024); `match_adam` .2 max(m, n)^.5,
    which gives the step about Adam's RMS (Liu et al. 2025, arXiv 2502.16982).
    """

    unit: Literal["rms_operator", "spectral", "at_least_one", "match_adam"] = "spectral"
    """Unit of the norm, see above."""
    table: str = "polar_express"
    """Newton-Schulz coefficients (optim/newton_schulz.py); "svd": exact."""
    steps: int = 5
    """Newton-Schulz iterations."""
    scope: Scope = "matrix"

    def scale(self, m: int, n: int) -> float:
        """Return the spectral norm of an m x n tensor of size 1."""
        return unit_length(self.unit, m, n)

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """Return scale * U V^T, approximately unless the table is "svd"."""
        return orthogonalize(G_Kmn, self.table, steps=self.steps).mul_(self.scale(*G_Kmn.shape[-2:]))

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Return W with singular values clipped at `scale`."""
        U, S, Vh = torch.linalg.svd(W_Kmn, full_matrices=False)
        return (U * S.clamp_max(self.scale(*W_Kmn.shape[-2:])).unsqueeze(-2)) @ Vh

    def size(self, W_Kmn: Tensor) -> Tensor:
        """Return sigma_max / scale, float32, as the root of the largest eigenvalue of the smaller Gram matrix; NaN for a
        matrix that is not finite."""
        W = W_Kmn.mT if W_Kmn.size(-2) > W_Kmn.size(-1) else W_Kmn
        # Divided by the largest entry, so that no square overflows; eigvalsh would raise for what is not finite.
        largest = W.abs().amax(dim=(-2, -1), keepdim=True)
        W = torch.where(largest.isfinite(), W / largest.clamp_min(TINY), 0)
        top = torch.linalg.eigvalsh((W @ W.mT).float())[..., -1]
        return top.clamp_min(0).sqrt() * largest[..., 0, 0] / self.scale(*W_Kmn.shape[-2:])


@dataclass(frozen=True, slots=True)
class Row:
    """Largest RMS of a row, max_i (mean_j W_ij^2)^.5: the l1 -> RMS operator norm of an embedding with one row per token.

    Rows of tokens that a batch does not contain have no gradient, and their dual is zero.
    """

    scope: Scope = "row"

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """Return G with every row scaled to RMS 1."""
        return _normalise(G_Kmn, -1).mul_(G_Kmn.size(-1) ** 0.5)

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Return W with rows above RMS 1 scaled to RMS 1."""
        return W_Kmn / W_Kmn.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1)

    def size(self, W_Kmn: Tensor) -> Tensor:
        """Return the largest RMS of a row."""
        return W_Kmn.square().mean(dim=-1).sqrt().amax(dim=-1)


@dataclass(frozen=True, slots=True)
class Column:
    """Largest RMS of a column, max_j (mean_i W_ij^2)^.5: `Row` of the transpose."""

    scope: Scope = "matrix"  # no finer: a column has an element of every row

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """Return G with every column scaled to RMS 1."""
        return Row().dual(G_Kmn.mT).mT

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Return W with columns above RMS 1 scaled to RMS 1."""
        return Row().project(W_Kmn.mT).mT

    def size(self, W_Kmn: Tensor) -> Tensor:
        """Return the largest RMS of a column."""
        return Row().size(W_Kmn.mT)


@dataclass(frozen=True, slots=True)
class Sign:
    """Largest absolute entry, max |W_ij|: the l1 -> l-infinity operator norm, with dual sign(G) (Bernstein et al. 2018)."""

    scope: Scope = "element"

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """Return sign(G)."""
        return G_Kmn.sign()

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Return W clipped to [-1, 1]."""
        return W_Kmn.clamp(-1, 1)

    def size(self, W_Kmn: Tensor) -> Tensor:
        """Return max |W_ij|."""
        return W_Kmn.abs().amax(dim=(-2, -1))


@dataclass(frozen=True, slots=True)
class FanIn:
    """Another norm times the number of inputs, ||W|| = n ||W||_norm: steps and balls shrink as a layer gets more inputs.

    Inputs are then measured by their mean instead of their sum: `Sign` becomes the norm mean |x| -> max |y|, `Column`
    mean |x| -> RMS, `Row` RMS -> max |y|. Used for the last layer in Scion (Pethick et al. 2025, arXiv 2502.07529).
    """

    norm: Norm
    """Norm to be multiplied."""

    @property
    def scope(self) -> Scope:
        """Finest piece whose dual can be computed alone: the norm's, but at least a row, because n must be known."""
        return "row" if self.norm.scope == "element" else self.norm.scope

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """Return the norm's dual / n."""
        return self.norm.dual(G_Kmn) / G_Kmn.size(-1)

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Return the projection onto the norm's ball of radius 1/n."""
        return self.norm.project(W_Kmn * W_Kmn.size(-1)) / W_Kmn.size(-1)

    def size(self, W_Kmn: Tensor) -> Tensor:
        """Return n ||W||_norm."""
        return self.norm.size(W_Kmn) * W_Kmn.size(-1)


@dataclass(frozen=True, slots=True)
class Frobenius:
    """Euclidean norm of all entries, ||W|| = ||W||_F / scale; the dual is the normalised gradient.

    scale by unit: `plain` 1; `rms` (m n)^.5, which makes it the root mean square of the entries.
    """

    unit: Literal["plain", "rms"] = "plain"
    """Unit of the norm, see above."""
    scope: Scope = "matrix"

    def scale(self, m: int, n: int) -> float:
        """Return the Euclidean norm of an m x n tensor of size 1."""
        return {"plain": 1.0, "rms": (m * n) ** 0.5}[self.unit]

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """Return scale * G / ||G||_F."""
        return _normalise(G_Kmn, (-2, -1)).mul_(self.scale(*G_Kmn.shape[-2:]))

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Return W, scaled to size 1 if it is larger."""
        return W_Kmn / self.size(W_Kmn).clamp_min(1)[:, None, None]

    def size(self, W_Kmn: Tensor) -> Tensor:
        """Return ||W||_F / scale."""
        return W_Kmn.norm(dim=(-2, -1)) / self.scale(*W_Kmn.shape[-2:])


def build_norm(name: str, unit: str = "plain", *, table: str = "polar_express", steps: int = 5, p: float = 4.0) -> Norm:
    """Return the norm of a name (configs.optim.NormName) in its unit.

    `table` and `steps` configure Newton-Schulz for the spectral norm; `p` is the exponent of the Schatten norm.
    """
    if name in ("spectral", "rms_operator"):
        return Spectral(name if unit == "plain" else unit, table, steps)
    if name == "schatten":
        from optim.zoo.schatten import Schatten  # here, so that runs without it do not import it
        return Schatten(p, unit)
    if name == "frobenius":
        return Frobenius(unit)
    norm = {"row": Row, "column": Column, "sign": Sign}[name]()
    return FanIn(norm) if unit == "fan_in" else norm
