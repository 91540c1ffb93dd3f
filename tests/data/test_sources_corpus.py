"""The embedded corpus, and cutting UTF-8."""

import hashlib
import sys
import sysconfig

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.sources import clip_text, corpus_bytes, corpus_files, prose_bytes, split_text


def test_the_corpus_is_this_pythons_own():
    files, text = corpus_files(), corpus_bytes()
    assert files == sorted(files) and len(text) == sum(path.stat().st_size for path in files)
    assert {"abc.py", "ast.py"} <= {path.name for path in files}
    assert "/idlelib/" not in "".join(path.as_posix() for path in files)
    assert len(text) > 5_000_000 and corpus_bytes() == text
    text.decode()


def test_the_prose_is_english():
    text = prose_bytes()
    assert text == prose_bytes() and len(text) > 300_000
    assert text.decode().count(" the ") > 2000


def test_python_without_its_topics_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="--data.corpus code"):
        prose_bytes()


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the hash is that of Python 3.11.7 built from source")
def test_the_corpus_of_python_3_11_7():
    text = corpus_bytes()
    if len(text) != 11_308_408:
        pytest.skip("another distribution of Python 3.11.7")
    assert hashlib.sha256(text).hexdigest().startswith("29b552d0bef5913b")


def test_a_python_without_sources_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    with pytest.raises(ValueError, match="ships no .py sources under .*python311.zip; .*--data.source text"):
        corpus_bytes()


@given(st.text(max_size=60), st.integers(0, 250))
def test_a_cut_keeps_characters_whole(text, length):
    raw = text.encode()
    clipped = clip_text(raw, length)
    assert raw.startswith(clipped) and text.startswith(clipped.decode())
    assert min(length, len(raw)) - 4 < len(clipped) <= length


@given(st.text(max_size=60))
def test_a_split_loses_nothing(text):
    train, validation = split_text(text.encode())
    assert train + validation == text.encode()
    assert len(train) <= 0.9 * len(text.encode()) < len(train) + 4
    train.decode(), validation.decode()
