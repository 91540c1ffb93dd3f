"""What the stream starts from, beside the token's own vector: the tokens before it.

Shapes: B sequences, T tokens, C model dimension, H heads, D head dimension.
"""

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Model
from layers.basic import parameter

# Odd multipliers of the hash, the present token's first: the speedrun's for two tokens (Jan 2026), and more.
HASH = (36_313, 27_191, 50_021, 41_231, 62_989, 33_461)
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


class NgramEmbedding(nn.Module):
    """A learned vector for each hashed n-gram ending at a token; the last row is for tokens without n - 1 predecessors.

    With signs, row r of a fixed random table of +-1 multiplies it, r another hash of the same tokens: n-grams that share a
    vector then differ in sign patterns (speedrun, 2026).
    """

    def __init__(self, config: Model, order: int = 2) -> None:
        super().__init__()
        self.order = order
        dtype = getattr(torch, config.table_dtype)
        self.table = parameter(torch.zeros(config.bigram_buckets, config.dim, dtype=dtype), "bigram_embed")
        signs = fixed_signs(config.bigram_signs, config.dim, seed=order) if config.bigram_signs else None
        self.register_buffer("signs", signs, persistent=False)

    def forward(self, tokens_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
        """(B, T) -> (B, T, C)."""
        last, before = self.table.size(0) - 1, self.order - 1
        past = F.pad(tokens_BT, (before, 0))
        grams = [past[:, before - k:past.size(1) - k] for k in range(self.order)]  # now, before, ...
        mixed = functools.reduce(operator.xor, (gram * factor for gram, factor in zip(grams, HASH, strict=False)))
        bucket, row = mixed % max(last, 1), functools.reduce(operator.xor, grams)
        crosses = torch.arange(tokens_BT.size(1), device=tokens_BT.device) < before
        if starts_BT is not None:
            starts = F.pad(starts_BT, (before, 0))
            crosses = crosses | sum(starts[:, before - k:starts.size(1) - k] for k in range(before)).bool()
        bucket, row = bucket.masked_fill(crosses, last), row.masked_fill(crosses, 0)
        # On CPUs the gradient's rows are added into the buffer that is there: no table-sized temporary; Inductor cannot.
        sparse = self.table.grad is not None and self.table.device.type == "cpu" and not torch.compiler.is_compiling()
        found = F.embedding(bucket, self.table, sparse=sparse)
        return found if self.signs is None else found * F.embedding(row % len(self.signs), self.signs)


def fixed_signs(rows: int, dim: int, *, seed: int) -> Tensor:
    """(rows, dim) of +-1, the same everywhere, without a draw from the run's generator."""
    return torch.randint(0, 2, (rows, dim), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1
