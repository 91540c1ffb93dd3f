"""The sphere: weights whose vectors along the model dimension have length 1, by retraction or along great circles."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.optim import RuleConfig
from optim.constraint import TINY, Constraint, Scope


@dataclass(frozen=True, slots=True)
class Sphere(Constraint):
    """Every vector along the model dimension has length 1 (nGPT, Loshchilov et al. 2024, arXiv 2410.01131).

    `retraction` normalise: w - lr d, divided by its length; geodesic: cos(lr |t|) w - sin(lr |t|) t / |t| along the great
    circle, with t the part of d that is tangent at w. Of what is radial, `tangent` removes: none; gradient: the
    gradient's, before the rule; momentum: also the average's, which was tangent elsewhere; dual: also the direction's,
    so that the step is steepest descent on the sphere.
    """

    axis: int = -1
    retraction: str = "normalise"
    tangent: str = "none"

    @classmethod
    def build(cls, config: RuleConfig) -> "Sphere":
        """The set that a rule's configuration describes."""
        return cls(retraction=config.extra.retraction, tangent=config.extra.tangent)

    @property
    def plain(self) -> bool:
        """Whether nothing comes between direction and subtraction."""
        return self.retraction == "normalise" and self.tangent != "dual"

    @property
    def scope(self) -> Scope:
        """Rows, or where columns are the vectors, whole matrices."""
        return "row" if self.axis == -1 else "matrix"

    def with_axis(self, axis: int) -> "Sphere":
        """Vectors along `axis`."""
        return replace(self, axis=axis)

    def project_start(self, weights: Tensor) -> None:
        """w <- w / |w|. Raises ValueError for a zero vector, which has no direction."""
        if not self._length(weights).all():
            raise ValueError("a zero vector has no place on the sphere: start with --model.no_zero_init_projections")
        self.retract(weights, {})

    def project_gradient(self, weights: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The tangent part of the gradient, and of the averages, as `tangent` says."""
        if self.tangent in ("momentum", "dual"):
            for key, average in state.items():
                if key.startswith(("momentum", "mean")):
                    average.copy_(self._tangent(weights.float(), average.float()))
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
