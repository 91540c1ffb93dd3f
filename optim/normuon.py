"""NorMuon: Muon's direction, with the rows (output neurons) scaled to equal length by a running second moment."""

from torch import Tensor

import configs.optim as configs
from optim.muon import Muon
from optim.rule import Hyper

TINY = 1e-30  # smaller than any length that matters: a zero row or matrix is divided by it and stays zero


class NorMuon(Muon):
    """Direction D = O / (sqrt(v) + eps), rescaled to the Frobenius norm of Muon's direction O.

    v <- b2 v + (1 - b2) mean(O^2), one number for each row (Li et al. 2025, arXiv 2510.05491, algorithm 1, with unit
    `spectral`). The paper scales D to RMS .2, which is unit `match_adam`; its public code scales it to ||O||_F, as here, in
    any unit. v needs no bias correction, because the rescaling removes a common factor.

    With `normalise="longer"` v has one number for each slice across the longer side: for each row of a tall matrix, each
    column of a wide one, as in the speedrun and nanochat. Rows of a wide orthogonalised matrix already have equal length.
    """

    config: configs.NorMuon

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return Muon's state and the zero second moment, float32: (K, m, 1) for rows, (K, 1, n) for columns."""
        square = param.float().mean(self._dim(param), keepdim=True).zero_()
        return super().init_state(param) | {"slice_square": square}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Update the state in place and return O / (sqrt(v) + eps) at O's Frobenius norm, float32 (K, m, n)."""
        dual = super().direction(param, grad, state, hyper).float()
        square = state["slice_square"]
        square.lerp_(dual.square().mean(self._dim(dual), keepdim=True), 1 - self.config.beta2)
        normalised = dual / (square.sqrt() + self.config.eps).clamp_min(TINY)
        length = normalised.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY)
        # The rescaling keeps the step's length Muon's, so that a learning rate tuned for Muon stays right.
        return normalised.mul_(dual.norm(dim=(-2, -1), keepdim=True) / length)

    def _dim(self, stack: Tensor) -> int:
        """Return the dimension over which the second moment averages: -1 for rows, -2 for columns."""
        return -2 if self.config.normalise == "longer" and stack.size(-2) < stack.size(-1) else -1
