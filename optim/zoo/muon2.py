"""Muon^2: the momentum is divided by Adam's second moment before it is orthogonalised.

arXiv 2604.09967, and the speedrun's track 3, result 7, whose order of operations and defaults these are. Entry by entry:

    v <- b2 v + (1 - b2) G^2
    u  = Muon's average of the gradients                 momentum, with Nesterov's look-ahead if configured
    D  = orthogonalise(u / (sqrt(v) + eps)) * unit;      W <- W - lr D

No bias correction of v: orthogonalisation ignores a common factor.

State: `momentum` as in Muon, `square` v; both (K, m, n), in the dtype of the weights.
"""

from torch import Tensor

import configs.optim as configs
from optim.muon import Muon, average_gradient
from optim.rule import Hyper, update_second_moment, zeros_like_bank


class Muon2(Muon):
    """Muon^2 (arXiv 2604.09967)."""

    config: configs.Muon2

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return momentum and second moment, all zero."""
        return super().init_state(param) | {"square": zeros_like_bank(param)}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D, float32 (K, m, n)."""
        grad = grad.float()
        # The average is of raw gradients and divided last, so that the newest v scales all of it, old gradients too.
        update_second_moment(state["square"], grad, self.config.beta2)
        average = average_gradient(grad, state, self.config, hyper)
        return self.dual(average.float() / state["square"].float().sqrt().add_(self.config.eps).clamp_min_(1e-30))
