"""Muown: Muon on the directions of the rows, Adam on their lengths."""

import torch
from torch import Tensor

import configs.optim as configs
from optim.adam import Adam
from optim.muon import Muon
from optim.rule import Hyper

ZERO_ROW_GAIN = 0.33**0.5  # of rows that start at zero: the length of the speedrun's random rows
TINY = 1e-30
LARGE = 1e18  # its square is a float32


class Muown(Muon):
    """W = g v / |v| row by row (weight normalisation): v <- v - lr dual(average of dL/dv), g <- g - lr Adam(dL/dg).

    arXiv 2605.10797, and the speedrun's track 3, result 23. Here |v| stays what it was at the start, so that lr alone sets
    the angle of a step, where result 23 grows |v| by a schedule of its own. Its unit is `match_adam` of norm spectral.
    Weight decay and constraints act on the weights, hence on g.
    """

    config: configs.Muown

    def __init__(self, config: configs.Muown) -> None:
        super().__init__(config)
        self.gains = Adam(config)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The averages of dL/dv, Adam's moments of dL/dg, g and |v|: the last four float32 (K, m, 1)."""
        length = param.float().norm(dim=-1, keepdim=True)
        length = torch.where(length > 0, length, ZERO_ROW_GAIN)
        return super().init_state(param) | self.gains.init_state(length) | {"gain": length, "length": length.clone()}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """(W - g' v' / |v'|) / lr, zero where lr is: float32 (K, m, n)."""
        weights, grad, length = param.float(), grad.float(), state["length"]
        size = weights.norm(dim=-1, keepdim=True)
        gain = torch.where(size > 0, size.copysign(state["gain"]), state["gain"])  # decay and rounding moved the weights
        unit = weights / gain.where(gain != 0, 1)
        grad_gain = (grad * unit).sum(-1, keepdim=True)
        grad_v = (grad - unit * grad_gain) * (gain / length)
        v = unit * length - hyper.lr * super().direction(param, grad_v, state, hyper)
        gain = gain - hyper.lr * self.gains.direction(gain, grad_gain.clamp(-LARGE, LARGE), state, hyper)
        state["gain"].copy_(gain)
        moved = gain * (v / v.norm(dim=-1, keepdim=True).clamp_min(TINY))
        return (weights - moved) * ((hyper.lr > 0) / hyper.lr.clamp_min(TINY))
