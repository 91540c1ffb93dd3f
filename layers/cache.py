"""Keys and values of tokens that were read before, so that one more token costs one token's work.

Shapes: B sequences, T new tokens, t tokens read before, H heads, D head dimension.
"""

import torch
from torch import Tensor

from configs.model import Model

LOOKS_BACK = 5  # embeddings read at most so many earlier tokens: hashed n-grams up to 6


class LayerCache:
    """Keys and values of one layer."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens read before."""
        return 0 if self.k is None else self.k.size(1)

    def extend(self, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last: (B, t + T, H, D) each."""
        self.k = k_BTHD if self.k is None else torch.cat((self.k, k_BTHD), dim=1)
        self.v = v_BTHD if self.v is None else torch.cat((self.v, v_BTHD), dim=1)
        return self.k, self.v


class Cache:
    """What a model remembers of one batch of sequences."""

    def __init__(self, layers: int) -> None:
        self.tokens_Bt: Tensor | None = None
        self.layers = [LayerCache() for _ in range(layers)]


def strays(config: Model) -> list[str]:
    """What a cache cannot follow: masked documents, and heads that read more than their own keys as they were."""
    names = ("document_mask", "paired_heads", "dynamic_heads", "key_offset", "yarn")
    return [name for name in names if getattr(config, name)] + ["position learned"] * (config.position == "learned")


def caches(config: Model) -> bool:
    """Whether a cache can follow the model."""
    return not strays(config)


def refuse_cache(config: Model, *, tokens: int, most: int) -> None:
    """Raise ValueError where a cache of so many tokens would not be the model."""
    if found := strays(config):
        raise ValueError(f"a cache cannot follow {', '.join(found)}; read the whole context anew for every token")
    if tokens > most:
        raise ValueError(f"a context of {tokens} tokens; this model was built for {most}")


def later_mask(new: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """True where a new query may see a key: it is not later, and within the window; (1, 1, T, t + T)."""
    i = torch.arange(before, before + new, device=device)[:, None]
    j = torch.arange(before + new, device=device)
    return ((j <= i) & (i - j < (window or before + new)))[None, None]
