"""Manifold Muon: spectral steepest descent on the Stiefel manifold, where all singular values are 1.

Bernstein 2025, "Modular Manifolds" (Thinking Machines); Cesista 2025 on its dual. The weights' constraint is `stiefel`.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

import configs.optim as configs
from optim.constraint import TINY, Constraint
from optim.muon import average_gradient, init_average
from optim.newton_schulz import orthogonalize_svd
from optim.norms import Spectral
from optim.rule import Hyper, Rule

RANK = 1e-15  # squared singular values below this share of |G|^2 count as so much: float64 does not know them
MEMORY = 6  # iterates that Anderson's acceleration combines
CONVERGED = 1e-22  # squared changes below this, of gradients with entries up to 1, are rounding: nothing to accelerate
POLAR_STEPS = 8  # of Newton's cubic: from singular values of .5 to 1 - 1e-7


@dataclass(frozen=True, slots=True)
class StiefelSet(Constraint):
    """All singular values are 1 (Bernstein 2025, "Modular Manifolds"); a step is W - lr D, and its polar factor."""

    def project_start(self, weights: Tensor) -> None:
        """The polar factor, exactly. Raises ValueError for a matrix without full rank, whose polar factor is not unique."""
        if (torch.linalg.matrix_rank(weights) < min(weights.shape[-2:])).any():
            raise ValueError("a matrix without full rank has no place on the Stiefel manifold: start with "
                             "--model.no_zero_init_projections")
        weights.copy_(orthogonalize_svd(weights))

    def retract(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        """X <- X (3 - X^T X) / 2, float32: a tangent step has singular values of at least 1 before it is scaled down."""
        X = weights.mT if weights.size(-2) < weights.size(-1) else weights.clone()
        X = X / (X.mT @ X).abs().sum(-1).amax(-1)[:, None, None].sqrt().clamp_min(TINY)
        for _ in range(POLAR_STEPS):
            X = torch.baddbmm(X, X, X.mT @ X, beta=1.5, alpha=-0.5)
        weights.copy_(X.mT if weights.size(-2) < weights.size(-1) else X)


class Stiefel(Rule):
    """D = argmax <G, A> over |A|_2 <= 1 and A^T W + W^T A = 0, G the averaged gradient, W^T W = I (tall; wide: transposed).

    By duality A = msign(X), X = W (C + S) + P with C the skew part of W^T G, P what of G is orthogonal to W, and S the
    symmetric matrix of least |X|_* (nuclear), where W^T A is skew. With R = (X^T X)^1/2 held fixed that is the Lyapunov
    equation S R^-1 + R^-1 S = R^-1 C - C R^-1, solved in R's eigenbasis: S_ij = C_ij (r_j - r_i) / (r_i + r_j), which is
    iterated (reweighted least squares) with Anderson's acceleration (1965), from the last step's S. It takes the place of
    the sources' gradient ascent, which after 20 iterations leaves some percent. Square W: S = 0 is exact.
    """

    config: configs.Stiefel
    norm = Spectral()
    compiles: ClassVar[bool] = False

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Averages, and the dual variable in units of the gradient's root mean square, (K, s, s), s the shorter side."""
        short = min(param.shape[-2:])
        return init_average(param, self.config) | {"dual": param.new_zeros(len(param), short, short, dtype=torch.float32)}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """(K, m, n) -> (K, m, n), tangent at the weights, spectral norm at most 1."""
        average = average_gradient(grad, state, self.config, hyper.momentum)
        wide = param.size(-2) < param.size(-1)
        W, G = ((x.mT if wide else x).double() for x in (param, average))
        size = G.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        A, S = solve(W, G / size, state["dual"].double(), self.config.dual_steps)
        state["dual"].copy_(S)
        return (A.mT if wide else A).to(param.dtype if param.dtype == torch.float64 else torch.float32)


class Split(NamedTuple):
    """A gradient at W: G = W (skew + symmetric part) + rest; the rest's Gram matrix; the least squared singular value."""

    W: Tensor
    skew: Tensor
    rest: Tensor
    gram: Tensor
    floor: Tensor

    @classmethod
    def at(cls, W: Tensor, G: Tensor) -> "Split":
        """The parts of (K, m, n), n <= m; the symmetric part plays no role on the manifold."""
        C = W.mT @ G
        rest = G - W @ C
        floor = RANK * G.square().sum((-2, -1))[..., None].clamp_min(torch.finfo(torch.float32).tiny)
        return cls(W, (C - C.mT) / 2, rest, rest.mT @ rest, floor)

    def roots(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvectors (K, n, n) and eigenvalues (K, n) of R = (X^T X)^1/2 at S."""
        B = self.skew + S
        squares, U = torch.linalg.eigh(B.mT @ B + self.gram)
        return U, torch.maximum(squares, self.floor).sqrt()

    def primal(self, S: Tensor) -> Tensor:
        """A = X R^-1."""
        U, r = self.roots(S)
        return (self.W @ (self.skew + S) + self.rest) @ (U / r.unsqueeze(-2)) @ U.mT

    def next(self, S: Tensor) -> Tensor:
        """The Lyapunov equation's solution with R at S."""
        U, r = self.roots(S)
        ratio = (r.unsqueeze(-2) - r.unsqueeze(-1)) / (r.unsqueeze(-2) + r.unsqueeze(-1))
        solved = U @ ((U.mT @ self.skew @ U) * ratio) @ U.mT
        return (solved + solved.mT) / 2


def solve(W: Tensor, G: Tensor, S: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The tangent A and the dual S after so many iterations, float64; W and G (K, m, n) with n <= m, S (K, n, n)."""
    split, points, changes = Split.at(W, G), [], []
    if W.size(-2) == W.size(-1):
        return split.primal(torch.zeros_like(S)), torch.zeros_like(S)
    for _ in range(iterations):
        change = split.next(S) - S
        points, changes = [*points, S.flatten(1)][-MEMORY:], [*changes, change.flatten(1)][-MEMORY:]
        S = (S + change if len(points) == 1 else accelerated(points, changes)).view_as(S)
        S = (S + S.mT) / 2
    return split.primal(S), S


def accelerated(points: list[Tensor], changes: list[Tensor]) -> Tensor:
    """Anderson's next point: the combination of the last ones whose change is least, changed. (K, n n) each."""
    x, f = torch.stack(points, -1), torch.stack(changes, -1)
    dx, df = x.diff(dim=-1), f.diff(dim=-1)
    normal = df.mT @ df
    ridge = 1e-10 * normal.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None] + CONVERGED
    weights = torch.linalg.solve(normal + ridge * torch.eye(normal.size(-1), dtype=x.dtype, device=x.device),
                                 df.mT @ f[..., -1:])
    return (x[..., -1:] + f[..., -1:] - (dx + df) @ weights).squeeze(-1)
