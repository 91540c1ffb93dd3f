"""Validation: each token is predicted once, and the score does not depend on ranks and micro-batches."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.evaluate import Score, evaluate, sample_text, validation_rows

TOKENS = np.random.default_rng(0).integers(0, 50, size=104).astype(np.uint16)  # 103 targets = 12 windows of 8, and 7
CPU = torch.device("cpu")


def all_rows(world_size: int, micro_tokens: int, sequence_tokens: int = 8) -> list[tuple[list[int], list[int]]]:
    return [(x, y) for rank in range(world_size)
            for inputs, targets in validation_rows(TOKENS, sequence_tokens, micro_tokens=micro_tokens, rank=rank,
                                                   world_size=world_size)
            for x, y in zip(inputs.tolist(), targets.tolist(), strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("micro_tokens", [1, 8, 24, 10_000])
def test_every_target_once(world_size, micro_tokens):
    rows = all_rows(world_size, micro_tokens)
    assert sum((x for x, _ in rows), []) == TOKENS[:-1].tolist()
    assert sum((y for _, y in rows), []) == TOKENS[1:].tolist()
    assert [len(x) for x, _ in rows] == [8] * 12 + [7]


def test_shapes_and_types():
    batches = list(validation_rows(TOKENS, 8, micro_tokens=40, rank=0, world_size=1))
    assert [tuple(x.shape) for x, _ in batches] == [(5, 8), (5, 8), (2, 8), (1, 7)]
    assert all(x.dtype == y.dtype == torch.int64 for x, y in batches)


def test_sequences_longer_than_the_text_and_no_rest():
    assert [len(x) for x, _ in all_rows(2, 8, sequence_tokens=500)] == [103]
    assert {len(x) for x, _ in all_rows(1, 8, sequence_tokens=103)} == {103}


def fake_nats(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss that depends on each pair and on its place in the row."""
    places = torch.arange(1, inputs.size(1) + 1)
    return (torch.sin(inputs * 1.7 + targets) * places + 9).sum()


def score_on_ranks(summed_loss, tokens=TOKENS, *, world_size=1, micro_tokens=16, validation_bytes=311) -> Score:
    source = SimpleNamespace(validation=tokens, validation_bytes=validation_bytes)
    partial = []

    def run(rank: int, total) -> Score:
        return evaluate(summed_loss, source, sequence_tokens=8, micro_tokens=micro_tokens, rank=rank, world_size=world_size,
                        device=CPU, sum_over_ranks=total)

    for rank in range(world_size):
        run(rank, lambda nats: partial.append(nats) or nats)
    return run(0, lambda _: sum(partial))


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
@pytest.mark.parametrize("micro_tokens", [1, 24, 10_000])
def test_the_score_depends_on_neither_ranks_nor_micro_batches(world_size, micro_tokens):
    rows = [TOKENS[i:i + 9].astype(np.int64) for i in range(0, 103, 8)]
    nats = sum(fake_nats(torch.tensor(r[None, :-1]), torch.tensor(r[None, 1:])).item() for r in rows)
    score = score_on_ranks(fake_nats, world_size=world_size, micro_tokens=micro_tokens)
    assert score.nats_per_token == pytest.approx(nats / 103, rel=1e-6) and score.tokens == 103
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 311, rel=1e-6)


def test_a_uniform_model_has_the_closed_form():
    def uniform(inputs, targets):
        logits = torch.zeros(*inputs.shape, 50)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    score = score_on_ranks(uniform)
    assert score.nats_per_token == pytest.approx(math.log(50), rel=1e-6)
    assert score.bits_per_byte == pytest.approx(math.log2(50) * 103 / 311, rel=1e-6)


def test_sums_run_in_float64():
    """A float32 sum of so many equal summands would stop growing at 2^24."""
    nats = 2.0**24 + 2
    assert score_on_ranks(lambda x, y: torch.tensor(nats), micro_tokens=8).nats_per_token == 13 * nats / 103
    assert score_on_ranks(lambda x, y: torch.tensor(nats), micro_tokens=8, world_size=13).nats_per_token == 13 * nats / 103


def test_unknown_bytes_give_no_bits():
    score = score_on_ranks(lambda x, y: torch.tensor(103.0 / 7), validation_bytes=None)
    assert score == Score(pytest.approx(1.0), None, 103)


def test_a_sample_continues_the_validation_text():
    tokenizer = SimpleNamespace(decode=bytes)
    source = SimpleNamespace(validation=np.arange(64, 164).astype(np.uint16), tokenizer=tokenizer)
    text = sample_text(source, lambda tokens: torch.cat((tokens, torch.tensor([65, 66, 255]))), device=CPU)
    assert text == (bytes(range(65, 97)).decode(), "AB\N{REPLACEMENT CHARACTER}")
    assert sample_text(SimpleNamespace(tokenizer=None), None, device=CPU) is None
