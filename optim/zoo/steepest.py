"""Steepest descent under any norm: average the gradients, then step along the dual of the average.

Bernstein & Newhouse 2024, arXiv 2409.20325. For a norm ||.|| and dual(u) = argmax {<u, A> : ||A|| = 1}:

    u <- average of G (momentum);   D = dual(u);   W <- W - lr D

Spectral norm: Muon; sign: Signum; Frobenius: normalised SGD; row: modular duality's step for a lookup table; for Scion's
layers (Pethick et al. 2025, arXiv 2502.07529) lr = eta rho, weight_decay = 1 / rho, with rho the radius of its ball.

State: `momentum` as in Muon, (K, m, n), in the dtype of the weights. Shapes: K matrices m x n in one stack.
"""

from torch import Tensor

import configs.optim as configs
from optim.muon import average_gradient, init_average
from optim.norms import Row, build_norm
from optim.rule import Hyper, Rule


class Steepest(Rule):
    """Steepest descent with momentum: D = dual(average of the gradients)."""

    config: configs.Steepest

    def __init__(self, config: configs.Steepest) -> None:
        super().__init__(config)
        self.norm = build_norm(config.norm, config.unit, table=config.ns, steps=config.ns_steps, p=config.schatten_p)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the zero averages; empty if nothing is averaged."""
        return init_average(param, self.config)

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D = dual(average), (K, m, n)."""
        average = average_gradient(grad, state, self.config, hyper)
        # Rows of equal length: their singular values lie closer together, and Newton-Schulz converges better.
        return self.norm.dual(Row().dual(average) if self.config.equilibrate else average)
