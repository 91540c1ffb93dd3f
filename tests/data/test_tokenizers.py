"""Tokenizers: round trips, lengths in bytes, determinism, and the cache."""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizers import Tokenizer, load_tokenizer

TEXT = ("Steepest descent under a norm: the norm chooses the step. Größe, naïve, 梯度, \U0001f600.\n" * 40).encode()
GPT2_FILE = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"  # tiktoken's name for the merges
needs_gpt2 = pytest.mark.skipif(not (Path(os.environ.get("TIKTOKEN_CACHE_DIR", "")) / GPT2_FILE).is_file(),
                                reason="TIKTOKEN_CACHE_DIR does not hold the GPT-2 vocabulary")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> list[Tokenizer]:
    folder = tmp_path_factory.mktemp("cache")
    return [load_tokenizer("bytes", cache_dir=folder),
            load_tokenizer("bpe", train_text=TEXT, vocab_tokens=300, cache_dir=folder)]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=80) | st.just("<|endoftext|>") | st.just(TEXT.decode()))
def test_text_survives_and_every_byte_is_counted(tokenizers, text):
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16 and np.array_equal(ids, tokenizer.encode(text.encode()))
        assert tokenizer.decode(ids) == text.encode()
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert tokenizer.end_of_text not in ids


def test_sizes(tokenizers):
    plain, bpe = tokenizers
    assert (plain.name, plain.vocab_size, plain.end_of_text) == ("bytes", 257, 256)
    assert (bpe.vocab_size, bpe.end_of_text) == (301, 300)
    assert plain.encode("Aé").tolist() == [65, 195, 169]
    assert len(bpe.encode(TEXT)) < len(TEXT) / 2
    for tokenizer in tokenizers:
        lengths = tokenizer.token_bytes()
        assert lengths.dtype == np.int64 and lengths.shape == (tokenizer.vocab_size,)
        assert lengths[tokenizer.end_of_text] == 0 and tokenizer.decode([tokenizer.end_of_text]) == b""


def test_pieces_encode_to_themselves(tokenizers):
    """The ranks are the ids: a slow encoder that merges the lowest pair first agrees with the fast one."""
    bpe = tokenizers[1]
    rank = {piece: i for i, piece in enumerate(bpe.pieces[:-1])}
    for word in ("descent", " norm", " chooses"):
        parts = [bytes([b]) for b in word.encode()]
        while pairs := [(rank[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in rank]:
            i = min(pairs)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        assert bpe.encode(word).tolist() == [rank[part] for part in parts]


def test_training_is_deterministic_and_cached(tmp_path, monkeypatch):
    first = load_tokenizer("bpe", train_text=TEXT, vocab_tokens=280, cache_dir=tmp_path / "a")
    again = load_tokenizer("bpe", train_text=TEXT, vocab_tokens=280, cache_dir=tmp_path / "b")
    assert first.pieces == again.pieces and first.name == again.name
    monkeypatch.setattr("data.tokenizers._train_pieces", lambda *_: pytest.fail("trained although cached"))
    assert load_tokenizer("bpe", train_text=TEXT, vocab_tokens=280, cache_dir=tmp_path / "a").pieces == first.pieces
    with pytest.raises(pytest.fail.Exception):
        load_tokenizer("bpe", train_text=TEXT + b"!", vocab_tokens=280, cache_dir=tmp_path / "a")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw.replace(b"Z", b"Y"), lambda raw: b""])
def test_a_damaged_cache_is_rebuilt(tmp_path, damage):
    good = load_tokenizer("bpe", train_text=TEXT, vocab_tokens=280, cache_dir=tmp_path)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert load_tokenizer("bpe", train_text=TEXT, vocab_tokens=280, cache_dir=tmp_path).pieces == good.pieces
    assert file.read_bytes() == whole and len(list(tmp_path.iterdir())) == 1


def test_short_texts_give_fewer_merges(tmp_path):
    bpe = load_tokenizer("bpe", train_text=b"ab ab", vocab_tokens=1024, cache_dir=tmp_path)
    assert 257 <= bpe.vocab_size < 262 and bpe.decode(bpe.encode("xyz")) == b"xyz"


def test_mistakes_are_named(tmp_path, tokenizers):
    for size in (255, 65_536):
        with pytest.raises(ValueError, match=f"a BPE has 256 tokens .* to 65535, got {size}"):
            load_tokenizer("bpe", train_text=TEXT, vocab_tokens=size, cache_dir=tmp_path)
    for stranger in (-1, 257):
        with pytest.raises(ValueError, match=f"token {stranger} is outside the vocabulary of 257"):
            tokenizers[0].decode([65, stranger])


def test_gpt2_offline_says_what_to_do(tmp_path, monkeypatch):
    def offline(_):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match=r"run once online, or set TIKTOKEN_CACHE_DIR") as caught:
        load_tokenizer("gpt2", cache_dir=tmp_path)
    assert len(str(caught.value)) < 200


@needs_gpt2
def test_gpt2_is_gpt2(tmp_path):
    gpt2 = load_tokenizer("gpt2", cache_dir=tmp_path)
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50_257, 50_256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.decode(gpt2.encode(TEXT)) == TEXT and gpt2.token_bytes()[gpt2.encode(TEXT)].sum() == len(TEXT)
    assert len(gpt2.encode("<|endoftext|>")) > 1
