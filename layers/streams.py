"""Connections between layers beside the residual stream: skips, backout, dense connections, a shared attention input.

`kept[0]` is the stream before the first layer, `kept[i + 1]` after layer i.

Shapes: B sequences, T tokens, C model dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.notation import parse_skips
from configs.schema import Model
from layers.basic import parameter, rms_norm

BACKOUT_START = 0.5  # speedrun, Oct 2025
MUDD_DIM, MUDD_SCALE = 64, 0.1  # the speedrun's inner width and scale of dynamic weights, 2026


def connects(config: Model) -> bool:
    """Whether a run has any connection beside the residual stream."""
    return bool(config.skips) or config.dense != "none" or not (config.backout is config.shared_attention_input is None)


class Streams(nn.Module):
    """All connections of a run that has any; layers call `enter` and `leave`, the head `finish`."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.pairs = parse_skips(config.skips, config.layers)
        start = torch.tensor(config.skip_weight)
        self.skips = nn.ParameterList(parameter(start.clone(), "scalar") for _ in self.pairs)
        self.shared, self.back = config.shared_attention_input, config.backout
        self.backout = None if self.back is None else parameter(torch.tensor(BACKOUT_START), "scalar")
        made = {"denseformer": StaticMixture, "mudd": DynamicMixture}.get(config.dense)
        self.mixtures = nn.ModuleList(made(config, layer + 2) for layer in range(config.layers)) if made else None

    def enter(self, layer: int, kept: list[Tensor]) -> Tensor:
        """The stream that a layer reads: the last one, and the skips that end there."""
        x_BTC = kept[-1]
        for (source, target), weight in zip(self.pairs, self.skips, strict=True):
            if target == layer:
                x_BTC = x_BTC + weight.to(x_BTC.dtype) * kept[source + 1]
        return x_BTC

    def read(self, layer: int, kept: list[Tensor]) -> Tensor | None:
        """What attention reads in place of the stream, if anything: the same earlier stream for all later layers."""
        return kept[self.shared + 1] if self.shared is not None and layer > self.shared else None

    def leave(self, layer: int, kept: list[Tensor]) -> None:
        """The last entry, just written by the layer, replaced by its mixture with the earlier ones."""
        if self.mixtures is not None:
            kept[-1] = self.mixtures[layer](kept)

    def finish(self, kept: list[Tensor]) -> Tensor:
        """What the head reads, before its norm."""
        if self.backout is None:
            return kept[-1]
        return kept[-1] - self.backout.to(kept[-1].dtype) * kept[self.back + 1]


class StaticMixture(nn.Module):
    """sum_j a_j x_j over all streams so far, a_j learned, from the last alone (DenseFormer, Pagliardini et al. 2024,
    arXiv 2402.02622, equation 2)."""

    def __init__(self, config: Model, streams: int) -> None:
        super().__init__()
        del config
        self.weight = parameter(F.one_hot(torch.tensor(streams - 1), streams).float(), "scalar")

    def forward(self, kept: list[Tensor]) -> Tensor:
        """`streams` tensors (B, T, C) -> (B, T, C)."""
        return sum(w * x for w, x in zip(self.weight.to(kept[0].dtype), kept, strict=True))


class DynamicMixture(StaticMixture):
    """The same with weights that each token chooses: a_j + s W_2 gelu(W_1 norm(x)) (MUDD, Xiao et al. 2025,
    arXiv 2502.12170, its way into the residual stream); W_2 starts at 0."""

    def __init__(self, config: Model, streams: int) -> None:
        super().__init__(config, streams)
        self.up = parameter(torch.randn(MUDD_DIM, config.dim) * config.dim**-0.5, "gate")
        self.down = parameter(torch.zeros(streams, MUDD_DIM), "gate")

    def forward(self, kept: list[Tensor]) -> Tensor:
        """`streams` tensors (B, T, C) -> (B, T, C)."""
        dtype = kept[0].dtype
        hidden = F.gelu(F.linear(rms_norm(kept[-1]), self.up.to(dtype)))
        weight_BTS = self.weight.to(dtype) + MUDD_SCALE * F.linear(hidden, self.down.to(dtype))
        return sum(w[..., None] * x for w, x in zip(weight_BTS.unbind(-1), kept, strict=True))
