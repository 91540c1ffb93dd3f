"""The normalised Transformer: every vector of the stream has length 1, and a layer moves it along the sphere.

nGPT, Loshchilov et al. 2024, arXiv 2410.01131. The weights are kept at length 1 along the model dimension by the optimizer
(constraint sphere), so that every product here is a cosine, and learned factors give it its size.

Shapes: B sequences, T tokens, C model dimension, H heads, D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Model
from layers.basic import Linear, parameter, unit


class Scale(nn.Module):
    """Learned factors, `value` at the start, stored as `stored`: Adam's step of lr moves them by lr value / stored."""

    def __init__(self, size: int, *, value: float = 1.0, stored: float = 1.0) -> None:
        super().__init__()
        self.stored = parameter(torch.full((size,), stored), "scale")
        self.unit_of_storage = value / stored

    def forward(self) -> Tensor:
        """The factors, (size,), float32."""
        return self.stored * self.unit_of_storage


class ScaledLinear(Linear):
    """y = constant s * (W x), s learned factors, one for each output: s_u, s_v, s_z of the paper (equations 3, 20, 21).

    Computed as (constant s W) x: a matrix has fewer entries than its outputs for a batch.
    """

    def __init__(self, fan_in: int, fan_out: int, *, config: Model, role: str = "matrix", constant: float = 1.0,
                 scale: Scale | None = None) -> None:
        super().__init__(fan_in, fan_out, config=config, role=role)
        self.scale, self.constant = scale or Scale(fan_out), constant

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, (self.weight * (self.scale() * self.constant)[:, None]).to(x.dtype))


class SphereStep(nn.Module):
    """h <- n(h + |alpha| (n(x) - h)): from h towards what the layer suggests, alpha of the way, each dimension its own.

    alpha are the eigen learning rates: equations 10 and 11.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.alpha = Scale(config.dim, value=config.eigen_lr, stored=config.dim**-0.5)

    def forward(self, h_BTC: Tensor, x_BTC: Tensor) -> Tensor:
        """(B, T, C) of length 1, (B, T, C) -> (B, T, C) of length 1."""
        return unit(torch.lerp(h_BTC, unit(x_BTC), self.alpha().abs().to(h_BTC.dtype)))


class SphereQK(nn.Module):
    """s_qk n(q), s_qk n(k), the factors shared by both (equations 15 and 16).

    They act before the rotary embedding: after it, factors that differ within a rotated pair would make scores depend on
    absolute positions.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.head_dim, self.scale = config.head_dim, Scale(config.dim, stored=config.dim**-0.5)

    def forward(self, x_BTHD: Tensor) -> Tensor:
        """(B, T, H, D) -> (B, T, H, D)."""
        return unit(x_BTHD) * self.scale().view(-1, self.head_dim).to(x_BTHD.dtype)
