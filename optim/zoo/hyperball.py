"""Hyperball: matrices whose Frobenius norm stays what it was at the start."""

from dataclasses import dataclass

from torch import Tensor

from optim.constraint import TINY, Constraint


@dataclass(frozen=True, slots=True)
class Hyperball(Constraint):
    """Each matrix keeps the Frobenius norm that it started with (Wen et al. 2025: MuonH, AdamH): lr is an angle."""

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The norm of each matrix."""
        return {"step_radius": param.float().norm(dim=(-2, -1), keepdim=True)}

    def retract(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        """W <- W r / |W|."""
        weights.mul_(state["step_radius"] / weights.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY))
