"""Sphere: weights whose vectors along the model dimension have length 1, as in nGPT.

Loshchilov et al. 2024, arXiv 2410.01131. For each vector w with direction d, and t = d - w <w, d> its tangential part:

    retraction normalise    w <- w - lr d;  w <- w / |w|                               nGPT's own
    retraction geodesic     w <- cos(lr |t|) w - sin(lr |t|) t / |t|                   along the great circle

`tangent` says from what the radial part is removed (x <- x - w <w, x>), each choice including those before it:

    none        nothing: nGPT's own
    gradient    the gradient, before the rule
    momentum    also the averages of the gradient, which were tangential at earlier weights
    dual        also the direction: the step is then steepest descent on the sphere

No state of its own. Shapes: K matrices m x n in one stack, float32; `axis` -1: rows are the vectors, -2: columns.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.optim import RuleConfig
from optim.constraint import TINY, Constraint, Scope


@dataclass(frozen=True, slots=True)
class Sphere(Constraint):
    """Constraint under which every vector along the model dimension has length 1."""

    axis: int = -1
    """Dimension of the vectors: -1 rows, -2 columns."""
    retraction: str = "normalise"
    """normalise: a straight step, then division by the length; geodesic: a step along the great circle."""
    tangent: str = "none"
    """Tensors from which the radial part is removed: none, gradient, momentum or dual; see the top of this file."""

    @classmethod
    def build(cls, config: RuleConfig) -> "Sphere":
        """Return the constraint that a rule's config describes."""
        return cls(retraction=config.extra.retraction, tangent=config.extra.tangent)

    @property
    def plain(self) -> bool:
        """True if a step is W - lr D and then `retract`, so that a rule may subtract in a kernel of its own."""
        return self.retraction == "normalise" and self.tangent != "dual"

    @property
    def scope(self) -> Scope:
        """Smallest part of a tensor that can be moved alone: rows; whole matrices if columns are the vectors."""
        return "row" if self.axis == -1 else "matrix"

    def with_axis(self, axis: int) -> "Sphere":
        """Return the constraint for vectors along `axis`."""
        return replace(self, axis=axis)

    def project_start(self, weights: Tensor) -> None:
        """Scale every vector to length 1, in place. Raises ValueError for a zero vector, which has no direction."""
        if not self._length(weights).all():
            raise ValueError("a zero vector has no place on the sphere: start with --model.no_zero_init_projections")
        self.retract(weights, {})

    def project_gradient(self, weights: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return the gradient, and change the averages in `state` in place, without radial part as `tangent` says."""
        if self.tangent in ("momentum", "dual"):
            for key, average in state.items():
                if key.startswith(("momentum", "mean")):
                    average.copy_(self._tangent(weights.float(), average.float()))
        return grad if self.tangent == "none" else self._tangent(weights.float(), grad.float()).to(grad.dtype)

    def move(self, weights: Tensor, direction: Tensor, lr: Tensor, state: dict[str, Tensor]) -> None:
        """Take one step of length lr along -`direction`, in place, as `retraction` and `tangent` say."""
        if not self.plain:
            direction = self._tangent(weights, direction)
        if self.retraction == "geodesic":
            length = self._length(direction)
            angle = lr * length
            weights.mul_(angle.cos()).sub_(direction * (angle.sin() / length.clamp_min(TINY)))
        else:
            weights.sub_(direction * lr)
        self.retract(weights, state)  # after a geodesic step this only removes rounding errors

    def retract(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        """w <- w / |w|, in place; zero vectors, which pad a stack, stay zero."""
        weights.div_(self._length(weights).clamp_min(TINY))

    def _length(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=self.axis, keepdim=True)

    def _tangent(self, weights: Tensor, x: Tensor) -> Tensor:
        return x - weights * (weights * x).sum(self.axis, keepdim=True)
