"""Hyperball: every matrix keeps the Frobenius norm r that it had at the start (MuonH and AdamH, Wen et al. 2025).

    W <- W - lr D;  W <- W r / ||W||_F

As the norm is fixed, lr sets the angle by which a step turns the matrix. A zero matrix stays zero.

State: `step_radius` r (K, 1, 1), float32. Shapes: K matrices m x n in one stack.
"""

from dataclasses import dataclass

from torch import Tensor

from optim.constraint import TINY, Constraint


@dataclass(frozen=True, slots=True)
class Hyperball(Constraint):
    """Constraint that keeps the Frobenius norm of each matrix."""

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the norm of each matrix, (K, 1, 1)."""
        return {"step_radius": param.float().norm(dim=(-2, -1), keepdim=True)}

    def retract(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        """Scale the weights back to their first norm, in place."""
        weights.mul_(state["step_radius"] / weights.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY))
