"""SOAP: Adam in the eigenbases of Shampoo's Gram matrices.

Vyas et al. 2024, arXiv 2409.11321, algorithm 3; the bases: algorithm 4. With t counted from the second gradient:

    L <- b L + (1 - b) G G^T;   R <- b R + (1 - b) G^T G                          b = gram_beta; eigenvectors Q_L and Q_R
    m <- b1 m + (1 - b1) G;   v <- b2 v + (1 - b2) (Q_L^T G Q_R)^2
    D  = Q_L [Q_L^T mhat Q_R / (sqrt(vhat) + eps)] Q_R^T;   W <- W - lr D        hats: over 1 - b1^t, 1 - b2^t

Differences to the authors' SOAP (nikhilvyas/SOAP): m is stored in the axes of W, not of the bases, and needs no rotation
when the bases change; eps is added to sqrt(vhat), there to sqrt(v); matrices of any size have both bases.

State: `mean` m (K, m, n), in the dtype of the weights; float32: `square` v (K, m, n), in the axes of the bases;
`gram_left` L, `basis_left` Q_L (K, m, m); `gram_right` R, `basis_right` Q_R (K, n, n). Shapes: K matrices m x n in a stack.
"""

from typing import ClassVar

import torch
from torch import Tensor

import configs.optim as configs
from optim.norms import Spectral
from optim.rule import Hyper, Rule, update_second_moment, zeros_like_bank
from optim.zoo.shampoo import eigenbasis, init_grams, iterate_eigenbasis, update_grams

# ---- The orthonormal bases Q_L and Q_R ------------------------------------------------------------------------------------


def init_bases(param: Tensor) -> dict[str, Tensor]:
    """Return a zero second moment, zero Gram matrices, and the identity as both bases, all float32."""
    grams = init_grams(param, "both")
    bases = {key.replace("gram", "basis"): torch.eye(gram.size(-1), device=gram.device).repeat(gram.size(0), 1, 1)
             for key, gram in grams.items()}
    return {"square": torch.zeros_like(param, dtype=torch.float32)} | grams | bases


def to_eigenbases(G: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return Q_L^T G Q_R, float32 (K, m, n)."""
    return state["basis_left"].mT @ G.float() @ state["basis_right"]


def from_eigenbases(P: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return Q_L P Q_R^T, float32 (K, m, n)."""
    return state["basis_left"] @ P @ state["basis_right"].mT


def update_eigenbases(grad: Tensor, state: dict[str, Tensor], hyper: Hyper, config: configs.SOAP | configs.SOAPMuon) -> None:
    """Update the Gram matrices by `grad` and the bases by the Gram matrices, in place (Vyas et al. 2024, algorithm 4).

    Bases are computed by eigh at the first gradient, then by one orthogonal iteration every `every_steps` updates.
    """
    update_grams(grad, state, config.gram_beta)
    count, square = int(hyper.count), state["square"]
    if count == 1:
        for side in ("left", "right"):
            state[f"basis_{side}"].copy_(eigenbasis(state[f"gram_{side}"]))
    elif (count - 1) % config.every_steps == 0:
        for side, dim in (("left", -2), ("right", -1)):
            # The iteration rewrites the basis and returns the order of its axes, by which v is permuted. v is not rotated:
            # squares cannot be.
            order = iterate_eigenbasis(state[f"gram_{side}"], state[f"basis_{side}"]).unsqueeze(-1 if dim == -2 else -2)
            square.copy_(square.gather(dim, order.expand_as(square)))


class SOAP(Rule):
    """SOAP (Vyas et al. 2024, algorithm 3). The first gradient sets the bases, with direction 0, as in the public code."""

    config: configs.SOAP
    norm = Spectral()
    compiles: ClassVar[bool] = False  # eigh, and work that depends on the count, are not one graph

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return a zero mean, and `init_bases`."""
        return {"mean": zeros_like_bank(param)} | init_bases(param)

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D, float32 (K, m, n), in the axes of W."""
        steps = hyper.count - 1  # updates of this group before this one, not training steps
        step = torch.zeros_like(grad, dtype=torch.float32)
        # Not at the first gradient: the bases are still the identity. In bases taken from this gradient itself it would be
        # diagonal, and Adam would divide the rounding errors off the diagonal by themselves.
        if int(steps):
            mean = state["mean"]
            mean.lerp_(grad.to(mean.dtype), 1 - self.config.beta1)
            update_second_moment(state["square"], to_eigenbases(grad, state), self.config.beta2)
            root = (state["square"] / (1 - self.config.beta2**steps)).sqrt_().add_(self.config.eps)
            step = from_eigenbases(to_eigenbases(mean, state) / root.clamp_min_(1e-30), state)  # eps may be 0
            step = step / (1 - self.config.beta1**steps)
        # After the step, as in the public code: each gradient is scaled in bases that come from earlier gradients only.
        update_eigenbases(grad, state, hyper, self.config)
        return step
