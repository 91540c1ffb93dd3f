"""SOAP-Muon: momentum, divided by SOAP's second moment in SOAP's bases, then orthogonalised as in Muon.

The core of the speedrun's track-3 record (result 46, on all hidden matrices). With the average u of Muon and the bases Q_L
and Q_R of optim/zoo/soap.py:

    v <- b2 v + (1 - b2) (Q_L^T u Q_R)^2
    D  = orthogonalise(Q_L [Q_L^T u Q_R / (sqrt(v) + eps)] Q_R^T) * unit;   W <- W - lr D

There is no bias correction, because orthogonalisation ignores the scale.

State: `momentum` (K, m, n), in the dtype of the weights; float32: `square` v (K, m, n), in the axes of the bases;
`gram_left`, `basis_left` Q_L (K, m, m); `gram_right`, `basis_right` Q_R (K, n, n). Shapes: K matrices m x n in one stack.
"""

from typing import ClassVar

from torch import Tensor

import configs.optim as configs
from optim.muon import Muon, average_gradient
from optim.rule import Hyper, update_second_moment
from optim.zoo.soap import from_eigenbases, init_bases, to_eigenbases, update_eigenbases


class SOAPMuon(Muon):
    """SOAP-Muon (speedrun track 3, result 46). Its first step is Muon's, as the bases are updated after the step."""

    config: configs.SOAPMuon
    compiles: ClassVar[bool] = False

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return zero averages, and `init_bases`."""
        return super().init_state(param) | init_bases(param)

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D, float32 (K, m, n)."""
        average = average_gradient(grad.float(), state, self.config, hyper).float()
        if int(hyper.count) > 1:
            rotated = to_eigenbases(average, state)
            update_second_moment(state["square"], rotated, self.config.beta2)
            average = from_eigenbases(rotated / state["square"].sqrt().add_(self.config.eps).clamp_min_(1e-30), state)
        step = self.dual(average)
        update_eigenbases(grad, state, hyper, self.config)
        return step
