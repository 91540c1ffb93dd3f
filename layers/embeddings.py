"""What the stream starts from, beside the token's own vector: the token before it.

Shapes: B sequences, T tokens, C model dimension, H heads, D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Model
from layers.basic import parameter

HASH_CURRENT, HASH_PREVIOUS = 36_313, 27_191  # odd multipliers of the bigram hash (speedrun, Jan 2026)
SMEAR_DIMS = 12  # the smear gate reads so many leading dimensions (speedrun, Sep 2025)


class Smear(nn.Module):
    """x_t + lambda sigmoid(gate(x_t)) x_{t-1}, within a document; lambda starts at 0 (speedrun, Sep 2025)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.dims = min(SMEAR_DIMS, config.dim)
        self.gate = parameter(torch.zeros(1, self.dims), "gate")
        self.strength = parameter(torch.zeros(1), "scalar")

    def forward(self, x_BTC: Tensor, starts_BT: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        open_BT1 = self.strength.to(x_BTC.dtype) * F.linear(x_BTC[:, 1:, :self.dims], self.gate.to(x_BTC.dtype)).sigmoid()
        if starts_BT is not None:
            open_BT1 = open_BT1.masked_fill(starts_BT[:, 1:, None], 0)
        return x_BTC + F.pad(open_BT1 * x_BTC[:, :-1], (0, 0, 1, 0))


class BigramEmbedding(nn.Module):
    """A learned vector for each hashed pair (previous token, token); the last row is for tokens without a predecessor."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.table = parameter(torch.zeros(config.bigram_buckets, config.dim), "bigram_embed")

    def forward(self, tokens_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
        """(B, T) -> (B, T, C)."""
        pairs = tokens_BT[:, 1:] * HASH_CURRENT ^ tokens_BT[:, :-1] * HASH_PREVIOUS
        last = self.table.size(0) - 1
        bucket = F.pad(pairs % max(last, 1), (1, 0), value=last)
        if starts_BT is not None:
            bucket = bucket.masked_fill(starts_BT, last)
        # On CPUs the gradient's rows are added into the buffer that is there: no table-sized temporary.
        return F.embedding(bucket, self.table, sparse=self.table.grad is not None and self.table.device.type == "cpu")
