"""Muown: Muon on the directions of the rows, Adam on their lengths.

arXiv 2605.10797, and the speedrun's track 3, result 23. Weight normalisation, row by row: W = g v / |v|.

    dL/dg = <G, v / |v|>;   dL/dv = (G - (v / |v|) dL/dg) g / |v|
    v <- v - lr Muon(dL/dv)                              momentum and orthogonalisation, configured as in Muon
    g <- g - lr Adam(dL/dg)
    v <- rho v / |v|,  rho = |v| at the start;   W <- g v / |v|

Difference to result 23: there |v| grows by a schedule of its own; here it stays rho, so that lr alone sets the angle of a
step. Result 23's unit is `match_adam`. Weight decay and constraints act on W and thereby on g.

State: `momentum` as in Muon (K, m, n); float32 and (K, m, 1): `mean` and `square`, Adam's moments of dL/dg, `gain` g,
`length` rho. v is not stored: it is rho times the direction of W. Shapes: K matrices m x n in one stack.
"""

import torch
from torch import Tensor

import configs.optim as configs
from optim.adam import Adam
from optim.muon import Muon
from optim.rule import Hyper

ZERO_ROW_GAIN = 0.33**0.5  # first length of rows that start at zero: that of the speedrun's random rows
TINY = 1e-30
LARGE = 1e18  # its square is finite in float32, as Adam needs


class Muown(Muon):
    """Muown (arXiv 2605.10797)."""

    config: configs.Muown

    def __init__(self, config: configs.Muown) -> None:
        super().__init__(config)
        self.gains = Adam(config)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return zero averages, and the row lengths of the weights as `gain` and `length`."""
        length = param.float().norm(dim=-1, keepdim=True)
        length = torch.where(length > 0, length, ZERO_ROW_GAIN)
        return super().init_state(param) | self.gains.init_state(length) | {"gain": length, "length": length.clone()}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D = (W - the new g v / |v|) / lr, float32 (K, m, n); zero where lr is 0."""
        weights, grad, rho_Km1 = param.float(), grad.float(), state["length"]
        # The length of the gain is read from W, which decay and rounding have changed since the last step; its sign, which
        # W cannot tell apart from that of v, from the state.
        row_norm_Km1 = weights.norm(dim=-1, keepdim=True)
        gain_Km1 = torch.where(row_norm_Km1 > 0, row_norm_Km1.copysign(state["gain"]), state["gain"])
        # Gradients of g and v.
        unit = weights / gain_Km1.where(gain_Km1 != 0, 1)
        grad_gain_Km1 = (grad * unit).sum(-1, keepdim=True)
        grad_v = (grad - unit * grad_gain_Km1) * (gain_Km1 / rho_Km1)
        # Their steps.
        v = unit * rho_Km1 - hyper.lr * super().direction(param, grad_v, state, hyper)
        gain_Km1 = gain_Km1 - hyper.lr * self.gains.direction(gain_Km1, grad_gain_Km1.clamp(-LARGE, LARGE), state, hyper)
        state["gain"].copy_(gain_Km1)
        moved = gain_Km1 * (v / v.norm(dim=-1, keepdim=True).clamp_min(TINY))
        # D as a difference of weights, because the common step subtracts lr D from W.
        return (weights - moved) * ((hyper.lr > 0) / hyper.lr.clamp_min(TINY))
