"""One layer of the Transformer: how attention and MLP write to the stream.

Shapes: B sequences, T tokens, C model dimension.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from configs.schema import Model
from layers.attention import Attention
from layers.basic import MLP, Linear, Norm, parameter, unit
from layers.kernels import Mask
from layers.sphere import ScaledLinear, SphereStep


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `x0_skip` the input is first mixed with x0.

    On the sphere both sums are steps along it, and the mixture returns to it: nothing else needs a norm.
    """

    def __init__(self, config: Model, max_tokens: int, *, mixes_value_embed: bool, kernel: Callable) -> None:
        super().__init__()
        on_sphere = config.geometry == "sphere"
        self.norm1, self.norm2 = (nn.Identity() if on_sphere else Norm(config) for _ in range(2))
        self.add1, self.add2 = (SphereStep(config) if on_sphere else torch.add for _ in range(2))
        self.norm_mixture = unit if on_sphere else nn.Identity()
        self.attention = Attention(config, max_tokens, mixes_value_embed=mixes_value_embed, kernel=kernel)
        self.mlp = MLP(config, first=partial(ScaledLinear, constant=config.dim**0.5) if on_sphere else Linear)
        self.skip = parameter(torch.tensor([1.0, 0.0]), "scalar") if config.x0_skip else None

    def forward(self, x_BTC: Tensor, x0_BTC: Tensor, mask: Mask, value_embed_BTC: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.skip is not None:
            stream, start = self.skip.to(x_BTC.dtype)
            x_BTC = self.norm_mixture(stream * x_BTC + start * x0_BTC)
        x_BTC = self.add1(x_BTC, self.attention(self.norm1(x_BTC), mask, value_embed_BTC))
        return self.add2(x_BTC, self.mlp(self.norm2(x_BTC)))
