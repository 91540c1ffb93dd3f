"""Causal self-attention and what it knows of position.

Shapes: B sequences, T tokens, C model dimension, H heads, D head dimension.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Model
from layers.basic import Linear, parameter, rms_norm
from layers.cache import LayerCache
from layers.heads import (
    DynamicHeads,
    ExclusiveHeads,
    HeadGates,
    ValueGates,
    ValueMix,
    offset_keys,
    pair_heads,
    unpair_heads,
)
from layers.kernels import Mask, attend_sdpa, attends_far
from layers.sphere import SphereQK

YARN_ALPHA, YARN_BETA = 1, 32  # rotations within the first window: below, interpolated; above, kept (arXiv 2309.00071)


class Around(NamedTuple):
    """What a layer reads beside the stream."""

    mask: Mask = None
    window: int | None = None
    """The layer's sliding window; None: none."""
    starts: Tensor | None = None
    """(B, T): true where a document begins, if documents are masked."""
    value_embed: Tensor | None = None
    """(B, T, C), as the others: what a second embedding says of the tokens."""
    x0: Tensor | None = None
    """The stream's start."""
    ngrams: Tensor | None = None
    """What the hashed embeddings say."""
    read: Tensor | None = None
    """An earlier stream that attention reads in place of the present one."""
    cache: LayerCache | None = None
    """Keys and values of earlier tokens, in generation."""


class Rotary(nn.Module):
    """Rotates pairs (x_i, x_{i + D/2}) by position times frequency, so that scores depend on relative position alone.

    Frequencies fall geometrically from 1 to 1/base; `half_rotary` has half as many, and the other pairs stand still
    (speedrun 2025). Su et al. 2021, arXiv 2104.09864. With `first_window` w0 (YaRN, Peng et al. 2023, arXiv 2309.00071), at
    a window w the pairs that turn less than once in w0 are slowed by w0 / w, those that turn 32 times are not.
    """

    def __init__(self, config: Model, max_tokens: int, *, first_window: int | None = None) -> None:
        super().__init__()
        moving = config.head_dim // (4 if config.position == "half_rotary" else 2)
        frequency = config.rotary_base ** -torch.linspace(0, 1, moving)
        frequency = F.pad(frequency, (0, config.head_dim // 2 - moving))
        self.first_window = first_window
        self.register_buffer("still_D", (frequency == 0).repeat(2), persistent=False)
        if first_window:
            self.register_buffer("frequency", frequency, persistent=False)
            self.register_buffer("positions_T", torch.arange(max_tokens, dtype=torch.float32), persistent=False)
        else:
            cos, sin = rotation(torch.arange(max_tokens, dtype=torch.float32), frequency)
            self.register_buffer("cos_TD", cos, persistent=False)
            self.register_buffer("sin_TD", sin, persistent=False)

    def forward(self, x_BTHD: Tensor, window: int | None = None, first: int = 0) -> Tensor:
        """(B, T, H, D) -> (B, T, H, D), rotated in float32; the first token stands at position `first`."""
        x, at = x_BTHD.float(), slice(first, first + x_BTHD.size(1))
        if self.first_window:
            cos_TD, sin_TD = rotation(self.positions_T[at], self.slowed(window or self.first_window))
        else:
            cos_TD, sin_TD = self.cos_TD[at], self.sin_TD[at]
        partner = x.roll(x.size(-1) // 2, dims=-1)
        return torch.addcmul(x * cos_TD[:, None], partner, sin_TD[:, None]).type_as(x_BTHD)

    def slowed(self, window: int) -> Tensor:
        """YaRN's frequencies at a window, (D/2,)."""
        kept = (self.first_window * self.frequency / (2 * math.pi) - YARN_ALPHA) / (YARN_BETA - YARN_ALPHA)
        share = self.first_window / window
        return self.frequency * (share + kept.clamp(0, 1) * (1 - share))

    def warmth(self, window: int | None) -> float:
        """YaRN's factor of the softmax scale at a window: 1 + .2 log(w / w0)."""
        return 1.0 if not (self.first_window and window) else 1 + 0.2 * math.log(window / self.first_window)


def rotation(positions_T: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines, and sines with the sign of each half, (T, D) each."""
    angle_TF = torch.outer(positions_T, frequency)
    cos, sin = angle_TF.cos(), angle_TF.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762), with the pieces of layers/heads.py."""

    def __init__(self, config: Model, max_tokens: int, *, mixes_value_embed: bool, kernel: Callable, layer: int = 0) -> None:
        super().__init__()
        self.q, self.k, self.v = (Linear(config.dim, config.dim, config=config) for _ in range(3))
        self.out = Linear(config.dim, config.dim, config=config, zero=True, axis=-2)
        self.head_dim, self.attend = config.head_dim, kernel
        on_sphere, far = config.geometry == "sphere", attends_far(config, layer)
        self.scale = config.attention_scale or config.head_dim ** (0.5 if on_sphere else -0.5)
        self.norm_qk = SphereQK(config) if on_sphere else rms_norm if config.qk_norm else None
        self.paired = layer in config.paired_heads
        first_window = (config.long_window_tokens if far else config.window_tokens) if config.yarn else None
        length = max_tokens * (2 if self.paired else 1)
        self.rotary = Rotary(config, length, first_window=first_window) if "rotary" in config.position else None
        self.offsets_keys = config.key_offset and far and not self.paired
        self.mix_value = (ValueGates(config) if config.value_gates else ValueMix()) if mixes_value_embed else None
        self.dynamic = DynamicHeads(config) if layer in config.dynamic_heads else None
        self.exclusive = ExclusiveHeads(config) if config.xsa and not self.paired else None
        self.gates = HeadGates(config) if config.head_gates else None
        self.gains = parameter(torch.ones(2), "scalar") if config.projection_gains else None

    def forward(self, x_BTC: Tensor, around: Around) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q, k, v = self._queries_keys_values(x_BTC, around)
        scale = self.scale * (self.rotary.warmth(around.window) if self.rotary is not None else 1)
        if around.cache is None:
            y = self.attend(q, k, v, around.mask, scale)
        else:  # few queries, many keys: the mask is dense, whatever the kernel of training
            y = attend_sdpa(q, *around.cache.extend(k, v), around.mask, scale)
        if self.dynamic is not None:
            y = y + self.dynamic((q, k, v), x_BTC, around.starts, scale)
        y = unpair_heads(y) if self.paired else y
        y = y if self.exclusive is None else self.exclusive(y, v)
        y = y if self.gates is None else self.gates(y, x_BTC)
        y_BTC = self.out(y.reshape_as(x_BTC))
        return y_BTC if self.gains is None else self.gains[1].to(y_BTC.dtype) * y_BTC

    def _queries_keys_values(self, x_BTC: Tensor, around: Around) -> tuple[Tensor, Tensor, Tensor]:
        """As the kernel takes them: (B, T, H, D), or for paired heads (B, 2T, H/2, D)."""
        read = x_BTC if self.gains is None else self.gains[0].to(x_BTC.dtype) * x_BTC
        q, k, v = (project(read).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        if self.mix_value is not None:
            v = self.mix_value(v, around.value_embed, x_BTC)
        if self.norm_qk is not None:
            q, k = self.norm_qk(q), self.norm_qk(k)
        if self.paired:
            q, k, v = pair_heads(q), pair_heads(k), pair_heads(v)
        if self.rotary is not None:
            first = 0 if around.cache is None else around.cache.tokens
            q, k = (self.rotary(x, around.window, first) for x in (q, k))
        if self.offsets_keys:
            k = offset_keys(k, self.rotary.still_D, around.starts)
        return q, k, v
