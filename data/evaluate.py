"""The referee: every validation token is predicted exactly once, whatever the ranks and the micro-batches."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.sources import Source

PROMPT_TOKENS = 32  # of the validation text, which a sample continues


@dataclass(frozen=True, slots=True)
class Score:
    """How well the validation tokens were predicted."""

    nats_per_token: float
    bits_per_byte: float | None
    """None where the tokens' length in bytes is not known."""
    tokens: int


def validation_rows(validation: np.ndarray, sequence_tokens: int, *, micro_tokens: int, rank: int,
                    world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's (inputs, targets), int64 (n, T) each, of the non-overlapping windows of N + 1 tokens.

    All ranks together predict each of the N targets once. A batch has at most `micro_tokens` tokens but at least one
    row; the last N mod T targets are a batch (1, N mod T) of the last rank.
    """
    targets = len(validation) - 1
    windows, rest = divmod(targets, sequence_tokens)
    stop = windows * (rank + 1) // world_size
    rows = max(1, micro_tokens // sequence_tokens)
    for first in range(windows * rank // world_size, stop, rows):
        yield _rows(validation, first * sequence_tokens, min(rows, stop - first), sequence_tokens)
    if rest and rank == world_size - 1:
        yield _rows(validation, targets - rest, 1, rest)


def _rows(validation: np.ndarray, start: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(np.array(validation[start:start + rows * width + 1], dtype=np.int64))
    return tokens[:-1].view(rows, width), tokens[1:].view(rows, width)


def evaluate(nats_of: Callable[[Tensor, Tensor], Tensor], source: Source, *, sequence_tokens: int, micro_tokens: int,
             rank: int, world_size: int, device: torch.device, sum_over_ranks: Callable[[float], float]) -> Score:
    """The score of a model over all validation tokens; `nats_of(inputs, targets)` is its summed cross-entropy, 0-D.

    Bits per byte are nats / (ln 2 bytes). Sums run in float64 over micro-batches and ranks; the device is waited for once,
    at the end.
    """
    batches = validation_rows(source.validation, sequence_tokens, micro_tokens=micro_tokens, rank=rank,
                              world_size=world_size)
    nats = [nats_of(inputs.to(device), targets.to(device)) for inputs, targets in batches]
    total = sum_over_ranks(torch.stack(nats).cpu().double().sum().item() if nats else 0.0)
    tokens = len(source.validation) - 1
    bits_per_byte = total / (math.log(2) * source.validation_bytes) if source.validation_bytes else None
    return Score(total / tokens, bits_per_byte, tokens)


def sample_text(source: Source, generate: Callable[[Tensor], Tensor], *, device: torch.device) -> tuple[str, str] | None:
    """The validation text's first tokens and the model's continuation, as text; None where there is no tokenizer.

    `generate` appends tokens: (T,) -> (T + n,).
    """
    if source.tokenizer is None:
        return None
    prompt = torch.from_numpy(source.validation[1:1 + PROMPT_TOKENS].astype(np.int64)).to(device)
    tokens = generate(prompt).tolist()
    parts = tokens[:len(prompt)], tokens[len(prompt):]
    text, continuation = (source.tokenizer.decode(part).decode("utf-8", "replace") for part in parts)
    return text, continuation
