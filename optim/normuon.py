"""NorMuon: Muon's direction with its neurons brought to the same length, on average over the steps."""

from torch import Tensor

import configs.optim as configs
from optim.muon import Muon
from optim.rule import Hyper

TINY = 1e-30


class NorMuon(Muon):
    """O = Muon's direction, v <- b2 v + (1 - b2) mean(O^2), D = O / (sqrt(v) + eps) scaled to ||O||_F.

    Li et al. 2025, arXiv 2510.05491, algorithm 1: one v for each row (output neuron), unit spectral. The paper gives D
    the RMS .2, which is unit `match_adam`; its public code gives it ||O||_F, as here, in any unit. No bias correction: a
    common factor of v cancels.

    `longer`: one v for each slice across the longer side, rows of tall and columns of wide matrices, as the speedrun
    and nanochat do: in an orthogonalised matrix the slices across the shorter side have the same length already.
    """

    config: configs.NorMuon

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Muon's, and the second moment, float32: (K, m, 1), or (K, 1, n) for columns."""
        square = param.float().mean(self._dim(param), keepdim=True).zero_()
        return super().init_state(param) | {"slice_square": square}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """O / (sqrt(v) + eps) at the size of O: float32 (K, m, n)."""
        dual = super().direction(param, grad, state, hyper).float()
        square = state["slice_square"]
        square.lerp_(dual.square().mean(self._dim(dual), keepdim=True), 1 - self.config.beta2)
        even = dual / (square.sqrt() + self.config.eps).clamp_min(TINY)
        size = even.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY)
        return even.mul_(dual.norm(dim=(-2, -1), keepdim=True) / size)

    def _dim(self, stack: Tensor) -> int:
        """The dimension that the second moment averages over."""
        return -2 if self.config.normalise == "longer" and stack.size(-2) < stack.size(-1) else -1
