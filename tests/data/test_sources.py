"""Sources: what each holds, what the cache saves, and what their mistakes look like."""

import numpy as np
import pytest

import data.sources
from configs.schema import Data
from data.shards import write_shard
from data.sources import clip_documents, encode_documents, open_source, split_documents
from data.tokenizers import load_tokenizer

WORDS = "the norm chooses the step and the rôle chooses the norm\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with three text files and three shards of GPT-2 tokens."""
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        (tmp_path / f"t{i}.txt").write_text(WORDS * (20 + i), encoding="utf-8")
        write_shard(tmp_path / f"s{i}.bin", np.arange(100 * (i + 1)) * 7 % 50_257)
    return tmp_path


def opened(folder, **changes):
    return open_source(Data(**changes), cache_dir=folder / "cache")


def text(folder, **changes):
    return opened(folder, **({"source": "text", "tokenizer": "bytes", "train_files": ("t*.txt",)} | changes))


def shards(folder, **changes):
    return opened(folder, **({"source": "shards", "tokenizer": "gpt2", "train_files": ("s1.bin", "s2.bin"),
                              "val_files": ("s0.bin",), "val_tokens": 50} | changes))


# ---- Text and corpus -----------------------------------------------------------------------------


def test_text_is_documents_and_the_last_tenth_validates(folder):
    source = text(folder, val_bytes=10**6)
    joined = b"".join((folder / f"t{i}.txt").read_bytes() for i in range(3))
    train, validation = (source.tokenizer.decode(tokens) for tokens in (source.train[0], source.validation))
    assert train + validation == joined and len(train) == len(joined) * 9 // 10
    assert source.validation_bytes == len(validation) == len(source.validation) - 1
    starts = np.flatnonzero(source.train[0] == source.document_start)
    assert starts[0] == 0 and len(starts) == 3 and source.document_start == 256 == source.validation[0]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_validation_counts_its_bytes(folder, tokenizer):
    files = dict(tokenizer=tokenizer, bpe_vocab_tokens=300, val_files=("t0.txt",), train_files=("t1.txt",))
    source = text(folder, val_bytes=52, **files)
    assert source.validation_bytes == source.tokenizer.token_bytes()[source.validation[1:]].sum() == 52
    assert source.validation[0] == source.document_start == source.vocab_size - 1
    cut = text(folder, val_bytes=36, **files)
    assert cut.validation_bytes == 35, "the cut would divide a character"
    assert source.tokenizer.decode(source.validation).startswith(cut.tokenizer.decode(cut.validation))


def test_several_validation_files_are_documents_too(folder):
    source = text(folder, train_files=("t2.txt",), val_files=("t0.txt", "t1.txt"), val_bytes=2000)
    assert (source.validation == source.document_start).sum() == 2 and source.validation_bytes == 2000


def test_splits_and_clips_of_documents():
    assert split_documents([b"abcde", b"", b"fghij"]) == ([b"abcde", b"fghi"], [b"j"])
    assert split_documents([b"a" * 9, b"b"]) == ([b"a" * 9], [b"b"])
    assert split_documents([b"x"]) == ([], [b"x"])
    assert clip_documents([b"abc", b"def"], 4) == [b"abc", b"d"]
    assert clip_documents(["é".encode(), b"z"], 1) == []


def test_the_second_opening_reads_the_cache(folder, monkeypatch):
    first = text(folder, tokenizer="bpe", bpe_vocab_tokens=280)
    monkeypatch.setattr(data.sources, "encode_documents", lambda *_: pytest.fail("encoded although cached"))
    again = text(folder, tokenizer="bpe", bpe_vocab_tokens=280)
    assert np.array_equal(first.train[0], again.train[0]) and np.array_equal(first.validation, again.validation)
    assert first.data_hash == again.data_hash


def test_a_damaged_cache_is_rebuilt(folder):
    wanted = text(folder).train[0].tolist()
    for file in (folder / "cache").glob("tokens-*.bin"):
        file.write_bytes(file.read_bytes()[:-3])
    assert text(folder).train[0].tolist() == wanted


def test_the_hash_tells_data_apart(folder):
    variants = [{}, {"val_bytes": 100}, {"tokenizer": "bpe"}, {"train_files": ("t0.txt",)}, {"val_files": ("x.txt",)},
                {"train_files": ("t1.txt",)}]
    (folder / "x.txt").write_text("x" * 200)
    hashes = [text(folder, **v).data_hash for v in variants]
    assert len(set(hashes)) == len(hashes) and text(folder).data_hash == hashes[0] and len(hashes[0]) == 16


def test_the_corpus_is_one_document(folder, monkeypatch):
    whole = (WORDS * 50).encode()
    monkeypatch.setitem(data.sources.CORPORA, "code", lambda: whole)
    source = opened(folder, bpe_vocab_tokens=260, val_bytes=60)
    train = whole[:len(whole) * 9 // 10]
    assert source.tokenizer.decode(source.train[0]) == train
    assert np.array_equal(source.train[0], encode_documents([train], source.tokenizer))
    assert source.validation_bytes == 60 and source.vocab_size == 261 and source.notes == ()


@pytest.mark.parametrize(("changes", "message"), [
    ({"train_files": ("bad.txt",)}, "bad.txt is not UTF-8: byte 0xff at offset 3"),
    ({"train_files": ("empty.txt",)}, "no training text"),
    ({"val_files": ("empty.txt",)}, "no validation text"),
    ({"val_files": ("t1.txt",)}, "t1.txt is in both --data.train_files and --data.val_files"),
    ({"train_files": ("t9.txt",)}, "--data.train_files: no file matches 't9.txt'; did you mean 't"),
])
def test_mistakes_in_text_are_named(folder, changes, message):
    (folder / "bad.txt").write_bytes(b"abc\xffdef")
    (folder / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        text(folder, **changes)


# ---- Shards -------------------------------------------------------------------------------------


def without_gpt2(monkeypatch):
    def offline(*_, **__):
        raise ValueError("the GPT-2 vocabulary cannot be downloaded")

    monkeypatch.setattr(data.sources, "load_tokenizer", offline)


def with_bytes_for_gpt2(monkeypatch):
    """A stand-in of GPT-2's size whose token i has i % 3 bytes."""
    class Fake:
        def token_bytes(self):
            return np.arange(50_257) % 3

    monkeypatch.setattr(data.sources, "load_tokenizer", lambda *_, **__: Fake())


def test_shards_are_mapped_and_the_first_tokens_validate(folder, monkeypatch):
    with_bytes_for_gpt2(monkeypatch)
    source = shards(folder)
    assert [len(s) for s in source.train] == [200, 300] and isinstance(source.train[0], np.memmap)
    assert source.validation.tolist() == [i * 7 for i in range(51)]
    assert source.validation_bytes == sum(i * 7 % 3 for i in range(1, 51))
    assert (source.vocab_size, source.document_start, source.notes) == (50_257, 50_256, ())


def test_short_validation_shards_are_said(folder, monkeypatch):
    with_bytes_for_gpt2(monkeypatch)
    source = shards(folder, train_files=("s2.bin",), val_files=("s0.bin", "s1.bin"), val_tokens=500)
    assert len(source.validation) == 300
    assert source.notes == ("validation has 299 tokens instead of 500: --data.val_files hold no more",)
    spanning = shards(folder, train_files=("s2.bin",), val_files=("s0.bin", "s1.bin"), val_tokens=150)
    assert spanning.validation.tolist() == [*range(0, 700, 7), *range(0, 357, 7)] and spanning.notes == ()


def test_without_gpt2_shards_still_train(folder, monkeypatch):
    without_gpt2(monkeypatch)
    source = shards(folder)
    assert source.tokenizer is None and source.validation_bytes is None
    assert source.notes == ("no bits per byte and no samples: the GPT-2 vocabulary cannot be downloaded",)


def test_the_hash_of_shards(folder, monkeypatch):
    without_gpt2(monkeypatch)
    hashes = [shards(folder).data_hash, shards(folder, val_tokens=51).data_hash,
              shards(folder, train_files=("s1.bin",)).data_hash]
    write_shard(folder / "s2.bin", np.arange(300))
    hashes.append(shards(folder).data_hash)
    assert len(set(hashes)) == 4


@pytest.mark.parametrize(("changes", "message"), [
    ({"val_files": ("t0.txt",)}, "t0.txt: magic number is"),
    ({"val_files": ("alien.bin",)}, "alien.bin: token 50300 at position 1"),
    ({"val_files": ("s1.bin",)}, "s1.bin is in both"),
    ({"val_files": ("one.bin",)}, "hold 1 token; a prediction needs 2"),
])
def test_mistakes_in_shards_are_named(folder, monkeypatch, changes, message):
    without_gpt2(monkeypatch)
    write_shard(folder / "alien.bin", np.array([5, 50_300]))
    write_shard(folder / "one.bin", np.array([5]))
    with pytest.raises(ValueError, match=message):
        shards(folder, **changes)


def test_documents_are_opened_by_end_of_text(tmp_path):
    plain = load_tokenizer("bytes", cache_dir=tmp_path)
    assert encode_documents([b"ab", b"c"], plain).tolist() == [256, 97, 98, 256, 99]
