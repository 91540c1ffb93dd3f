"""The compression baseline: its arithmetic, its texts and its page."""

import json
import sys

import pytest

from benchmarks import HERE
from benchmarks.compression import compressors, decode_texts, measure, page
from configs.schema import Data
from data.sources import open_source, prose_bytes, split_text


def test_bits_per_byte_with_a_compressor_that_counts_distinct_bytes():
    """C(t) = 2, C(v) = 4, C(t + v) = 5, and |v| = 8."""
    row = measure(lambda text: bytes(set(text)), b"aaxx", b"abcdabcd", repeats=2)
    assert row["bits_per_byte_alone"] == 8 * 4 / 8
    assert row["bits_per_byte_after_train"] == 8 * (5 - 2) / 8
    assert len(row["seconds"]) == 2


def test_texts_are_those_that_the_model_sees(tmp_path):
    source = open_source(Data(corpus="prose", tokenizer="bytes", val_bytes=1000), cache_dir=tmp_path)
    train, validation = split_text(prose_bytes())
    assert decode_texts(source) == (train, validation[:1000])


def test_a_missing_package_is_named_with_its_installation(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyppmd", None)
    with pytest.raises(SystemExit):
        compressors()
    assert "pyppmd is not installed: pip install pyppmd zstandard" in capsys.readouterr().err


def test_the_page_is_made_from_the_results():
    assert (HERE / "compression.md").read_text() == page(json.loads((HERE / "compression.json").read_text()))
