"""SOAP: Adam in the eigenbasis of Shampoo's Gram matrices; and its momentum stepped to a norm's dual (SOAP-Muon)."""

from typing import ClassVar

import torch
from torch import Tensor

import configs.optim as configs
from optim.muon import Muon, average_gradient
from optim.norms import Spectral
from optim.rule import Hyper, Rule, update_second_moment, zeros_like_bank
from optim.zoo.shampoo import eigenbasis, init_grams, turn_basis, update_grams

# ---- Orthonormal bases Q_L and Q_R of the rows' and the columns' space, learned from the gradients' Gram matrices ---------


def init_bases(param: Tensor) -> dict[str, Tensor]:
    """The second moment in the bases, Gram matrices, and bases that stand for the identity until there is a gradient: all
    float32."""
    grams = init_grams(param, "both")
    bases = {key.replace("gram", "basis"): torch.eye(gram.size(-1), device=gram.device).repeat(gram.size(0), 1, 1)
             for key, gram in grams.items()}
    return {"square": torch.zeros_like(param, dtype=torch.float32)} | grams | bases


def to_eigenbases(G: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Q_L^T G Q_R."""
    return state["basis_left"].mT @ G.float() @ state["basis_right"]


def from_eigenbases(P: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Q_L P Q_R^T."""
    return state["basis_left"] @ P @ state["basis_right"].mT


def update_eigenbases(grad: Tensor, state: dict[str, Tensor], hyper: Hyper, config: configs.SOAP | configs.SOAPMuon) -> None:
    """Take the gradient in and turn the bases; the second moment follows the order of the axes. By eigh at the first
    gradient, then by one orthogonal iteration every `every_steps` updates (Vyas et al. 2024, arXiv 2409.11321,
    algorithm 4)."""
    update_grams(grad, state, config.gram_beta)
    count, square = int(hyper.count), state["square"]
    if count == 1:
        for side in ("left", "right"):
            state[f"basis_{side}"].copy_(eigenbasis(state[f"gram_{side}"]))
    elif (count - 1) % config.every_steps == 0:
        for side, dim in (("left", -2), ("right", -1)):
            order = turn_basis(state[f"gram_{side}"], state[f"basis_{side}"]).unsqueeze(-1 if dim == -2 else -2)
            square.copy_(square.gather(dim, order.expand_as(square)))


class SOAP(Rule):
    """D = Q_L [mhat' / (sqrt(vhat') + eps)] Q_R^T: Adam on G' = Q_L^T G Q_R, bias-corrected.

    Vyas et al. 2024, arXiv 2409.11321, algorithm 3. The first gradient sets the bases and moves nothing, as in the public
    code: in the basis that one gradient makes of itself every second entry is rounding. The mean is kept in the weights'
    own axes and rotated when it is used, so that it needs no turning when the bases turn.
    """

    config: configs.SOAP
    norm = Spectral()
    compiles: ClassVar[bool] = False

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Mean, second moment in the bases (float32), Gram matrices and bases."""
        return {"mean": zeros_like_bank(param)} | init_bases(param)

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """The step in the weights' axes: float32 (K, m, n)."""
        steps = hyper.count - 1
        step = torch.zeros_like(grad, dtype=torch.float32)
        if int(steps):
            mean = state["mean"]
            mean.lerp_(grad.to(mean.dtype), 1 - self.config.beta1)
            update_second_moment(state["square"], to_eigenbases(grad, state), self.config.beta2)
            root = (state["square"] / (1 - self.config.beta2**steps)).sqrt_().add_(self.config.eps)
            step = from_eigenbases(to_eigenbases(mean, state) / root.clamp_min_(1e-30), state)
            step = step / (1 - self.config.beta1**steps)
        update_eigenbases(grad, state, hyper, self.config)
        return step


class SOAPMuon(Muon):
    """D = dual(Q_L [u' / (sqrt(v') + eps)] Q_R^T), u' = Q_L^T u Q_R for the average u, v' <- b2 v' + (1 - b2) u'^2.

    The core of the speedrun's track-3 record (result 46: SOAP on all hidden matrices). The bases learn after the step, so
    that the first is plain steepest descent. No bias correction: the dual ignores a common factor.
    """

    config: configs.SOAPMuon
    compiles: ClassVar[bool] = False

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The averages, the second moment in the bases (float32), Gram matrices and bases."""
        return super().init_state(param) | init_bases(param)

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """The dual of the preconditioned average: float32 (K, m, n)."""
        average = average_gradient(grad.float(), state, self.config, hyper.momentum).float()
        if int(hyper.count) > 1:
            inner = to_eigenbases(average, state)
            update_second_moment(state["square"], inner, self.config.beta2)
            average = from_eigenbases(inner / state["square"].sqrt().add_(self.config.eps).clamp_min_(1e-30), state)
        step = self.dual(average)
        update_eigenbases(grad, state, hyper, self.config)
        return step
