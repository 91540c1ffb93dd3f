"""Gradient clipping, one tensor at a time: the projection onto the ball of a norm.

    G <- the point nearest to G, in Frobenius distance, of {X: ||X|| <= radius}

Under the Frobenius norm this is the usual rescaling (Pascanu et al. 2012, arXiv 1211.5063), but of each tensor alone, not of
all together; under the spectral norm it clips singular values, under the sign norm entries. No state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from optim.constraint import Scope
from optim.norms import Norm


@dataclass(frozen=True, slots=True)
class Clip:
    """Projection of gradients onto the ball {G: ||G|| <= radius}."""

    norm: Norm
    """Norm of the ball."""
    radius: float
    """Radius of the ball, in units of the norm."""

    @property
    def scope(self) -> Scope:
        """Smallest part of a tensor that can be clipped alone: that of the norm."""
        return self.norm.scope

    def __call__(self, grad: Tensor) -> Tensor:
        """Return the nearest gradient with norm at most `radius`: (K, m, n) -> a new tensor of its dtype."""
        # In float64, because the norms square the entries and the square of 1e30 overflows float32; MPS has no float64.
        wide = grad.to(torch.float32 if grad.device.type == "mps" else torch.float64)
        return (self.norm.project(wide / self.radius) * self.radius).to(grad.dtype)
