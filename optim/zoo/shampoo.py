"""Shampoo: descent under a norm learned from the Gram matrices of past gradients.

Gupta et al. 2018, arXiv 1802.09568, algorithm 1; one-sided: Shi et al. 2023, arXiv 2309.06497.

    L <- b L + (1 - b) G G^T;   R <- b R + (1 - b) G^T G         b = gram_beta; at b = 1 the sums of the paper
    D  = Lhat^p u Rhat^p;   W <- W - lr D                        u: average of G; Lhat, Rhat: L, R over 1 - b^t

p = -1/4, and -1/2 if `sides` leaves only L or only R. Without memory, with G = U S V^T, both give D = U V^T: steepest
descent under the spectral norm (Bernstein & Newhouse 2024, prop. 5). Roots are computed anew every `every_steps` updates.
Differences to Meta's Distributed Shampoo: eps is a share of the largest eigenvalue, there it is absolute; roots are computed
at updates 1, 1 + every_steps, ..., there at others; dimensions are never merged, large matrices not cut into blocks.

State: averages as in Muon, in the dtype of the weights; `gram_left` L and `root_left` Lhat^p (K, m, m), `gram_right` R and
`root_right` Rhat^p (K, n, n), float32. Shapes: K matrices m x n in one stack; k for m or n.
"""

from typing import ClassVar

import torch
from torch import Tensor

import configs.optim as configs
from optim.muon import average_gradient, init_average
from optim.norms import Spectral
from optim.rule import Hyper, Rule

NEWTON_STEPS = 40  # small eigenvalues of M at least double per step: from 1e-7 to 1 takes fewer than 25
LARGEST = 1e15  # gradients are clipped here for the Gram matrices alone: their squares must stay finite in float32
TINY = 1e-30


class Shampoo(Rule):
    """Shampoo (Gupta et al. 2018, algorithm 1), with one or both Gram matrices."""

    config: configs.Shampoo
    norm = Spectral()
    compiles: ClassVar[bool] = False

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return averages, Gram matrices and roots, all zero."""
        grams = init_grams(param, self.config.sides)
        roots = {key.replace("gram", "root"): torch.zeros_like(gram) for key, gram in grams.items()}
        return init_average(param, self.config) | grams | roots

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D = Lhat^p u Rhat^p, float32 (K, m, n)."""
        update_grams(grad, state, self.config.gram_beta)
        sides = get_sides(self.config.sides, *param.shape[-2:])
        # Roots cost far more than the products below: every `every_steps` updates, beginning with the first.
        if (int(hyper.count) - 1) % self.config.every_steps == 0:
            power = self.config.exponent if self.config.exponent is not None else -0.5 / len(sides)
            weight = 1 - self.config.gram_beta**hyper.count if self.config.gram_beta < 1 else 1.0
            root = matrix_power if self.config.root == "eigh" else inverse_root_newton
            for side in sides:
                state[f"root_{side}"].copy_(root(state[f"gram_{side}"] / weight, power, eps=self.config.eps))
        # Precondition the average.
        step = average_gradient(grad.float(), state, self.config, hyper).float()
        if "left" in sides:
            step = state["root_left"] @ step
        return step @ state["root_right"] if "right" in sides else step


def matrix_power(gram: Tensor, power: float, *, eps: float) -> Tensor:
    """Return (A + eps ||A|| I)^power of positive semi-definite A, (K, k, k), by eigh; ||A|| is its largest eigenvalue.

    As in a pseudo-inverse, eigenvalues that float32 cannot tell from zero get the power 0: a negative power would blow up
    directions in which there never was a gradient.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_min(TINY)  # the trace: eigenvalues are <= 1 then
    values, vectors = torch.linalg.eigh(gram / scale)
    top = values[..., -1:].clamp_min(TINY)
    lifted = values.clamp_min(0) + eps * top
    rounding = gram.size(-1) * torch.finfo(torch.float32).eps
    powers = torch.where(lifted > rounding * top, lifted.clamp_min(TINY) ** power, 0)
    return torch.where(gram.abs().amax(dim=(-2, -1), keepdim=True) > 0,
                       (vectors * powers.unsqueeze(-2)) @ vectors.mT * scale**power, 0)


def inverse_root_newton(gram: Tensor, power: float, *, eps: float) -> Tensor:
    """Return (A + eps tr(A) I)^power of A (K, k, k), power = -1/p with a whole p, by matrix products alone.

    Coupled Newton iteration (Iannazzo 2006): T = ((p + 1) I - M) / p, X <- X T, M <- T^p M, from M = A / z and
    X = z^(-1/p) I, with z = 2 ||A||_F / (p + 1).
    """
    p = round(-1 / power)
    eye = torch.eye(gram.size(-1), device=gram.device)
    scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    A = gram / scale.clamp_min(TINY) + max(eps, 1e-7) * eye  # 1e-7, float32's precision: the iteration needs full rank
    norm = A.norm(dim=(-2, -1), keepdim=True)
    z = 2 * norm / (p + 1)  # the iteration converges for eigenvalues of M below p + 1; here they are at most (p + 1) / 2
    M, X = A / z, eye * z ** (-1 / p)
    for _ in range(NEWTON_STEPS):
        T = ((p + 1) * eye - M) / p
        X = X @ T
        M = torch.linalg.matrix_power(T, p) @ M
    return torch.where(scale > 0, X * scale.clamp_min(TINY) ** (-1 / p), 0)


# ---- Gram matrices of a gradient's rows and columns, for Shampoo and SOAP -------------------------------------------------


def init_grams(param: Tensor, sides: str) -> dict[str, Tensor]:
    """Return zero Gram matrices, float32, of the configured `sides`: `gram_left` (K, m, m), `gram_right` (K, n, n)."""
    K, m, n = param.shape
    sizes = {"left": m, "right": n}
    return {f"gram_{side}": torch.zeros(K, sizes[side], sizes[side], device=param.device) for side in get_sides(sides, m, n)}


def get_sides(sides: str, m: int, n: int) -> tuple[str, ...]:
    """Return the names of the sides that `sides` (both, left, right or smaller) means for m x n matrices."""
    if sides == "smaller":
        return ("left",) if m <= n else ("right",)
    return ("left", "right") if sides == "both" else (sides,)


def update_grams(grad: Tensor, state: dict[str, Tensor], beta: float) -> None:
    """L <- beta L + (1 - beta) G G^T, and R likewise with G^T G, in place; at beta = 1 plain sums."""
    G = grad.float().clamp(-LARGEST, LARGEST)
    share = 1.0 if beta == 1 else 1 - beta
    for side, A in (("left", G), ("right", G.mT)):
        if f"gram_{side}" in state:
            state[f"gram_{side}"].mul_(beta).baddbmm_(A, A.mT, alpha=share)


def eigenbasis(gram: Tensor) -> Tensor:
    """Return the orthonormal eigenvectors of symmetric (K, k, k) as columns, those of the largest eigenvalues first."""
    scale = gram.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    return torch.linalg.eigh(gram / scale).eigenvectors.flip(-1)


def iterate_eigenbasis(gram: Tensor, basis: Tensor) -> Tensor:
    """Take one step of orthogonal iteration towards the eigenvectors of `gram`, in place: Q <- qr(L Q).

    The columns of Q are first sorted by their estimated eigenvalues, diag(Q^T L Q), the largest first. Returns that order,
    (K, k): permute by it whatever is stored in the coordinates of the basis.
    """
    scale = gram.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    image = gram / scale @ basis
    # Sorted, because QR keeps the span of the first columns: strong directions must not be made orthogonal to weak ones.
    order = (basis * image).sum(-2).argsort(dim=-1, descending=True, stable=True)
    basis.copy_(torch.linalg.qr(image.gather(-1, order.unsqueeze(-2).expand_as(image))).Q)
    return order
