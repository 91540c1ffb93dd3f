"""Steepest descent: average the gradient, then step to the dual of any norm.

With the norm it is Muon (spectral), Scion's layers, Signum (sign), normalised SGD (Frobenius) or modular duality's step
for a lookup table (row). Bernstein & Newhouse 2024, arXiv 2409.20325; Pethick et al. 2025, arXiv 2502.07529.
"""

from torch import Tensor

import configs.optim as configs
from optim.muon import average_gradient, init_average
from optim.norms import Row, build_norm
from optim.rule import Hyper, Rule


class Steepest(Rule):
    """D = dual(average of the gradients)."""

    config: configs.Steepest

    def __init__(self, config: configs.Steepest) -> None:
        super().__init__(config)
        self.norm = build_norm(config.norm, config.unit, table=config.ns, steps=config.ns_steps, p=config.schatten_p)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The running averages, if any."""
        return init_average(param, self.config)

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """dual(average): (K, m, n) -> (K, m, n)."""
        average = average_gradient(grad, state, self.config, hyper.momentum)
        return self.norm.dual(Row().dual(average) if self.config.equilibrate else average)
