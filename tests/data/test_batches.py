"""Batches: slow twins, exact coverage over ranks, resuming at any step."""

import json
import threading
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch

from data import orders
from data.batches import Batches, Position, rows_of_rank
from data.shards import read_shard, write_shard

START = 0  # opens each document
ORDERS = ("contiguous", "shuffled", "documents")
STEPS = 14


def make_shards(*sizes: int) -> list[np.ndarray]:
    """Tokens that differ everywhere but at document starts, which stand 3 to 11 tokens apart."""
    rng = np.random.default_rng(0)
    tokens = np.arange(1, sum(sizes) + 1, dtype=np.uint16)
    at = np.cumsum(rng.integers(3, 12, size=len(tokens)))
    tokens[at[at < len(tokens)]] = START
    return np.split(tokens, np.cumsum(sizes)[:-1])


SHARDS = make_shards(131, 90, 173)


def open_batches(shards=SHARDS, *, order="shuffled", rank=0, world_size=1, batch=24, sequence=6, longest=8,
                 **changes) -> Batches:
    options = dict(seed=3, document_start=START, total_steps=STEPS,
                   plan=lambda step: (batch, sequence, longest)) | changes
    return Batches(shards, order=order, rank=rank, world_size=world_size, **options)


def read(batches: Batches, step: int = 0, position: Position | None = None, steps: int = STEPS) -> list[tuple]:
    """(inputs, targets, position after) of each step as plain lists."""
    batches.start(step, position or Position())
    batches_read = [batches.next() for _ in range(step, steps)]
    batches.close()
    assert all(x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous() for x, y, *_ in batches_read)
    return [(x.tolist(), y.tolist(), position) for x, y, position, _ in batches_read]


def growing(step: int) -> tuple[int, int, int]:
    """Batches and sequences that grow twice, among documents clipped to other lengths."""
    return [(24, 6, 8), (24, 8, 5), (36, 12, 20)][step // 5]


# ---- For all orders ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("plan", [lambda step: (24, 6, 8), growing])
def test_ranks_together_are_one_rank(order, world_size, plan):
    whole = read(open_batches(order=order, plan=plan))
    parts = [read(open_batches(order=order, plan=plan, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for step, (inputs, targets, position) in enumerate(whole):
        assert sum((part[step][0] for part in parts), []) == inputs
        assert sum((part[step][1] for part in parts), []) == targets
        assert {part[step][2] for part in parts} == {position}
        batch_tokens, sequence_tokens, _ = plan(step)
        assert np.shape(inputs) == (batch_tokens // sequence_tokens, sequence_tokens)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("plan", [lambda step: (24, 6, 8), growing])
def test_resuming_anywhere_changes_nothing(order, plan):
    whole = read(open_batches(order=order, plan=plan))
    for step in range(1, STEPS):
        position = Position(**json.loads(json.dumps(asdict(whole[step - 1][2]))))
        assert read(open_batches(order=order, plan=plan), step, position) == whole[step:]


@pytest.mark.parametrize("order", ORDERS)
def test_targets_are_the_next_inputs(order):
    for inputs, targets, _ in read(open_batches(order=order)):
        assert [row[1:] for row in inputs] == [row[:-1] for row in targets]


@pytest.mark.parametrize("order", ORDERS)
def test_a_rank_without_rows_gets_empty_tensors(order):
    batches = open_batches(order=order, rank=0, world_size=5)
    batches.start(0, Position())
    inputs, targets, *_ = batches.next()
    batches.close()
    assert inputs.shape == targets.shape == (0, 6)


def test_a_token_outside_the_vocabulary_names_the_file(tmp_path):
    tokens = np.arange(100)
    tokens[77] = 50_257
    for name in ("a.bin", "b.bin"):
        write_shard(tmp_path / name, tokens if name == "b.bin" else np.arange(100))
    shards = [read_shard(tmp_path / name) for name in ("a.bin", "b.bin")]
    batches = open_batches(shards, order="contiguous", vocab_size=50_257)
    with pytest.raises(ValueError, match="b.bin: token 50257 at position 77 is outside the vocabulary of 50257"):
        read(batches)


@pytest.mark.parametrize(("options", "message"), [
    ({"order": "contiguous", "batch": 180},
     "more than 181 tokens .* longest of 3 token arrays holds 173.*--train.batch_tokens"),
    ({"order": "contiguous", "batch": 172, "sequence": 4}, "needs more than 173 tokens"),
    ({"order": "shuffled", "batch": 200, "sequence": 200}, "window needs 201 tokens.*--data.sequence_tokens"),
    ({"order": "documents", "batch": 200, "sequence": 200}, "fill no row of 201 tokens.*--data.max_document_tokens"),
    ({"order": "documents", "document_start": 999}, "fill no row of 7 tokens"),
    ({"order": "documents", "document_start": None}, "needs a source with document starts"),
    ({"batch": 5}, "batch of 5 tokens holds no sequence of 6; raise --train.batch_tokens"),
])
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        read(open_batches(**options))


# ---- contiguous ----------------------------------------------------------------------------------


def slow_contiguous(shards, batch, steps):
    """Yield the batches of B + 1 tokens as modded-nanogpt's track 3 reads them."""
    shard = position = 0
    for _ in range(steps):
        while position + batch + 1 >= len(shards[shard]):
            shard, position = (shard + 1) % len(shards), 0
        yield shards[shard][position:position + batch + 1].tolist()
        position += batch


def test_contiguous_is_track_three():
    taken = read(open_batches(order="contiguous"))
    for (inputs, targets, _), tokens in zip(taken, slow_contiguous(SHARDS, 24, STEPS), strict=True):
        assert sum(inputs, []) == tokens[:-1] and sum(targets, []) == tokens[1:]


def test_contiguous_reads_190_batches_of_a_scaled_shard():
    """2^19 tokens of 10^8, both divided by 2^12: 190 batches, then the next shard."""
    shards = [np.zeros(10**8 // 2**12, dtype=np.uint16)] * 2
    taken = read(open_batches(shards, order="contiguous", batch=2**7, sequence=2**5, total_steps=381), steps=381)
    assert [position.shard for *_, position in taken] == [0] * 190 + [1] * 190 + [0]
    assert taken[-1][2] == Position(epoch=1, shard=0, index=2**7)


@pytest.mark.parametrize(("size", "batches_a_shard"), [(49, 1), (50, 2)])
def test_contiguous_drops_a_tail_of_exactly_one_batch(size, batches_a_shard):
    """Two batches of 24 end with token 49: track 3 reads the second only where one token more remains."""
    taken = read(open_batches([np.zeros(size, dtype=np.uint16)] * 2, order="contiguous"))
    assert sum(position.epoch == position.shard == 0 for *_, position in taken) == batches_a_shard


def test_contiguous_skips_shards_that_are_too_short():
    taken = read(open_batches(order="contiguous", batch=96))
    assert {position.shard for *_, position in taken} == {0, 2}


# ---- shuffled ------------------------------------------------------------------------------------


def epochs_of(taken) -> dict[int, list[list[int]]]:
    """Windows of T + 1 tokens by epoch, recognised by the position before and after each row."""
    windows: dict[int, list[list[int]]] = {}
    for inputs, targets, position in taken:
        assert len(inputs) == 1
        windows.setdefault(position.epoch, []).append(inputs[0] + targets[0][-1:])
    return windows


def test_shuffled_sees_every_window_once_an_epoch():
    epochs = epochs_of(read(open_batches(batch=6, total_steps=200), steps=200))
    assert len(epochs) >= 4
    for epoch in range(3):
        rows, wanted = sorted(epochs[epoch]), []
        for shard in SHARDS:
            stream = shard.tolist()
            shard_rows = [row for row in rows if any(stream[i:i + 7] == row for i in range(len(stream) - 6))]
            first = min(next(i for i in range(len(stream) - 6) if stream[i:i + 7] == row) for row in shard_rows)
            assert first < 6
            wanted += [stream[i:i + 7] for i in range(first, len(stream) - 6, 6)]
        assert rows == sorted(wanted)
    assert epochs[0] != epochs[1]


def test_shuffled_depends_on_the_seed_alone():
    first, again, other = (read(open_batches(seed=seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_shuffled_batches_span_epochs():
    small = read(open_batches(batch=6, total_steps=40), steps=40)
    large = read(open_batches(batch=120, total_steps=2), steps=2)
    assert sum((inputs for inputs, *_ in large), []) == sum((inputs for inputs, *_ in small), [])


def test_a_new_length_begins_a_new_epoch():
    positions = [position for *_, position in read(open_batches(plan=growing))]
    assert positions[4] == Position(epoch=0, index=20, sequence_tokens=6)
    assert positions[5] == Position(epoch=1, index=3, sequence_tokens=8)
    assert [b.epoch - a.epoch for a, b in pairwise(positions)][:9] == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_a_new_length_after_a_single_window_begins_a_new_epoch_too():
    taken = read(open_batches(plan=lambda step: [(6, 6, 8), (8, 8, 8)][step], total_steps=2), steps=2)
    assert [position.epoch for *_, position in taken] == [0, 1]


def test_an_epoch_that_ends_with_a_batch_is_not_entered_twice():
    taken = read(open_batches([np.arange(25, dtype=np.uint16)], batch=6, total_steps=60), steps=60)
    counts = [len(windows) for windows in epochs_of(taken).values()]
    assert set(counts[:-1]) <= {3, 4}


def test_the_thread_computes_what_belongs_beside_a_batch():
    threads = []
    batches = open_batches(beside=lambda inputs: threads.append(threading.current_thread().name) or inputs.sum())
    batches.start(0, Position())
    for batch in (batches.next(), batches.next()):
        assert batch.beside == batch.inputs.sum()
    batches.close()
    assert all(name.startswith("batches") for name in threads)
    assert open_batches()._beside is None


# ---- documents -----------------------------------------------------------------------------------


def slow_documents(shards, width, longest, rows):
    """Rows of `width` tokens, document after document, one token at a time."""
    packed = []
    while True:
        for shard in shards:
            starts = [i for i, token in enumerate(shard) if token == START]
            row = []
            for start, end in pairwise([*starts, len(shard)]):
                for token in shard[start:min(end, start + longest)].tolist():
                    if len(row) < width:
                        row.append(token)
                if len(row) == width:
                    packed.append(row)
                    row = []
            if len(packed) >= rows:
                return packed[:rows]


@pytest.mark.parametrize("sequence", [4, 6, 12, 24])
@pytest.mark.parametrize("longest", [3, 8, 50])
def test_documents_agree_with_the_slow_twin(sequence, longest):
    taken = read(open_batches(order="documents", sequence=sequence, longest=longest))
    rows = [x + y[-1:] for inputs, targets, _ in taken for x, y in zip(inputs, targets, strict=True)]
    assert rows == slow_documents(SHARDS, sequence + 1, longest, len(rows))
    assert all(row[0] == START for row in rows)


def test_documents_are_clipped_as_long_as_the_step_says():
    """Each step continues after the last document of the step before it."""
    lengths = [3, 8]
    taken = read(open_batches(order="documents", plan=lambda step: (24, 6, lengths[step]), total_steps=2), steps=2)
    begun = [sum(token == START for row in inputs for token in row) for inputs, *_ in taken]
    whole = read(open_batches(order="documents", longest=3, total_steps=1), steps=1)
    assert taken[0] == whole[0] and begun[0] > begun[1]
    assert read(open_batches(order="documents", plan=lambda step: (24, 6, lengths[step]), total_steps=2), 1, taken[0][2],
                steps=2) == taken[1:]


def test_documents_are_indexed_once_per_shard():
    batches = open_batches(order="documents", total_steps=3)
    read(batches, steps=3)
    assert len(batches._order._starts) == (SHARDS[0] == START).sum()


# ---- Index of documents --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 7, 131, 1000])
def test_documents_are_found_piece_by_piece(piece, monkeypatch):
    monkeypatch.setattr(orders, "SCAN_TOKENS", piece)
    assert np.array_equal(orders.find_documents(SHARDS[0], START), np.flatnonzero(SHARDS[0] == START))
    assert orders.find_documents(SHARDS[0], 65_535).tolist() == []


def test_a_shard_is_scanned_once_and_ahead_also_if_the_document_length_changes(monkeypatch):
    """The next shard is found before the stream reaches it; two indices are held at most."""
    scanned, find = [], orders.find_documents

    def count(tokens, document_start):
        scanned.append(len(tokens))
        return find(tokens, document_start)

    monkeypatch.setattr(orders, "find_documents", count)
    batches = open_batches(order="documents", plan=lambda step: (24, 6, 8 if step % 2 else 5))
    batches.start(0, Position())
    batches._indexer.submit(int).result()
    assert scanned == [131, 90]
    positions = [batches.next()[2] for _ in range(STEPS)]
    batches.close()
    shards = sum(after.shard != before.shard for before, after in pairwise(positions)) + 1
    assert shards > 1 and len(scanned) <= shards + 2 and len(batches._order._found) == 2


def test_rows_of_all_ranks_are_all_rows():
    for count, ranks in ((8, 3), (24, 5), (2, 4)):
        assert [row for rank in range(ranks) for row in rows_of_rank(count, rank, ranks)] == list(range(count))
