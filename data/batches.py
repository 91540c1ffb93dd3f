"""Training batches: this rank's rows of each step's global batch, prepared one step ahead by a background thread.

Letters in shapes: n = rows of this rank, T = tokens of a sequence.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.orders import Contiguous, Documents, Position, RowRequest, Shuffled
from data.shards import check_vocabulary


class Batch(NamedTuple):
    """One rank's rows of a global batch."""

    inputs: Tensor
    """Token ids, int64 (n, T), on the CPU."""
    targets: Tensor
    """The tokens after them, likewise."""
    position: Position
    """Position in the data after this batch."""
    beside: object = None
    """What `Batches.beside` returned for the inputs."""


class Batches:
    """Training batches of one rank, step after step.

    A global batch of N rows is split into contiguous ranges: rank r of R ranks gets the rows i with
    N r // R <= i < N (r + 1) // R. The rows of all ranks, in the order of the ranks, are the batch of a single rank.
    """

    def __init__(self, source_arrays: Sequence[np.ndarray], *, order: Literal["contiguous", "shuffled", "documents"],
                 seed: int, document_start: int | None, rank: int, world_size: int,
                 plan: Callable[[int], tuple[int, int, int]], total_steps: int, pin: bool = False,
                 vocab_size: int | None = None, beside: Callable[[Tensor], object] | None = None) -> None:
        """Choose the order in which the flat token arrays `source_arrays` are read; no token is read yet.

        `plan` maps a step to its (batch_tokens of all ranks, sequence_tokens, max_document_tokens). `document_start` is
        the token that begins each document. `pin` puts batches into page-locked memory. With `vocab_size` every token is
        checked against it. `beside` is a function of the inputs that the thread computes for each batch. Raises ValueError
        for order "documents" without a `document_start`.
        """
        if order == "documents" and document_start is None:
            raise ValueError("--data.order documents needs a source with document starts: shards or text")
        self._indexer = ThreadPoolExecutor(1, thread_name_prefix="documents")
        make_order = {"contiguous": lambda: Contiguous(source_arrays),
                      "shuffled": lambda: Shuffled(source_arrays, seed),
                      "documents": lambda: Documents(source_arrays, document_start, self._indexer)}
        self._order = make_order[order]()
        self._shards, self._vocab_size, self._pin, self._beside = source_arrays, vocab_size, pin, beside
        self._rank, self._world_size = rank, world_size
        self._plan, self._total_steps = plan, total_steps
        # One thread and one batch ahead: a batch begins where the one before it ended, so two cannot be built at once.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: Future[Batch] | None = None
        self._step = 0

    def start(self, step: int, position: Position) -> None:
        """Begin to build the batch of `step`, reading from `position` on. Waits for the index of the shard, if the order has
        one, but not for the batch: a caller that starts its clock afterwards measures batches alone."""
        if isinstance(self._order, Documents):
            self._order.prepare(position.shard)
        self._submit(step, position)

    def _submit(self, step: int, position: Position) -> None:
        self._step = step
        self._next = self._worker.submit(self._build, step, position) if step < self._total_steps else None

    def next(self) -> Batch:
        """Return the batch of the next step, and begin to build that of the step after it.

        It has no rows on some ranks if there are fewer rows than ranks. Raises ValueError if the data are too short for the
        batch or hold a token outside the vocabulary.
        """
        assert self._next is not None, "start() comes first, and there is no batch after the last step"
        batch = self._next.result()
        # From here on the thread builds the next batch while the caller computes with this one.
        self._submit(self._step + 1, batch.position)
        return batch

    def close(self) -> None:
        """Stop the background threads."""
        for executor in (self._worker, self._indexer):
            executor.shutdown(wait=True, cancel_futures=True)

    def _build(self, step: int, position: Position) -> Batch:
        """Read this rank's rows of a batch; runs in the thread, whose errors `next` raises."""
        # Size of the global batch.
        batch_tokens, sequence_tokens, max_document_tokens = self._plan(step)
        count = batch_tokens // sequence_tokens
        if count < 1:
            raise ValueError(f"a batch of {batch_tokens} tokens holds no sequence of {sequence_tokens}; "
                             "raise --train.batch_tokens")
        # This rank's rows. The position after the batch is the same on every rank, so ranks need not communicate.
        own_rows = rows_of_rank(count, self._rank, self._world_size)
        request = RowRequest(count, sequence_tokens, max_document_tokens)
        inputs, targets, position_after = self._order.read(position, request, own_rows)
        # Vocabulary. Checked here, because an embedding lookup outside its table stops a GPU without a readable error.
        if self._vocab_size is not None and max(inputs.max(initial=0), targets.max(initial=0)) >= self._vocab_size:
            self._raise_out_of_vocabulary(self._vocab_size)
        # A copy to int64, the index type of torch: the arrays may be read-only views of a memory-mapped file.
        inputs, targets = (torch.from_numpy(np.array(part, dtype=np.int64, order="C")) for part in (inputs, targets))
        if self._pin:  # only from page-locked memory does a copy to the GPU overlap with its work
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return Batch(inputs, targets, position_after, None if self._beside is None else self._beside(inputs))

    def _raise_out_of_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError with file and position of the first token outside the vocabulary."""
        for number, shard in enumerate(self._shards):
            check_vocabulary(shard, vocab_size, file_name=str(getattr(shard, "filename", f"token array {number}")))


def rows_of_rank(count: int, rank: int, world_size: int) -> range:
    """Return a rank's rows of a global batch of `count` rows."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def micro_batches(inputs: Tensor, targets: Tensor, micro_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split (n, T) tensors into (inputs, targets) views of at most `micro_tokens` tokens each, but at least one row; none
    from a rank without rows."""
    rows = max(1, micro_tokens // inputs.size(1))
    if len(inputs):
        yield from zip(inputs.split(rows), targets.split(rows), strict=True)
