"""Manifold Muon: spectral steepest descent on the Stiefel manifold, where all singular values of W are 1.

Bernstein 2025, "Modular Manifolds" (Thinking Machines); Cesista 2025 on its dual. For W^T W = I (tall; wide matrices are
transposed) and the averaged gradient G:

    D = argmax {<G, A> : |A|_2 <= 1, A^T W + W^T A = 0};   W <- polar(W - lr D)

By duality D = msign(X), X = W (C + S) + P: C is the skew part of W^T G, P the part of G orthogonal to W, S the symmetric
matrix that minimises the nuclear norm of X, for which W^T D is skew. With R = (X^T X)^1/2 held fixed, S solves a Lyapunov
equation, which in R's eigenbasis, with eigenvalues r, is explicit:

    S R^-1 + R^-1 S = R^-1 C - C R^-1;      S_ij = C_ij (r_j - r_i) / (r_i + r_j)

This is iterated (reweighted least squares) with Anderson's acceleration (1965), from the S of the last step. For square W,
S = 0 is exact. Difference to the sources: they use gradient ascent, which after 20 iterations leaves some percent.

State: averages as in Muon (K, m, n); `dual` S (K, s, s), float32, in units of the largest entry of the gradient.
Shapes: K matrices m x n in one stack; s the shorter of m and n. The solver sees W, G (K, m, n) with n <= m, in float64.
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

RANK = 1e-15  # least eigenvalue of R^2, as a share of ||G||_F^2: smaller ones are rounding in float64
MEMORY = 6  # iterates that Anderson's acceleration combines
CONVERGED = 1e-22  # squared changes of S below this, for gradients with entries up to 1, are rounding
POLAR_STEPS = 8  # cubic Newton-Schulz steps: they bring a singular value of .5 to 1 - 1e-7


@dataclass(frozen=True, slots=True)
class StiefelSet(Constraint):
    """Constraint under which all singular values are 1 (Bernstein 2025, "Modular Manifolds"): W <- polar(W - lr D)."""

    def project_start(self, weights: Tensor) -> None:
        """Set the weights to their polar factor, in place, by SVD.

        Raises ValueError for a matrix without full rank, whose polar factor is not unique.
        """
        if (torch.linalg.matrix_rank(weights) < min(weights.shape[-2:])).any():
            raise ValueError("a matrix without full rank has no place on the Stiefel manifold: start with "
                             "--model.no_zero_init_projections")
        weights.copy_(orthogonalize_svd(weights))

    def retract(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        """Set the weights to their polar factor, in place, by Newton-Schulz: X <- X (3 - X^T X) / 2, float32."""
        X = weights.mT if weights.size(-2) < weights.size(-1) else weights.clone()
        # Scaled to a spectral norm of at most 1, for the iteration to converge. Few steps suffice: the singular values after
        # a tangential step are at least 1, (W - lr D)^T (W - lr D) = I + lr^2 D^T D, so none is far below the largest.
        X = X / (X.mT @ X).abs().sum(-1).amax(-1)[:, None, None].sqrt().clamp_min(TINY)
        for _ in range(POLAR_STEPS):
            X = torch.baddbmm(X, X, X.mT @ X, beta=1.5, alpha=-0.5)
        weights.copy_(X.mT if weights.size(-2) < weights.size(-1) else X)


class Stiefel(Rule):
    """Manifold Muon (Bernstein 2025); the constraint `StiefelSet` belongs to it."""

    config: configs.Stiefel
    norm = Spectral()
    compiles: ClassVar[bool] = False

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return zero averages and S = 0."""
        short = min(param.shape[-2:])
        return init_average(param, self.config) | {"dual": param.new_zeros(len(param), short, short, dtype=torch.float32)}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D (K, m, n), tangential at the weights, of spectral norm at most 1."""
        average = average_gradient(grad, state, self.config, hyper)
        wide = param.size(-2) < param.size(-1)
        W, G = ((x.mT if wide else x).double() for x in (param, average))
        scale = G.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        # Warm start from the last step's S: with momentum, the optimum moves slowly. Gradients are scaled to entries of at
        # most 1, so that S stays a good start when their size changes.
        A, S = solve_dual(W, G / scale, state["dual"].double(), self.config.dual_steps)
        state["dual"].copy_(S)
        return (A.mT if wide else A).to(param.dtype if param.dtype == torch.float64 else torch.float32)


class GradientParts(NamedTuple):
    """Parts of a gradient at W, G = W (C + symmetric) + P; the symmetric part plays no role on the manifold."""

    W: Tensor
    """Weights, (K, m, n), n <= m."""
    skew: Tensor
    """C, the skew part of W^T G, (K, n, n)."""
    orthogonal: Tensor
    """P, the part of G orthogonal to W, (K, m, n)."""
    gram: Tensor
    """P^T P, (K, n, n)."""
    floor: Tensor
    """Least eigenvalue of R^2 that is not rounding, (K, 1)."""

    @classmethod
    def split(cls, W: Tensor, G: Tensor) -> "GradientParts":
        """Return the parts of G, (K, m, n), n <= m."""
        WtG = W.mT @ G
        orthogonal = G - W @ WtG
        floor = RANK * G.square().sum((-2, -1))[..., None].clamp_min(torch.finfo(torch.float32).tiny)
        return cls(W, (WtG - WtG.mT) / 2, orthogonal, orthogonal.mT @ orthogonal, floor)

    def root(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """Return eigenvectors (K, n, n) and eigenvalues (K, n) of R = (X^T X)^1/2 at S."""
        B = self.skew + S
        squares, U = torch.linalg.eigh(B.mT @ B + self.gram)
        return U, torch.maximum(squares, self.floor).sqrt()

    def primal(self, S: Tensor) -> Tensor:
        """Return the step msign(X) = X R^-1 at S, (K, m, n)."""
        U, r = self.root(S)
        return (self.W @ (self.skew + S) + self.orthogonal) @ (U / r.unsqueeze(-2)) @ U.mT

    def next_dual(self, S: Tensor) -> Tensor:
        """Return the solution of the Lyapunov equation with R at S, (K, n, n)."""
        U, r = self.root(S)
        ratio = (r.unsqueeze(-2) - r.unsqueeze(-1)) / (r.unsqueeze(-2) + r.unsqueeze(-1))
        solution = U @ ((U.mT @ self.skew @ U) * ratio) @ U.mT
        return (solution + solution.mT) / 2


def solve_dual(W: Tensor, G: Tensor, S: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the step A (K, m, n) and its dual variable S (K, n, n) after so many iterations from S; n <= m, float64."""
    parts, points, changes = GradientParts.split(W, G), [], []
    if W.size(-2) == W.size(-1):  # P = 0: S = 0 is the solution
        return parts.primal(torch.zeros_like(S)), torch.zeros_like(S)
    for _ in range(iterations):
        change = parts.next_dual(S) - S
        points = [*points, S.flatten(1)][-MEMORY:]
        changes = [*changes, change.flatten(1)][-MEMORY:]
        S = S + change if len(points) == 1 else anderson_point(points, changes).view_as(S)
        S = (S + S.mT) / 2
    return parts.primal(S), S


def anderson_point(points: list[Tensor], changes: list[Tensor]) -> Tensor:
    """Return Anderson's next point, (K, n n): the affine combination of the last points, each (K, n n), whose combined
    change is least, plus that change."""
    x, f = torch.stack(points, -1), torch.stack(changes, -1)
    dx, df = x.diff(dim=-1), f.diff(dim=-1)
    normal = df.mT @ df
    # A ridge, because near convergence the changes are almost parallel and the normal equations singular.
    ridge = 1e-10 * normal.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None] + CONVERGED
    weights = torch.linalg.solve(normal + ridge * torch.eye(normal.size(-1), dtype=x.dtype, device=x.device),
                                 df.mT @ f[..., -1:])
    return (x[..., -1:] + f[..., -1:] - (dx + df) @ weights).squeeze(-1)
