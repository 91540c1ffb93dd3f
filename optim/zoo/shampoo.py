"""Shampoo: a norm learned from the Gram matrices of past gradients; without memory it is the spectral norm."""

from typing import ClassVar

import torch
from torch import Tensor

import configs.optim as configs
from optim.muon import average_gradient, init_average
from optim.norms import Spectral
from optim.rule import Hyper, Rule
from optim.zoo.kronecker import absorb_grams, chosen, init_grams

NEWTON_STEPS = 40
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
        absorb_grams(grad, state, self.config.gram_beta)
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
