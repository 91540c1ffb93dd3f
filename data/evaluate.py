"""Validation loss: every validation token is predicted exactly once, for any number of ranks and any micro-batch size.

    nats per token = summed cross-entropy / number of targets
    bits per byte  = summed cross-entropy / (ln 2 * number of bytes of text that the targets encode)

Bits per byte do not depend on the tokenizer, so models with different vocabularies can be compared by them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.sources import Source

PROMPT_TOKENS = 32
"""Number of tokens of the validation text that a sample continues."""


@dataclass(frozen=True, slots=True)
class Score:
    """Validation loss of a model over all validation tokens."""

    nats_per_token: float
    """Mean cross-entropy of a token, in nats."""
    bits_per_byte: float | None
    """Cross-entropy in bits, divided by the bytes of text; None if the number of bytes is not known."""
    tokens: int
    """Number of targets."""


def validation_rows(validation: np.ndarray, sequence_tokens: int, *, micro_tokens: int, rank: int,
                    world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's (inputs, targets), int64 (n, T) each, from the N + 1 validation tokens.

    Windows of T targets do not overlap, and every rank gets a contiguous range of them: all ranks together predict each of
    the N targets exactly once, so the loss is a mean over a fixed set of tokens. A batch has at most `micro_tokens`
    tokens, but at least one row. The last N mod T targets are one batch (1, N mod T) of the last rank.
    """
    targets = len(validation) - 1
    windows, remainder = divmod(targets, sequence_tokens)
    stop = windows * (rank + 1) // world_size
    rows = max(1, micro_tokens // sequence_tokens)
    for first in range(windows * rank // world_size, stop, rows):
        yield _rows(validation, first * sequence_tokens, min(rows, stop - first), sequence_tokens)
    # Dropping a short last window would make the set of tokens depend on the context length.
    if remainder and rank == world_size - 1:
        yield _rows(validation, targets - remainder, 1, remainder)


def _rows(validation: np.ndarray, start: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(np.array(validation[start:start + rows * width + 1], dtype=np.int64))
    return tokens[:-1].view(rows, width), tokens[1:].view(rows, width)


def evaluate(summed_loss: Callable[[Tensor, Tensor], Tensor], source: Source, *, sequence_tokens: int, micro_tokens: int,
             rank: int, world_size: int, device: torch.device, sum_over_ranks: Callable[[float], float]) -> Score:
    """Return the score of a model over all validation tokens of `source`. A collective: every rank must call it.

    `summed_loss(inputs, targets)` returns the cross-entropy in nats, summed over the targets, as a 0-D tensor.
    """
    batches = validation_rows(source.validation, sequence_tokens, micro_tokens=micro_tokens, rank=rank,
                              world_size=world_size)
    # The losses stay on the device until the end, so that it is waited for once and not once per batch.
    nats = [summed_loss(inputs.to(device), targets.to(device)) for inputs, targets in batches]
    # Summed in float64: beyond 2^24 nats a float32 sum no longer counts single nats.
    total_nats = sum_over_ranks(torch.stack(nats).cpu().double().sum().item() if nats else 0.0)
    tokens = len(source.validation) - 1
    bits_per_byte = total_nats / (math.log(2) * source.validation_bytes) if source.validation_bytes else None
    return Score(total_nats / tokens, bits_per_byte, tokens)


def sample_text(source: Source, generate: Callable[[Tensor], Tensor], *, device: torch.device) -> tuple[str, str] | None:
    """Return the beginning of the validation text and the model's continuation of it; None without a tokenizer.

    `generate` maps prompt tokens (T,) to prompt and continuation (T + n,).
    """
    if source.tokenizer is None:
        return None
    prompt = torch.from_numpy(source.validation[1:1 + PROMPT_TOKENS].astype(np.int64)).to(device)  # 0 is end-of-text
    tokens = generate(prompt).tolist()
    parts = tokens[:len(prompt)], tokens[len(prompt):]
    # A token may end within a character: its bytes are shown as the replacement character.
    text, continuation = (source.tokenizer.decode(part).decode("utf-8", "replace") for part in parts)
    return text, continuation
