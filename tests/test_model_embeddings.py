"""Hashed n-gram embeddings, their signs and their injection, compared with loops."""

from dataclasses import replace
from functools import reduce
from operator import xor

import pytest
import torch

from configs.schema import Model
from model import GPT, HASH, LayerGates, LayerInputs, NgramEmbedding, inject, random_signs

CONFIG = Model(layers=2, dim=16, head_dim=8, zero_init_projections=False, bigram_buckets=37)
START = 0


def scrambled(config: Model, order: int = 2) -> NgramEmbedding:
    embedding = NgramEmbedding(config, order)
    embedding.table.data.normal_(generator=torch.Generator().manual_seed(order))
    return embedding


def some_tokens() -> torch.Tensor:
    tokens = torch.randint(1, 50_257, (2, 12), generator=torch.Generator().manual_seed(1))
    tokens[0, 4] = tokens[0, 6] = tokens[1, 0] = START
    return tokens


def gram(row: list[int], t: int, order: int, *, documents: bool) -> list[int] | None:
    """Return the `order` tokens t, t - 1, ...; None if the earliest lies before the document or the row."""
    begin = max([s for s in range(t + 1) if row[s] == START], default=0) if documents else 0
    return row[t - order + 1:t + 1][::-1] if t - order + 1 >= begin else None


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("order", [2, 3, 4, 6])
@pytest.mark.parametrize("signs", [0, 11])
def test_hashed_ngrams_equal_the_loop(order, documents, signs):
    embedding, tokens = scrambled(replace(CONFIG, bigram_signs=signs), order), some_tokens()
    output = embedding(tokens, tokens == START if documents else None)
    for b, row in enumerate(tokens.tolist()):
        for t in range(len(row)):
            grams = gram(row, t, order, documents=documents)
            bucket = 36 if grams is None else reduce(xor, map(int.__mul__, grams, HASH)) % 36
            sign = embedding.signs[0 if grams is None else reduce(xor, grams) % signs] if signs else 1
            assert torch.equal(output[b, t], embedding.table[bucket] * sign), (b, t)


@pytest.mark.parametrize("documents", [False, True])
def test_used_rows_are_those_with_a_gradient(documents):
    tokens, config = some_tokens() % 40, replace(CONFIG, document_mask=documents, ngram_orders=(3,), value_embeds=1)
    model = GPT(config, vocab_size=40, max_tokens=12, document_start=START)
    model(tokens, tokens).backward()
    rows, tables = model.used_rows(tokens), dict(model.named_parameters())
    assert set(rows) == {"ngrams.0.table", "ngrams.1.table", "value_embeds.0"}
    for name, used in rows.items():
        assert tables[name].grad.any(1).nonzero()[:, 0].tolist() == used.unique().tolist(), name


def test_signs_are_balanced_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    signs = random_signs(512, 64, seed=2)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(signs, random_signs(512, 64, seed=2))
    assert set(signs.unique().tolist()) == {-1.0, 1.0} and signs.mean().abs() < 4 / signs.numel()**0.5
    overlap = signs @ signs.T / 64  # of two rows: 0 in the mean, deviation 1/8
    assert (overlap - torch.eye(512)).abs().mean() < 0.12
    assert not torch.equal(signs, random_signs(512, 64, seed=3))


def test_signs_distinguish_ngrams_that_share_a_bucket():
    one_bucket = replace(CONFIG, bigram_buckets=2)
    pairs = torch.tensor([[5, 9], [5, 10]])
    plain, signed = (scrambled(config)(pairs, None)[:, 1] for config in (one_bucket, replace(one_bucket, bigram_signs=64)))
    assert torch.equal(plain[0], plain[1]) and not torch.equal(signed[0], signed[1])
    assert torch.equal(signed.abs(), plain.abs())


def test_injection_is_its_formula():
    x, x0, ngrams = (torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    weights = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(3))
    a, b = weights.split(1, dim=-1)
    inputs = LayerInputs(x0=x0, ngrams=ngrams, gates=LayerGates(inject=weights))
    torch.testing.assert_close(inject(x, inputs), x + a * x0 + b * ngrams)
    torch.testing.assert_close(inject(x, inputs._replace(ngrams=None)), x + a * x0)


def test_with_injection_the_stream_starts_with_a_share_of_the_ngrams():
    tokens = some_tokens() % 40
    starts = {}
    for injects in (False, True):
        torch.manual_seed(0)
        model = GPT(replace(CONFIG, inject=injects, norm_embedding=False, ngram_orders=(3,)), vocab_size=40, max_tokens=12)
        for table in model.ngrams:
            table.table.data.normal_(generator=torch.Generator().manual_seed(table.order))
        starts[injects], _, ngrams, _ = model.embed_tokens(tokens, None)
        torch.testing.assert_close(ngrams, sum(table(tokens, None) for table in model.ngrams))
        torch.testing.assert_close(starts[injects], model.embed[tokens] + (0.05 if injects else 1) * ngrams)
