"""Which tokens each step sees: this rank's rows of the global batch, prepared one step ahead."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.orders import Contiguous, Documents, Position, Rows, Shuffled
from data.shards import check_vocabulary

Batch = tuple[Tensor, Tensor, Position]


class Batches:
    """The training batches of one rank, in steps.

    Row i of a global batch of N rows belongs to the rank r with N r // R <= i < N (r + 1) // R, R the world size: the
    ranks' rows, one rank after another, are the batch of a single rank.
    """

    def __init__(self, source_arrays: Sequence[np.ndarray], *, order: Literal["contiguous", "shuffled", "documents"],
                 seed: int, document_start: int | None, rank: int, world_size: int,
                 plan: Callable[[int], tuple[int, int, int]], total_steps: int, pin: bool = False,
                 vocab_size: int | None = None) -> None:
        """`plan` maps a step to its (batch_tokens, sequence_tokens, max_document_tokens); tokens are checked against
        `vocab_size`."""
        if order == "documents" and document_start is None:
            raise ValueError("--data.order documents needs a source with document starts: shards or text")
        make_order = {"contiguous": lambda: Contiguous(source_arrays),
                      "shuffled": lambda: Shuffled(source_arrays, seed),
                      "documents": lambda: Documents(source_arrays, document_start)}
        self._order = make_order[order]()
        self._shards, self._vocab_size, self._pin = source_arrays, vocab_size, pin
        self._rank, self._world_size = rank, world_size
        self._plan, self._total_steps = plan, total_steps
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: Future[Batch] | None = None
        self._step = 0

    def start(self, step: int, position: Position) -> None:
        """Begin to prepare the batch of `step`, which reads from `position` on."""
        self._step = step
        self._next = self._worker.submit(self._build, step, position) if step < self._total_steps else None

    def next(self) -> Batch:
        """(inputs, targets, position after them) of the next step; int64 (n, T) each, n may be 0 on some ranks.

        Raises ValueError, when the step comes that they concern, for data too short and tokens outside the vocabulary.
        """
        assert self._next is not None, "start() comes first, and there is no batch after the last step"
        batch = self._next.result()
        self.start(self._step + 1, batch[2])
        return batch

    def close(self) -> None:
        """Stop the worker."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _build(self, step: int, position: Position) -> Batch:
        batch_tokens, sequence_tokens, longest = self._plan(step)
        count = batch_tokens // sequence_tokens
        if count < 1:
            raise ValueError(f"a batch of {batch_tokens} tokens holds no sequence of {sequence_tokens}; "
                             "raise --train.batch_tokens")
        mine = range(count * self._rank // self._world_size, count * (self._rank + 1) // self._world_size)
        inputs, targets, after = self._order.take(position, Rows(count, sequence_tokens, longest), mine)
        if self._vocab_size is not None and max(inputs.max(initial=0), targets.max(initial=0)) >= self._vocab_size:
            self._check_in_vocabulary(self._vocab_size)
        inputs, targets = (torch.from_numpy(np.array(part, dtype=np.int64, order="C")) for part in (inputs, targets))
        if self._pin:  # so that the copy to the GPU can overlap with its work
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs, targets, after

    def _check_in_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError with file and position of the first token outside the vocabulary."""
        for number, shard in enumerate(self._shards):
            check_vocabulary(shard, vocab_size, what=str(getattr(shard, "filename", f"token array {number}")))


def micro_batches(inputs: Tensor, targets: Tensor, micro_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of (n, T) tensors in portions of at most `micro_tokens` tokens, at least one row."""
    rows = max(1, micro_tokens // inputs.size(1))
    if len(inputs):
        yield from zip(inputs.split(rows), targets.split(rows), strict=True)
