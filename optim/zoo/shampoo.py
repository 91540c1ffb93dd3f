"""Shampoo: a norm learned from the Gram matrices of past gradients; without memory it is the spectral norm."""

from typing import ClassVar

import torch
from torch import Tensor

import configs.optim as configs
from optim.muon import average_gradient, init_average
from optim.norms import Spectral
from optim.rule import Hyper, Rule

NEWTON_STEPS = 40
LARGEST = 1e15  # gradients are clipped here for the Gram matrices alone, whose squares must stay finite in float32
TINY = 1e-30


class Shampoo(Rule):
    """D = L^p u R^p for the average u, with L <- b L + (1 - b) G G^T, R <- b R + (1 - b) G^T G, over 1 - b^t.

    Gupta et al. 2018, arXiv 1802.09568, algorithm 1 (p = -1/4, sums: gram_beta 1); one-sided with p = -1/2 (Shi et al.
    2023, arXiv 2309.06497). With G = U S V^T and no memory both are U V^T (Bernstein & Newhouse 2024, prop. 5). Roots are
    refreshed every `every` updates; eigenvalues are lifted by eps times the largest.
    """

    config: configs.Shampoo
    norm = Spectral()
    compiles: ClassVar[bool] = False

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The averages; Gram matrices and their roots, float32, (K, m, m) and (K, n, n)."""
        grams = init_grams(param, self.config.sides)
        roots = {key.replace("gram", "root"): torch.zeros_like(gram) for key, gram in grams.items()}
        return init_average(param, self.config) | grams | roots

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """L^p u R^p: float32 (K, m, n)."""
        update_grams(grad, state, self.config.gram_beta)
        sides = chosen(self.config.sides, *param.shape[-2:])
        if (int(hyper.count) - 1) % self.config.every_steps == 0:
            power = self.config.exponent if self.config.exponent is not None else -0.5 / len(sides)
            weight = 1 - self.config.gram_beta**hyper.count if self.config.gram_beta < 1 else 1.0
            for side in sides:
                state[f"root_{side}"].copy_(self._root(state[f"gram_{side}"] / weight, power))
        step = average_gradient(grad.float(), state, self.config, hyper.momentum).float()
        if "left" in sides:
            step = state["root_left"] @ step
        return step @ state["root_right"] if "right" in sides else step

    def _root(self, gram: Tensor, power: float) -> Tensor:
        return (matrix_power if self.config.root == "eigh" else inverse_root_newton)(gram, power, eps=self.config.eps)


def matrix_power(gram: Tensor, power: float, *, eps: float) -> Tensor:
    """(A + eps ||A|| I)^power of symmetric positive semidefinite (K, k, k) by eigh, ||A|| its largest eigenvalue.

    Eigenvalues that may be float32's rounding have the power 0, as in a pseudo-inverse: what never was a gradient does
    not blow up.
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
    """The same for power = -1/p, p whole, by the coupled Newton iteration, of matrix products alone (Iannazzo 2006):
    M <- T^p M, X <- X T with T = ((p + 1) I - M) / p, from M = A / z, X = z^(-1/p) I, z the norm bound (p + 1) / 2.
    """
    p = round(-1 / power)
    eye = torch.eye(gram.size(-1), device=gram.device)
    scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    A = gram / scale.clamp_min(TINY) + max(eps, 1e-7) * eye
    norm = A.norm(dim=(-2, -1), keepdim=True)
    z = 2 * norm / (p + 1)
    M, X = A / z, eye * z ** (-1 / p)
    for _ in range(NEWTON_STEPS):
        T = ((p + 1) * eye - M) / p
        X = X @ T
        M = torch.linalg.matrix_power(T, p) @ M
    return torch.where(scale > 0, X * scale.clamp_min(TINY) ** (-1 / p), 0)


# ---- Gram matrices of a gradient's rows and columns, for Shampoo and SOAP -------------------------------------------------


def init_grams(param: Tensor, sides: str) -> dict[str, Tensor]:
    """Zero Gram matrices, float32: `gram_left` (K, m, m) and `gram_right` (K, n, n), as far as `sides` names them."""
    K, m, n = param.shape
    sizes = {"left": m, "right": n}
    return {f"gram_{side}": torch.zeros(K, sizes[side], sizes[side], device=param.device) for side in chosen(sides, m, n)}


def chosen(sides: str, m: int, n: int) -> tuple[str, ...]:
    """The sides that `sides` (both, left, right, smaller) means for m x n matrices."""
    if sides == "smaller":
        return ("left",) if m <= n else ("right",)
    return ("left", "right") if sides == "both" else (sides,)


def update_grams(grad: Tensor, state: dict[str, Tensor], beta: float) -> None:
    """L <- beta L + (1 - beta) G G^T and R likewise with G^T G, in place; for beta = 1 the plain sums."""
    G = grad.float().clamp(-LARGEST, LARGEST)
    share = 1.0 if beta == 1 else 1 - beta
    for side, A in (("left", G), ("right", G.mT)):
        if f"gram_{side}" in state:
            state[f"gram_{side}"].mul_(beta).baddbmm_(A, A.mT, alpha=share)


def eigenbasis(gram: Tensor) -> Tensor:
    """Orthonormal eigenvectors of symmetric (K, k, k), as columns, the largest eigenvalue first."""
    scale = gram.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    return torch.linalg.eigh(gram / scale).eigenvectors.flip(-1)


def turn_basis(gram: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration towards the eigenvectors, in place: Q <- qr(L Q), its columns sorted first by
    diag(Q^T L Q), falling. Returns that order (K, k), by which whatever is kept in the basis must be permuted."""
    scale = gram.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    image = gram / scale @ basis
    order = (basis * image).sum(-2).argsort(dim=-1, descending=True, stable=True)
    basis.copy_(torch.linalg.qr(image.gather(-1, order.unsqueeze(-2).expand_as(image))).Q)
    return order
