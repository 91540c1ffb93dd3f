"""The .bin format: round trips, and a message for every way in which a file can be wrong."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards import HEADER_BYTES, MAGIC, find_files, read_shard, write_shard


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 65_535), min_size=1, max_size=300))
def test_what_is_written_is_read(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    write_shard(path, np.array(tokens))
    read = read_shard(path)
    assert read.dtype == np.uint16 and read.tolist() == tokens
    assert not read.flags.writeable
    assert os.listdir(path.parent) == ["a.bin"]


def test_the_bytes_are_the_speedruns(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([50_256, 7]))
    raw = (tmp_path / "a.bin").read_bytes()
    assert len(raw) == 1024 + 4
    assert raw[:12] == MAGIC.to_bytes(4, "little") + (1).to_bytes(4, "little") + (2).to_bytes(4, "little")
    assert raw[12:1024] == bytes(1012) and raw[1024:] == b"\x50\xc4\x07\x00"


@pytest.mark.parametrize("token", [-1, 65_536])
def test_tokens_outside_uint16_are_refused(tmp_path, token):
    with pytest.raises(ValueError, match=f"token {token} at position 2"):
        write_shard(tmp_path / "a.bin", np.array([1, 2, token]))
    assert not os.listdir(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(5))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="cannot write .*a.bin: No space left"):
        write_shard(path, np.arange(9))
    assert read_shard(path).tolist() == [0, 1, 2, 3, 4] and os.listdir(tmp_path) == ["a.bin"]


def damage(path, at: int, value: int) -> None:
    header = np.fromfile(path, dtype="<i4", count=256)
    header[at] = value
    path.write_bytes(header.tobytes() + path.read_bytes()[HEADER_BYTES:])


@pytest.mark.parametrize(("field", "value", "message"), [
    (0, 7, "a.bin: magic number is 7, a shard has 20240520"),
    (1, 2, "a.bin: version is 2, only 1 is known"),
    (2, 11, "a.bin: token count is 11, but the file has 20 bytes of tokens"),
    (2, -4, "a.bin: token count is -4"),
])
def test_a_wrong_header_field_is_named(tmp_path, field, value, message):
    write_shard(tmp_path / "a.bin", np.arange(10))
    damage(tmp_path / "a.bin", field, value)
    with pytest.raises(ValueError, match=message):
        read_shard(tmp_path / "a.bin")


@pytest.mark.parametrize(("keep", "message"), [(100, "header is truncated: 100 bytes"), (0, "header is truncated"),
                                               (1030, "token count is 10, but the file has 6 bytes")])
def test_a_truncated_file_is_refused(tmp_path, keep, message):
    write_shard(tmp_path / "a.bin", np.arange(10))
    os.truncate(tmp_path / "a.bin", keep)
    with pytest.raises(ValueError, match=message):
        read_shard(tmp_path / "a.bin")


def test_a_missing_file_and_a_token_outside_the_vocabulary_are_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read shard .*b.bin: No such file"):
        read_shard(tmp_path / "b.bin")
    write_shard(tmp_path / "a.bin", np.array([1, 99, 100, 5]))
    assert len(read_shard(tmp_path / "a.bin", vocab_size=101)) == 4
    with pytest.raises(ValueError, match="a.bin: token 100 at position 2 is outside the vocabulary of 100"):
        read_shard(tmp_path / "a.bin", vocab_size=100)


def test_files_are_listed_once_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.txt").mkdir()
    paths = find_files([f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"], flag="--data.train_files")
    assert [path.name for path in paths] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(("pattern", "message"), [
    ("books.txt", "--data.val_files: no file matches '.*books.txt'; did you mean '.*book.txt'"),
    ("texst/book.txt", "did you mean '.*texts'"),
    ("zzz", "no file matches '.*zzz'$"),
    ("fineweb10B/fineweb_val_*.bin", "python -m scripts.fetch_fineweb --shards 9"),
])
def test_a_pattern_without_match_gets_advice(tmp_path, pattern, message):
    (tmp_path / "book.txt").write_text("x")
    (tmp_path / "texts").mkdir()
    with pytest.raises(ValueError, match=message):
        find_files([f"{tmp_path}/{pattern}"], flag="--data.val_files")
