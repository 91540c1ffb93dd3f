"""Orders: three ways to turn the training tokens into an endless stream of rows of T + 1 tokens.

    contiguous  slices of each shard, one after another
    shuffled    all windows of T + 1 tokens of an epoch, in random order
    documents   rows packed with documents, each row beginning at the start of a document

Every order has a method `read(position, request, own_rows)`. It takes the next `request.count` rows of the stream after
`position` and returns inputs and targets, each (n, T), of those in the range `own_rows`, and the position after all of
them. Targets are the inputs shifted by one token: that is why a row has T + 1.

The stream does not depend on the rank: all ranks read ranges of the same rows and compute the same position after them.
A position alone is enough to continue the stream, so a checkpoint stores nothing else of the data.
"""

from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from data.shards import SCAN_TOKENS


@dataclass(frozen=True, slots=True)
class Position:
    """Place in a stream of rows, stored in every checkpoint."""

    epoch: int = 0
    """Number of finished passes over the training tokens."""
    shard: int = 0
    """Number of the token array; always 0 in the shuffled order, which draws from all shards."""
    index: int = 0
    """contiguous: next token of the shard; documents: next document of the shard; shuffled: next window of the epoch."""
    sequence_tokens: int = 0
    """shuffled: T of this epoch's windows; 0 before the first epoch."""


class RowRequest(NamedTuple):
    """Rows of one step, over all ranks."""

    count: int
    """Number of rows."""
    sequence_tokens: int
    """T."""
    max_document_tokens: int | None
    """documents: only this many tokens of a document are used; the other orders ignore it."""


OwnRows = tuple[np.ndarray, np.ndarray, Position]


def _next_shard(position: Position, shards: int) -> Position:
    """Return the start of the next shard; after the last shard, the start of the next epoch."""
    wraps = position.shard + 1 >= shards
    return Position(position.epoch + wraps, 0 if wraps else position.shard + 1)


def _describe_longest(shards: Sequence[np.ndarray]) -> str:
    return f"the longest of {len(shards)} token arrays holds {max(map(len, shards)):,} tokens"


class Contiguous:
    """Slices of the stream in turn: a batch of B tokens is B + 1 tokens of one shard, and the next begins at its last.

    A shard's tail of B + 1 tokens or fewer is dropped, so that 2^19 tokens a batch make 190 batches of a shard of
    10^8 (modded-nanogpt, track 3). The last shard is followed by the first.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards = shards

    def read(self, position: Position, request: RowRequest, own_rows: range) -> OwnRows:
        """Return inputs, targets and the position after them. Raises ValueError if no shard holds a batch."""
        sequence_tokens = request.sequence_tokens
        batch_tokens = request.count * sequence_tokens
        if max(map(len, self._shards)) <= batch_tokens + 1:
            raise ValueError(f"a contiguous batch needs more than {batch_tokens + 1:,} tokens of one shard, but "
                             f"{_describe_longest(self._shards)}; lower --train.batch_tokens, or take --data.order shuffled")
        # Not > but >=: track 3 too drops a last batch that ends exactly where its shard ends.
        while position.index + batch_tokens + 1 >= len(self._shards[position.shard]):
            position = _next_shard(position, len(self._shards))
        first = position.index + own_rows.start * sequence_tokens
        tokens = self._shards[position.shard][first:first + len(own_rows) * sequence_tokens + 1]
        inputs, targets = (part.reshape(len(own_rows), sequence_tokens) for part in (tokens[:-1], tokens[1:]))
        return inputs, targets, replace(position, index=position.index + batch_tokens)


class Shuffled:
    """Every window of T + 1 tokens once an epoch, in an order drawn from (seed, epoch, T).

    Windows begin T apart and overlap by one token, which is a target of the first and an input of the second. In each
    shard the first window begins at a random offset below T, drawn anew each epoch, so that epochs cut the text at other
    places. A change of T begins a new epoch.
    """

    def __init__(self, shards: Sequence[np.ndarray], seed: int) -> None:
        self._shards, self._seed = shards, seed
        self._drawn: tuple[int, int] | None = None  # (epoch, T) of the arrays below
        self._offsets = self._first_windows = self._permutation = np.empty(0, dtype=np.int64)

    def read(self, position: Position, request: RowRequest, own_rows: range) -> OwnRows:
        """Return inputs, targets and the position after them. Raises ValueError if no shard holds a window."""
        count, sequence_tokens, _ = request
        if position.sequence_tokens != sequence_tokens:
            position = Position(position.epoch + (position.index > 0), 0, 0, sequence_tokens)
        rows = np.empty((len(own_rows), sequence_tokens + 1), dtype=self._shards[0].dtype)
        done = 0
        while True:
            self._draw_epoch(position.epoch, sequence_tokens)
            # A batch may span epochs: this one provides its rows [done, done + portion).
            portion = min(count - done, len(self._permutation) - position.index)
            # This rank's rows [low, high) among them; low equals high if it has none.
            low, high = (min(max(row, done), done + portion) for row in (own_rows.start, own_rows.stop))
            start = position.index + low - done
            windows = self._permutation[start:start + high - low]
            self._read_windows(windows, rows[low - own_rows.start:high - own_rows.start])
            done += portion
            position = replace(position, index=position.index + portion)
            # Returns before the next epoch begins: an epoch that ends with its batch is not counted twice.
            if done == count:
                return rows[:, :-1], rows[:, 1:], position
            position = replace(position, epoch=position.epoch + 1, index=0)

    def _draw_epoch(self, epoch: int, sequence_tokens: int) -> None:
        """Draw offsets (shards,) and permutation (windows,) of an epoch, unless they are the ones drawn last."""
        if self._drawn == (epoch, sequence_tokens):
            return
        lengths = np.array([len(shard) for shard in self._shards])
        if lengths.max() <= sequence_tokens:
            raise ValueError(f"a window needs {sequence_tokens + 1:,} tokens, but {_describe_longest(self._shards)}; "
                             "lower --data.sequence_tokens")
        # A generator of its own, seeded by the epoch: a resumed run draws the same without any saved random state.
        generator = np.random.default_rng((self._seed, epoch, sequence_tokens))
        # Below T, and so low that every shard of more than T tokens has at least one window.
        self._offsets = generator.integers(np.clip(lengths - sequence_tokens, 1, sequence_tokens))
        counts = np.maximum(lengths - 1 - self._offsets, 0) // sequence_tokens
        # Windows are numbered through all shards: shard s has those from first_windows[s] to first_windows[s + 1] - 1.
        self._first_windows = np.concatenate([[0], np.cumsum(counts)])
        self._permutation = generator.permutation(self._first_windows[-1])
        self._drawn = (epoch, sequence_tokens)

    def _read_windows(self, windows: np.ndarray, rows: np.ndarray) -> None:
        """Write the windows of the given numbers (n,) into `rows` (n, T + 1), in place."""
        shard_of = np.searchsorted(self._first_windows, windows, side="right") - 1
        width = rows.shape[1]
        starts = self._offsets[shard_of] + (windows - self._first_windows[shard_of]) * (width - 1)
        # One indexed read for each shard instead of one for each row.
        for shard in np.unique(shard_of):
            in_shard = shard_of == shard
            rows[in_shard] = self._shards[shard][starts[in_shard, None] + np.arange(width)]


class Documents:
    """Rows packed with pieces that begin where documents begin (modded-nanogpt, Sep 2025).

    A piece is the beginning of a document: at most `max_document_tokens` of it; the last piece of a row is cut where the
    row ends. No row begins within a document, so the model never predicts tokens whose context lies in an earlier row.
    The price is that the remainder of a clipped document is skipped, and so are the last documents of a shard if they
    do not fill a row.
    """

    def __init__(self, shards: Sequence[np.ndarray], document_start: int, indexer: Executor) -> None:
        """`indexer` finds the document starts of the next shard while rows are read from the present one."""
        self._shards, self._document_start, self._indexer = shards, document_start, indexer
        self._found: dict[int, Future[np.ndarray]] = {}  # document starts of at most two shards
        self._indexed: tuple[int, int] | None = None  # (shard, max_document_tokens) of the two below
        self._starts = np.empty(0, dtype=np.int64)
        self._ends: list[int] = []

    def read(self, position: Position, request: RowRequest, own_rows: range) -> OwnRows:
        """Return inputs, targets and the position after them. Raises ValueError if no shard fills a row."""
        rows = np.empty((len(own_rows), request.sequence_tokens + 1), dtype=self._shards[0].dtype)
        # Rows of other ranks are counted too, because they decide where this rank's rows begin; only its own are read.
        for row in range(request.count):
            position, stop = self._find_row(position, request.sequence_tokens + 1, request.max_document_tokens)
            if row in own_rows:
                self._fill_row(position.index, stop, rows[row - own_rows.start])
            position = replace(position, index=stop)
        return rows[:, :-1], rows[:, 1:], position

    def _find_row(self, position: Position, width: int, max_document_tokens: int) -> tuple[Position, int]:
        """Return the position of the first document of the next row of `width` tokens, and the document after its last."""
        # One try more than there are shards: the present one may have too little left, but fill a row from its start.
        for _ in range(len(self._shards) + 1):
            self._index_shard(position.shard, max_document_tokens)
            before = self._ends[position.index - 1] if position.index else 0
            stop = bisect_left(self._ends, before + width) + 1
            if stop <= len(self._ends):
                return position, stop
            position = _next_shard(position, len(self._shards))
        raise ValueError(f"documents clipped to {max_document_tokens:,} tokens fill no row of {width:,} tokens: lower "
                         "--data.sequence_tokens, raise --data.max_document_tokens, or take --data.order shuffled")

    def prepare(self, shard: int) -> None:
        """Find the document starts of a shard and, in the background, those of the next one.

        A shard of 10^8 tokens takes some .1 s to scan, .5 s if it is not in memory yet: longer than several steps.
        """
        following = (shard + 1) % len(self._shards)
        # Only these two are held, however many shards there are.
        self._found = {s: self._found.get(s) or self._indexer.submit(find_documents, self._shards[s], self._document_start)
                       for s in dict.fromkeys((shard, following))}
        self._found[shard].result()

    def _index_shard(self, shard: int, max_document_tokens: int) -> None:
        """Take a shard's document starts, and the running sum of the clipped lengths, unless indexed last."""
        if self._indexed == (shard, max_document_tokens):
            return
        self.prepare(shard)
        self._starts = self._found[shard].result()
        lengths = np.diff(self._starts, append=len(self._shards[shard]))
        # A running sum, so that the documents of a row are found by bisection; a list, which bisect reads fastest.
        self._ends = np.cumsum(np.minimum(lengths, max_document_tokens)).tolist()
        self._indexed = shard, max_document_tokens

    def _fill_row(self, first: int, stop: int, row: np.ndarray) -> None:
        """Write the clipped documents [first, stop) of the indexed shard into `row` (T + 1,), in place."""
        tokens, filled = self._shards[self._indexed[0]], 0
        before = self._ends[first - 1] if first else 0
        for start, end in zip(self._starts[first:stop], self._ends[first:stop], strict=True):
            filled_after = min(end - before, len(row))
            row[filled:filled_after] = tokens[start:start + filled_after - filled]
            filled = filled_after


def find_documents(tokens: np.ndarray, document_start: int) -> np.ndarray:
    """Return the positions of a shard's document starts, int64 (n,). In pieces, since NumPy holds Python's lock while it
    collects positions, and the training loop must go on."""
    pieces = (np.flatnonzero(tokens[first:first + SCAN_TOKENS] == document_start) + first
              for first in range(0, len(tokens), SCAN_TOKENS))
    return np.concatenate([np.empty(0, dtype=np.int64), *pieces])
