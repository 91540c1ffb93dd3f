"""Three orders in which training tokens are seen, each an endless stream of rows of T + 1 tokens.

An order answers `take(position, rows, mine)`: of the rows that follow `position` in the stream, the inputs and targets,
each (n, T), of those in the range `mine`, and the position after all of them. The stream does not depend on who asks: ranks
take ranges of the same rows, and a position is enough to go on.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Position:
    """How far a stream of rows was read: what a checkpoint must hold."""

    epoch: int = 0
    shard: int = 0
    index: int = 0
    """contiguous: the next token of the shard; documents: its next document; shuffled: the next window of the epoch."""
    sequence_tokens: int = 0
    """shuffled: T of this epoch's windows; 0 before the first."""


class Rows(NamedTuple):
    """What a step takes of the stream."""

    count: int
    sequence_tokens: int
    """T."""
    max_document_tokens: int
    """documents: longer ones are clipped."""


Taken = tuple[np.ndarray, np.ndarray, Position]


def _next_shard(position: Position, shards: int) -> Position:
    """The start of the next shard, or of the next epoch."""
    wraps = position.shard + 1 >= shards
    return Position(position.epoch + wraps, 0 if wraps else position.shard + 1)


def _longest(shards: Sequence[np.ndarray]) -> str:
    return f"the longest of {len(shards)} token arrays holds {max(map(len, shards)):,} tokens"


class Contiguous:
    """Slices of the stream in turn: a batch is B + 1 tokens of one shard, and the next begins at its last.

    A shard's tail of B + 1 tokens or fewer is dropped, so that 2^19 tokens a batch make 190 batches of a shard of
    10^8 (modded-nanogpt, track 3). The last shard is followed by the first.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards = shards

    def take(self, position: Position, rows: Rows, mine: range) -> Taken:
        """See the module. Raises ValueError where no shard holds a batch."""
        sequence_tokens = rows.sequence_tokens
        batch_tokens = rows.count * sequence_tokens
        if max(map(len, self._shards)) <= batch_tokens + 1:
            raise ValueError(f"a contiguous batch needs more than {batch_tokens + 1:,} tokens of one shard, but "
                             f"{_longest(self._shards)}; lower --train.batch_tokens, or take --data.order shuffled")
        while position.index + batch_tokens + 1 >= len(self._shards[position.shard]):
            position = _next_shard(position, len(self._shards))
        first = position.index + mine.start * sequence_tokens
        tokens = self._shards[position.shard][first:first + len(mine) * sequence_tokens + 1]
        inputs, targets = (part.reshape(len(mine), sequence_tokens) for part in (tokens[:-1], tokens[1:]))
        return inputs, targets, replace(position, index=position.index + batch_tokens)


class Shuffled:
    """Every window of T + 1 tokens once an epoch, in an order drawn from (seed, epoch, T).

    Windows begin T apart, in each shard at an offset below T that is drawn anew each epoch, and overlap by the one
    token that is a target in one and an input in the next. A change of T begins a new epoch.
    """

    def __init__(self, shards: Sequence[np.ndarray], seed: int) -> None:
        self._shards, self._seed = shards, seed
        self._key: tuple[int, int] | None = None
        self._offsets = self._bounds = self._permutation = np.empty(0, dtype=np.int64)

    def take(self, position: Position, rows: Rows, mine: range) -> Taken:
        """See the module. Raises ValueError where no shard holds a window."""
        count, sequence_tokens, _ = rows
        if position.sequence_tokens != sequence_tokens:
            position = Position(position.epoch + (position.index > 0), 0, 0, sequence_tokens)
        taken = np.empty((len(mine), sequence_tokens + 1), dtype=self._shards[0].dtype)
        done = 0
        while True:
            self._draw(position.epoch, sequence_tokens)
            portion = min(count - done, len(self._permutation) - position.index)
            low, high = (min(max(row, done), done + portion) for row in (mine.start, mine.stop))
            start = position.index + low - done
            self._gather(self._permutation[start:start + high - low], taken[low - mine.start:high - mine.start])
            done += portion
            position = replace(position, index=position.index + portion)
            if done == count:
                return taken[:, :-1], taken[:, 1:], position
            position = replace(position, epoch=position.epoch + 1, index=0)

    def _draw(self, epoch: int, sequence_tokens: int) -> None:
        """Draw offsets and permutation of an epoch, unless they are at hand."""
        if self._key == (epoch, sequence_tokens):
            return
        lengths = np.array([len(shard) for shard in self._shards])
        if lengths.max() <= sequence_tokens:
            raise ValueError(f"a window needs {sequence_tokens + 1:,} tokens, but {_longest(self._shards)}; "
                             "lower --data.sequence_tokens")
        generator = np.random.default_rng((self._seed, epoch, sequence_tokens))
        self._offsets = generator.integers(np.clip(lengths - sequence_tokens, 1, sequence_tokens))
        counts = np.maximum(lengths - 1 - self._offsets, 0) // sequence_tokens
        self._bounds = np.concatenate([[0], np.cumsum(counts)])
        self._permutation = generator.permutation(self._bounds[-1])
        self._key = (epoch, sequence_tokens)

    def _gather(self, windows: np.ndarray, rows: np.ndarray) -> None:
        """Fill rows (n, T + 1) with the windows of the numbers (n,)."""
        shard_of = np.searchsorted(self._bounds, windows, side="right") - 1
        width = rows.shape[1]
        starts = self._offsets[shard_of] + (windows - self._bounds[shard_of]) * (width - 1)
        for shard in np.unique(shard_of):
            here = shard_of == shard
            rows[here] = self._shards[shard][starts[here, None] + np.arange(width)]


class Documents:
    """Rows packed with pieces that begin where documents do (the speedrun's alignment, Sep 2025).

    A piece is a document's first tokens: at most `max_document_tokens`, and the row's last piece what is left of T + 1.
    The rest of a clipped document is skipped, and so are documents that cannot fill a row at the end of a shard.
    """

    def __init__(self, shards: Sequence[np.ndarray], document_start: int) -> None:
        self._shards, self._document_start = shards, document_start
        self._indexed: tuple[int, int] | None = None  # shard, longest piece
        self._starts = np.empty(0, dtype=np.int64)
        self._ends: list[int] = []

    def take(self, position: Position, rows: Rows, mine: range) -> Taken:
        """See the module. Raises ValueError where no shard fills a row."""
        taken = np.empty((len(mine), rows.sequence_tokens + 1), dtype=self._shards[0].dtype)
        for row in range(rows.count):
            position, stop = self._find(position, rows.sequence_tokens + 1, rows.max_document_tokens)
            if row in mine:
                self._pack(position.index, stop, taken[row - mine.start])
            position = replace(position, index=stop)
        return taken[:, :-1], taken[:, 1:], position

    def _find(self, position: Position, width: int, longest: int) -> tuple[Position, int]:
        """The first document of the next row of `width` tokens, and the number of the one after its last."""
        for _ in range(len(self._shards) + 1):
            self._index(position.shard, longest)
            before = self._ends[position.index - 1] if position.index else 0
            stop = bisect_left(self._ends, before + width) + 1
            if stop <= len(self._ends):
                return position, stop
            position = _next_shard(position, len(self._shards))
        raise ValueError(f"documents clipped to {longest:,} tokens fill no row of {width:,} tokens: lower "
                         "--data.sequence_tokens, raise --data.max_document_tokens, or take --data.order shuffled")

    def _index(self, shard: int, longest: int) -> None:
        """Find a shard's documents, and how many tokens of them fit in rows, unless that was the last one indexed."""
        if self._indexed == (shard, longest):
            return
        tokens = self._shards[shard]
        self._starts = np.flatnonzero(tokens == self._document_start)
        lengths = np.diff(self._starts, append=len(tokens))
        self._ends = np.cumsum(np.minimum(lengths, longest)).tolist()
        self._indexed = shard, longest

    def _pack(self, first: int, stop: int, row: np.ndarray) -> None:
        """Fill a row (T + 1,) with the clipped documents [first, stop) of the indexed shard."""
        tokens, filled = self._shards[self._indexed[0]], 0
        before = self._ends[first - 1] if first else 0
        for start, end in zip(self._starts[first:stop], self._ends[first:stop], strict=True):
            upto = min(end - before, len(row))
            row[filled:upto] = tokens[start:start + upto - filled]
            filled = upto
