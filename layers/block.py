"""One layer of the Transformer: how attention and MLP write to the stream.

Shapes: B sequences, T tokens, C model dimension.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from configs.schema import Model
from layers.attention import Around, Attention
from layers.basic import MLP, Linear, Norm, parameter
from layers.sphere import ScaledLinear, SphereStep, unit

INJECT_START = 0.05  # weight of hashed embeddings wherever they are injected (speedrun, 2026)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `x0_skip` the input is first mixed with x0.

    On the sphere both sums are steps along it, and the mixture returns to it: nothing else needs a norm.
    """

    def __init__(self, config: Model, max_tokens: int, *, mixes_value_embed: bool, kernel: Callable, layer: int = 0) -> None:
        super().__init__()
        on_sphere, attends = config.geometry == "sphere", layer not in config.attention_free
        self.norm1, self.norm2 = (nn.Identity() if on_sphere else Norm(config) for _ in range(2))
        self.add1, self.add2 = make_add(config) if attends else None, make_add(config)
        self.norm_mixture = unit if on_sphere else nn.Identity()
        self.attention = Attention(config, max_tokens, mixes_value_embed=mixes_value_embed, kernel=kernel,
                                   layer=layer) if attends else None
        self.mlp = MLP(config, first=partial(ScaledLinear, constant=config.dim**0.5) if on_sphere else Linear)
        self.skip = parameter(torch.tensor([1.0, 0.0]), "scalar") if config.x0_skip else None
        self.inject = Inject(config) if config.inject and attends else None

    def forward(self, x_BTC: Tensor, around: Around) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.skip is not None:
            stream, start = self.skip.to(x_BTC.dtype)
            x_BTC = self.norm_mixture(stream * x_BTC + start * around.x0)
        if self.attention is not None:
            read = x_BTC if around.read is None else around.read
            x_BTC = self.add1(x_BTC, self.attention(self.norm1(read), around))
        if self.inject is not None:
            x_BTC = self.inject(x_BTC, around)
        return self.add2(x_BTC, self.mlp(self.norm2(x_BTC)))


def make_add(config: Model) -> Callable[[Tensor, Tensor], Tensor]:
    """How what attention or MLP says joins the stream."""
    if config.geometry == "sphere":
        return SphereStep(config)
    return Grow(config) if config.residual_growth else torch.add


class Grow(nn.Module):
    """a x + b y, a and b learned, a from the root of `residual_growth`: the stream grows by that factor in a layer, so that
    later layers write relatively less (speedrun, 2026: 1.1)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.weight = parameter(torch.tensor([config.residual_growth**0.5, 1.0]), "scalar")

    def forward(self, x_BTC: Tensor, y_BTC: Tensor) -> Tensor:
        """(B, T, C) twice -> (B, T, C)."""
        old, new = self.weight.to(x_BTC.dtype)
        return old * x_BTC + new * y_BTC


class Inject(nn.Module):
    """x + a x0 + b e after attention, e the hashed embeddings: what the tokens are, said again; a starts at 0, b at .05
    (speedrun, 2026)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.weight = parameter(torch.tensor([0.0, INJECT_START] if config.bigram_buckets else [0.0]), "scalar")

    def forward(self, x_BTC: Tensor, around: Around) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        weight = self.weight.to(x_BTC.dtype)
        x_BTC = x_BTC + weight[0] * around.x0
        return x_BTC if around.ngrams is None else x_BTC + weight[1] * around.ngrams
