"""Causal self-attention and what it knows of position.

Shapes: B sequences, T tokens, C model dimension, H heads, D head dimension.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Model
from layers.basic import Linear, parameter, rms_norm
from layers.kernels import Mask
from layers.sphere import SphereQK


class Rotary(nn.Module):
    """Rotates pairs (x_i, x_{i + D/2}) by position times frequency, so that scores depend on relative position alone.

    Frequencies fall geometrically from 1 to 1/base; `half_rotary` has half as many, and the other pairs stand still
    (speedrun 2025).
    Su et al. 2021, arXiv 2104.09864.
    """

    def __init__(self, config: Model, max_tokens: int) -> None:
        super().__init__()
        moving = config.head_dim // (4 if config.position == "half_rotary" else 2)
        frequency = config.rotary_base ** -torch.linspace(0, 1, moving)
        frequency = F.pad(frequency, (0, config.head_dim // 2 - moving))
        angle_TF = torch.outer(torch.arange(max_tokens, dtype=torch.float32), frequency)
        cos, sin = angle_TF.cos(), angle_TF.sin()
        self.register_buffer("cos_TD", torch.cat((cos, cos), dim=-1), persistent=False)
        self.register_buffer("sin_TD", torch.cat((sin, -sin), dim=-1), persistent=False)

    def forward(self, x_BTHD: Tensor) -> Tensor:
        """(B, T, H, D) -> (B, T, H, D), rotated in float32."""
        x, length = x_BTHD.float(), x_BTHD.size(1)
        partner = x.roll(x.size(-1) // 2, dims=-1)
        return torch.addcmul(x * self.cos_TD[:length, None], partner, self.sin_TD[:length, None]).type_as(x_BTHD)


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(self, config: Model, max_tokens: int, *, mixes_value_embed: bool, kernel: Callable) -> None:
        super().__init__()
        self.q, self.k, self.v = (Linear(config.dim, config.dim, config=config) for _ in range(3))
        self.out = Linear(config.dim, config.dim, config=config, zero=True, axis=-2)
        self.head_dim, self.attend = config.head_dim, kernel
        on_sphere = config.geometry == "sphere"
        self.scale = config.attention_scale or config.head_dim ** (0.5 if on_sphere else -0.5)
        self.norm_qk = SphereQK(config) if on_sphere else rms_norm if config.qk_norm else None
        self.rotary = Rotary(config, max_tokens) if "rotary" in config.position else None
        self.value_mix = parameter(torch.tensor([0.5, 0.5]), "scalar") if mixes_value_embed else None

    def forward(self, x_BTC: Tensor, mask: Mask, value_embed_BTC: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        shape = (*x_BTC.shape[:2], -1, self.head_dim)
        q, k, v = self.q(x_BTC), self.k(x_BTC), self.v(x_BTC)
        if self.value_mix is not None:
            own, embed = self.value_mix.to(v.dtype)
            v = own * v + embed * value_embed_BTC
        q, k, v = q.view(shape), k.view(shape), v.view(shape)
        if self.norm_qk is not None:
            q, k = self.norm_qk(q), self.norm_qk(k)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        return self.out(self.attend(q, k, v, mask, self.scale).reshape_as(x_BTC))
