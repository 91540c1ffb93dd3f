"""Muon^2: Adam's second moment before the orthogonalization."""

from torch import Tensor

import configs.optim as configs
from optim.muon import Muon, average_gradient
from optim.rule import Hyper, update_second_moment, zeros_like_bank


class Muon2(Muon):
    """D = dual(average / (sqrt(v) + eps)) with v <- b2 v + (1 - b2) g^2, element by element.

    arXiv 2604.09967, and the speedrun's track 3, result 7, whose order and defaults are these. No bias correction: the
    dual ignores a common factor. As the average is taken before the division, the present v serves all of it.
    """

    config: configs.Muon2

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The averages of the gradient, and of its square."""
        return super().init_state(param) | {"square": zeros_like_bank(param)}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """dual(average / (sqrt(v) + eps)): float32 (K, m, n)."""
        grad = grad.float()
        update_second_moment(state["square"], grad, self.config.beta2)
        average = average_gradient(grad, state, self.config, hyper.momentum)
        return self.dual(average.float() / state["square"].float().sqrt().add_(self.config.eps).clamp_min_(1e-30))
