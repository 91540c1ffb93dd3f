"""Norms on tensors, and the four verbs that steepest descent needs of each.

For a norm ||.||:  dual(G) is the A with ||A|| = 1 that maximises <G, A>;  project(W) is the nearest point of the unit
ball;  size(W) is ||W||;  init(shape) is a random point of size 1. Matrices are stacked, (K, m, n) with m = out and
n = in; sizes have shape (K,). `scope` says how much of the tensor one dual needs: single elements, whole rows, or whole
matrices; the sharded optimizer cuts there and nowhere finer. (Bernstein & Newhouse 2024, arXiv 2409.20325.)

A unit multiplies dual and ball by a length that depends on the shape alone: the field's learning-rate corrections. A
vector is a matrix of one row; its RMS norm is `Row`.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from optim.constraint import Scope
from optim.newton_schulz import orthogonalize, unit_length

TINY = torch.finfo(torch.float32).tiny


class Norm(Protocol):
    """What steepest descent needs to know of a norm."""

    scope: Scope

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """The tensor of size 1 that maximises <G, .>; zero where G is zero."""

    def project(self, W_Kmn: Tensor) -> Tensor:
        """The nearest tensor (in Frobenius distance) of size at most 1."""

    def size(self, W_Kmn: Tensor) -> Tensor:
        """||W|| of each matrix: (K, m, n) -> (K,)."""


def _unit(G: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """G over its Euclidean norm along `dim`, safe against over- and underflow; zero stays zero."""
    G = G / G.abs().amax(dim=dim, keepdim=True).clamp_min(TINY)
    return G / G.norm(dim=dim, keepdim=True).clamp_min(TINY)


@dataclass(frozen=True, slots=True)
class Spectral:
    """Largest singular value, in units that depend on the shape alone; the dual is the polar factor U V^T.

    unit `spectral`: 1; `rms_operator`: the RMS -> RMS operator norm, dual = (m/n)^.5 U V^T (Bernstein & Newhouse 2024; Large
    et al. 2024, arXiv 2405.14813); `at_least_one`: max(1, m/n)^.5 (Jordan 2024); `match_adam`: .2 max(m, n)^.5, so that the
    step's RMS is about Adam's (Liu et al. 2025, arXiv 2502.16982).
    """

    unit: Literal["rms_operator", "spectral", "at_least_one", "match_adam"] = "spectral"
    table: str = "polar_express"
    steps: int = 5
    scope: Scope = "matrix"

    def scale(self, m: int, n: int) -> float:
        """Spectral norm of a tensor of size 1."""
        return unit_length(self.unit, m, n)

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """scale U V^T."""
        return orthogonalize(G_Kmn, self.table, steps=self.steps).mul_(self.scale(*G_Kmn.shape[-2:]))

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Singular values clipped at `scale`."""
        U, S, Vh = torch.linalg.svd(W_Kmn, full_matrices=False)
        return (U * S.clamp_max(self.scale(*W_Kmn.shape[-2:])).unsqueeze(-2)) @ Vh

    def size(self, W_Kmn: Tensor) -> Tensor:
        """Largest singular value over `scale`, from the smaller Gram matrix."""
        W = W_Kmn.mT if W_Kmn.size(-2) > W_Kmn.size(-1) else W_Kmn
        top = torch.linalg.eigvalsh((W @ W.mT).float())[..., -1]
        return top.clamp_min(0).sqrt() / self.scale(*W_Kmn.shape[-2:])


@dataclass(frozen=True, slots=True)
class Row:
    """Largest RMS of a row: the l1 -> RMS operator norm of a lookup table whose rows are embeddings.

    The dual scales every row to RMS 1; rows whose tokens were not seen have no gradient and stay zero.
    """

    scope: Scope = "row"

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """Each row at RMS 1."""
        return _unit(G_Kmn, -1).mul_(G_Kmn.size(-1) ** 0.5)

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Rows above RMS 1 scaled back to it."""
        return W_Kmn / W_Kmn.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1)

    def size(self, W_Kmn: Tensor) -> Tensor:
        """Largest row RMS."""
        return W_Kmn.square().mean(dim=-1).sqrt().amax(dim=-1)


@dataclass(frozen=True, slots=True)
class Column:
    """Largest RMS of a column: `Row` of the transpose."""

    scope: Scope = "matrix"

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """Each column at RMS 1."""
        return Row().dual(G_Kmn.mT).mT

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Columns above RMS 1 scaled back to it."""
        return Row().project(W_Kmn.mT).mT

    def size(self, W_Kmn: Tensor) -> Tensor:
        """Largest column RMS."""
        return Row().size(W_Kmn.mT)


@dataclass(frozen=True, slots=True)
class Sign:
    """Largest absolute entry (l1 -> l-infinity operator norm); the dual is the sign (Bernstein et al. 2018)."""

    scope: Scope = "element"

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """sign(G)."""
        return G_Kmn.sign()

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Entries clipped to [-1, 1]."""
        return W_Kmn.clamp(-1, 1)

    def size(self, W_Kmn: Tensor) -> Tensor:
        """max |W_ij|."""
        return W_Kmn.abs().amax(dim=(-2, -1))


@dataclass(frozen=True, slots=True)
class FanIn:
    """A norm per input: ||W|| = n ||W||_norm, so that steps and balls of a layer W x shrink as it gets more inputs.

    Inputs are then measured by their mean, not their sum: `Sign` becomes the norm mean |x| -> max |y| and `Column`
    mean |x| -> RMS; `Row`, RMS -> max |y|. Scion's last layers (Pethick et al. 2025, arXiv 2502.07529).
    """

    norm: Norm

    @property
    def scope(self) -> Scope:
        """The norm's; but a row at least, as n must be known."""
        return "row" if self.norm.scope == "element" else self.norm.scope

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """The norm's, over n."""
        return self.norm.dual(G_Kmn) / G_Kmn.size(-1)

    def project(self, W_Kmn: Tensor) -> Tensor:
        """Onto the norm's ball of radius 1/n."""
        return self.norm.project(W_Kmn * W_Kmn.size(-1)) / W_Kmn.size(-1)

    def size(self, W_Kmn: Tensor) -> Tensor:
        """n ||W||_norm."""
        return self.norm.size(W_Kmn) * W_Kmn.size(-1)


@dataclass(frozen=True, slots=True)
class Frobenius:
    """Euclidean norm of all entries (`plain`), or their root mean square (`rms`); the dual is the normalised gradient."""

    unit: Literal["plain", "rms"] = "plain"
    scope: Scope = "matrix"

    def scale(self, m: int, n: int) -> float:
        """Euclidean norm of a tensor of size 1."""
        return {"plain": 1.0, "rms": (m * n) ** 0.5}[self.unit]

    def dual(self, G_Kmn: Tensor) -> Tensor:
        """scale G / ||G||_F."""
        return _unit(G_Kmn, (-2, -1)).mul_(self.scale(*G_Kmn.shape[-2:]))

    def project(self, W_Kmn: Tensor) -> Tensor:
        """W scaled back to size 1 where it is longer."""
        return W_Kmn / self.size(W_Kmn).clamp_min(1)[:, None, None]

    def size(self, W_Kmn: Tensor) -> Tensor:
        """||W||_F / scale."""
        return W_Kmn.norm(dim=(-2, -1)) / self.scale(*W_Kmn.shape[-2:])


def build_norm(name: str, unit: str = "plain", *, table: str = "polar_express", steps: int = 5, p: float = 4.0) -> Norm:
    """The norm of a name (configs.optim.NormName) in its unit; `table`, `steps`: of Newton-Schulz; `p`: of Schatten."""
    if name in ("spectral", "rms_operator"):
        return Spectral(name if unit == "plain" else unit, table, steps)
    if name == "schatten":
        from optim.zoo.schatten import Schatten  # only where a role names it
        return Schatten(p, unit)
    if name == "frobenius":
        return Frobenius(unit)
    norm = {"row": Row, "column": Column, "sign": Sign}[name]()
    return FanIn(norm) if unit == "fan_in" else norm
