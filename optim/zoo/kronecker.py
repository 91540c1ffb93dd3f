"""What Shampoo and SOAP learn of a gradient: the Gram matrices of its rows and of its columns, and their eigenbases."""

import torch
from torch import Tensor

LARGEST = 1e15  # gradients are clipped here for the Gram matrices alone, whose squares must stay finite in float32


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


def absorb_grams(grad: Tensor, state: dict[str, Tensor], beta: float) -> None:
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
