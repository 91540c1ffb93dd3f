"""Where weights live: constraint sets, how a step moves on them, and what the rule sees of the gradient there.

Stacks of matrices (K, m, n), float32. `Free` is no constraint, and the base of all.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from configs.groups import Group
from optim.newton_schulz import orthogonalize_svd
from optim.norms import Scope
from optim.shape import TINY, length


@dataclass(frozen=True, slots=True)
class Free:
    """All of space: W <- W - lr D."""

    plain: ClassVar[bool] = True
    """Whether a step is W - lr D and then `retract`, so that a rule may subtract in its own kernel."""

    @property
    def scope(self) -> Scope:
        """How finely a tensor may be cut and each part moved alone."""
        return "element"

    def along(self, axis: int) -> "Free":
        """The same constraint for tensors whose model dimension is `axis`, -1 or -2."""
        del axis
        return self

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """What it remembers of the first weights: names begin with `step_`."""
        del param
        return {}

    def enter(self, weights: Tensor) -> None:
        """Bring the first weights into the set, in place."""

    def see(self, weights: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The gradient as the rule sees it; memories of gradients may be moved to the present weights, in place."""
        del weights, state
        return grad

    def move(self, weights: Tensor, direction: Tensor, lr: Tensor, state: dict[str, Tensor]) -> None:
        """A step of length lr along -D within the set, in place."""
        weights.sub_(direction * lr)
        self.retract(weights, state)

    def retract(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        """Back into the set, in place."""


@dataclass(frozen=True, slots=True)
class Hyperball(Free):
    """Each matrix keeps the Frobenius norm that it started with (Wen et al. 2025: MuonH, AdamH): lr is an angle."""

    @property
    def scope(self) -> Scope:
        """Whole matrices."""
        return "matrix"

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The norm of each matrix."""
        return {"step_radius": param.float().norm(dim=(-2, -1), keepdim=True)}

    def retract(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        """W <- W r / |W|."""
        weights.mul_(state["step_radius"] / weights.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY))


@dataclass(frozen=True, slots=True)
class Radial(Free):
    """Each matrix's Frobenius norm changes by the radial part of its step alone: |W| <- |W| - lr <D, W> / |W|. What a
    straight step adds to that, by leaving the sphere tangentially, is taken back (speedrun track 3, results 44 to 46)."""

    plain: ClassVar[bool] = False

    @property
    def scope(self) -> Scope:
        """Whole matrices."""
        return "matrix"

    def move(self, weights: Tensor, direction: Tensor, lr: Tensor, state: dict[str, Tensor]) -> None:
        """W - lr D at the length that the radial part says."""
        before = length(weights, (-2, -1))
        inward = (direction * (weights / before.clamp_min(TINY))).sum(dim=(-2, -1), keepdim=True)
        weights.sub_(direction * lr)
        wanted = torch.where(before > 0, before - lr * inward, length(weights, (-2, -1))).clamp_min(TINY)
        weights.mul_(wanted / length(weights, (-2, -1)).clamp_min(TINY))


POLAR_STEPS = 8  # of Newton's cubic: from singular values of .5 to 1 - 1e-7


@dataclass(frozen=True, slots=True)
class Stiefel(Free):
    """All singular values are 1 (Bernstein 2025, "Modular Manifolds"); a step is W - lr D, and its polar factor."""

    @property
    def scope(self) -> Scope:
        """Whole matrices."""
        return "matrix"

    def enter(self, weights: Tensor) -> None:
        """The polar factor, exactly. Raises ValueError for a matrix without full rank, whose polar factor is not unique."""
        if (torch.linalg.matrix_rank(weights) < min(weights.shape[-2:])).any():
            raise ValueError("a matrix without full rank has no place on the Stiefel manifold: start with "
                             "--model.no_zero_init_projections")
        weights.copy_(orthogonalize_svd(weights))

    def retract(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        """X <- X (3 - X^T X) / 2, float32: a tangent step has singular values of at least 1 before it is scaled down."""
        X = weights.mT if weights.size(-2) < weights.size(-1) else weights.clone()
        X = X / (X.mT @ X).abs().sum(-1).amax(-1)[:, None, None].sqrt().clamp_min(TINY)
        for _ in range(POLAR_STEPS):
            X = torch.baddbmm(X, X, X.mT @ X, beta=1.5, alpha=-0.5)
        weights.copy_(X.mT if weights.size(-2) < weights.size(-1) else X)


@dataclass(frozen=True, slots=True)
class Sphere(Free):
    """Every vector along the model dimension has length 1 (nGPT, Loshchilov et al. 2024, arXiv 2410.01131).

    `retraction` normalise: w - lr d, divided by its length; geodesic: cos(lr |t|) w - sin(lr |t|) t / |t| along the great
    circle, with t the part of d that is tangent at w. Of what is radial, `tangent` removes: none; gradient: the
    gradient's, before the rule; momentum: also the average's, which was tangent elsewhere; dual: also the direction's,
    so that the step is steepest descent on the sphere.
    """

    axis: int = -1
    retraction: str = "normalise"
    tangent: str = "none"

    @property
    def plain(self) -> bool:
        """Whether nothing comes between direction and subtraction."""
        return self.retraction == "normalise" and self.tangent != "dual"

    @property
    def scope(self) -> Scope:
        """Rows, or where columns are the vectors, whole matrices."""
        return "row" if self.axis == -1 else "matrix"

    def along(self, axis: int) -> "Sphere":
        """Vectors along `axis`."""
        return replace(self, axis=axis)

    def enter(self, weights: Tensor) -> None:
        """w <- w / |w|. Raises ValueError for a zero vector, which has no direction."""
        if not self._length(weights).all():
            raise ValueError("a zero vector has no place on the sphere: start with --model.no_zero_init_projections")
        self.retract(weights, {})

    def see(self, weights: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The tangent part of the gradient, and of the averages, as `tangent` says."""
        if self.tangent in ("momentum", "dual"):
            for key, memory in state.items():
                if key.startswith(("momentum", "mean")):
                    memory.copy_(self._tangent(weights.float(), memory.float()))
        return grad if self.tangent == "none" else self._tangent(weights.float(), grad.float()).to(grad.dtype)

    def move(self, weights: Tensor, direction: Tensor, lr: Tensor, state: dict[str, Tensor]) -> None:
        """Along the tangent, where asked; then along the great circle, or straight and back."""
        if not self.plain:
            direction = self._tangent(weights, direction)
        if self.retraction == "geodesic":
            length = self._length(direction)
            angle = lr * length
            weights.mul_(angle.cos()).sub_(direction * (angle.sin() / length.clamp_min(TINY)))
        else:
            weights.sub_(direction * lr)
        self.retract(weights, state)

    def retract(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        """w <- w / |w|; padding stays zero. After a geodesic step it only undoes rounding."""
        weights.div_(self._length(weights).clamp_min(TINY))

    def _length(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=self.axis, keepdim=True)

    def _tangent(self, weights: Tensor, x: Tensor) -> Tensor:
        return x - weights * (weights * x).sum(self.axis, keepdim=True)


def build_constraint(group: Group) -> Free:
    """The constraint that a group's configuration describes."""
    if group.rule == "stiefel":
        return Stiefel()
    if group.constraint == "sphere":
        return Sphere(retraction=group.retraction, tangent=group.tangent)
    return {"hyperball": Hyperball, "radial": Radial, "stiefel": Stiefel, "none": Free}[group.constraint]()
