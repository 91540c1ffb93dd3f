"""Clipping: each tensor's gradient to the nearest point of a norm's ball."""

from dataclasses import dataclass

import torch
from torch import Tensor

from optim.constraint import Scope
from optim.norms import Norm


@dataclass(frozen=True, slots=True)
class Clip:
    """The projection onto {G: ||G|| <= radius}. For the Frobenius norm it is the usual rescaling (Pascanu et al. 2012,
    arXiv 1211.5063), here of each tensor alone; for the spectral norm it clips singular values."""

    norm: Norm
    radius: float

    @property
    def scope(self) -> Scope:
        """The norm's."""
        return self.norm.scope

    def __call__(self, grad: Tensor) -> Tensor:
        """The nearest gradient of size at most `radius`: (K, m, n) -> a new tensor of its dtype."""
        wide = grad.to(torch.float32 if grad.device.type == "mps" else torch.float64)  # squares of 1e30 overflow float32
        return (self.norm.project(wide / self.radius) * self.radius).to(grad.dtype)
