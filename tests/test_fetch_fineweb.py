"""Fetching shards from a mirror and the hub, and making them from documents: no incomplete shard, no repeated work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.cli import parse_row
from data.shards import read_shard, write_shard
from scripts import fetch_fineweb
from scripts.fetch_fineweb import (
    Fetch,
    fetch_shards,
    main,
    open_progress,
    shard_name,
    shards_needed,
    tokenize,
    write_shards,
)

ROOT = Path(__file__).resolve().parent.parent
GPT2_FILE = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"  # tiktoken's name for the merges
needs_gpt2 = pytest.mark.skipif(not (Path(os.environ.get("TIKTOKEN_CACHE_DIR", "")) / GPT2_FILE).is_file(),
                                reason="TIKTOKEN_CACHE_DIR does not hold the GPT-2 vocabulary")


def command(*flags: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "scripts.fetch_fineweb", *map(str, flags)], cwd=cwd, text=True,
                          capture_output=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- Mirror and hub ---------------------------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path) -> Path:
    """Four shards."""
    for i in range(4):
        write_shard(tmp_path / "mirror" / shard_name(i), np.arange(1000 + i))
    return tmp_path / "mirror"


def test_shard_names_are_the_speedruns():
    assert [shard_name(i) for i in (0, 1, 12)] == ["fineweb_val_000000.bin", "fineweb_train_000001.bin",
                                                   "fineweb_train_000012.bin"]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_shards_are_copied_from_a_mirror(tmp_path, mirror, prefix):
    done = command("--shards", 2, "--dir", "here", "--mirror", f"{prefix}{mirror}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "here") == [shard_name(i) for i in (1, 2, 0)]
    for name in names(tmp_path / "here"):
        assert (tmp_path / "here" / name).read_bytes() == (mirror / name).read_bytes()
    assert "1 validation shard, 2 training shards" in done.stdout


def test_complete_shards_stay_and_damaged_ones_are_fetched_again(tmp_path, mirror, capsys):
    args = Fetch(shards=2, dir=tmp_path / "here", mirror=str(mirror))
    fetch_shards(args)
    os.truncate(args.dir / shard_name(2), 500)
    before = (args.dir / shard_name(1)).stat().st_mtime_ns
    fetch_shards(args)
    assert (args.dir / shard_name(1)).stat().st_mtime_ns == before
    assert len(read_shard(args.dir / shard_name(2))) == 1002
    output = capsys.readouterr().out
    assert output.count("already here") == 2 and output.count("damaged here, fetching from") == 1


def test_a_damaged_shard_of_the_mirror_is_deleted(tmp_path, mirror):
    os.truncate(mirror / shard_name(1), 1500)
    done = command("--shards", 1, "--dir", "here", "--mirror", mirror, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: a damaged shard arrived and was deleted; run this again")
    assert names(tmp_path / "here") == [".incoming", shard_name(0)] and names(tmp_path / "here" / ".incoming") == []


class Hub:
    """Stands in for huggingface_hub.hf_hub_download."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.requests = folder, []

    def __call__(self, dataset: str, name: str, *, repo_type: str, local_dir: Path) -> str:
        self.requests.append((dataset, name, repo_type))
        if self.folder is None:
            raise ConnectionError("no route to host\n" * 30)
        (local_dir / name).write_bytes((self.folder / name).read_bytes())
        return str(local_dir / name)


def test_only_missing_shards_are_downloaded(tmp_path, mirror, monkeypatch):
    hub = Hub(mirror)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    write_shard(tmp_path / "here" / shard_name(1), np.arange(9))
    fetch_shards(Fetch(shards=2, dir=tmp_path / "here"))
    assert hub.requests == [("kjj0/fineweb10B-gpt2", shard_name(i), "dataset") for i in (0, 2)]
    assert names(tmp_path / "here") == [shard_name(i) for i in (1, 2, 0)]


def test_a_missing_network_gives_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", Hub(None))
    with pytest.raises(ValueError) as error:
        main(Fetch(dir=tmp_path / "here"), [])
    assert str(error.value) == (
        "cannot download fineweb_val_000000.bin from data set kjj0/fineweb10B-gpt2 (ConnectionError): check the network "
        "and the name; without a network use --mirror FOLDER or --tokenize FOLDER")


@pytest.mark.parametrize(("flags", "message"), [
    ({"shards": 104}, "--shards must be at most 103, the number of training shards on the hub, got 104"),
    ({"shards": 0}, "--shards must be at least 1, got 0"),
    ({"mirror": "a", "tokenize": "b"}, "--mirror and --tokenize cannot be combined"),
    ({"mirror": "https://example.org/x"}, "--mirror takes a folder or a file:// address, got 'https"),
    ({"mirror": "nowhere"}, "--mirror: there is no nowhere/fineweb_val_000000.bin"),
])
def test_wrong_arguments_are_refused_with_the_value(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        fetch_shards(Fetch(dir=tmp_path / "here", **flags))


@pytest.mark.parametrize(("preset", "flags", "count"), [
    ("speedrun", [], 9), ("track3", [], 18), ("track3", ["--train.steps", "100000"], 103), ("tiny", [], 0),
    ("track3", ["--data.train_files", "elsewhere/*.bin"], 0)])
def test_number_of_shards_that_a_preset_reads(preset, flags, count):
    """1.704 G tokens in shards of 100 M; 338.8 M of clipped documents are within the 9 that are always fetched."""
    assert shards_needed(parse_row(preset, flags)) == count


def test_with_a_preset_as_many_shards_are_fetched_as_it_reads(tmp_path, mirror, capsys):
    for i in range(4, 10):
        write_shard(mirror / shard_name(i), np.arange(1000))
    main(Fetch(preset="speedrun", dir=tmp_path / "here", mirror=str(mirror)), ["--train.batch_tokens", "65536"])
    assert len(names(tmp_path / "here")) == 10
    main(Fetch(preset="tiny", dir=tmp_path / "there"), [])
    assert "tiny reads no shards" in capsys.readouterr().out and not (tmp_path / "there").exists()
    with pytest.raises(ValueError, match="--train.steps, need --preset"):
        main(Fetch(), ["--train.steps", "9"])


# ---- Shards from documents --------------------------------------------------------------------------


def make_documents() -> list[np.ndarray]:
    """Forty documents of 1 to 12 tokens, 50256 first."""
    rng = np.random.default_rng(0)
    return [np.array([50_256, *rng.integers(0, 50_256, size=rng.integers(0, 12))], dtype=np.uint16) for _ in range(40)]


@pytest.fixture
def tokenized(monkeypatch):
    """Let tokenize() use make_documents(); return the list of documents at which reading began, one entry per call."""
    documents, began = make_documents(), []
    monkeypatch.setattr(fetch_fineweb, "read_documents",
                        lambda source, first: began.append(first) or documents[first:])
    monkeypatch.setattr(fetch_fineweb, "encode_all", lambda texts, workers: texts)
    return began


def joined(folder: Path) -> tuple[list[int], list[int]]:
    """(lengths of the shards, all their tokens)."""
    parts = []
    while (folder / shard_name(len(parts))).exists():
        parts.append(read_shard(folder / shard_name(len(parts))).tolist())
    return [len(part) for part in parts], sum(parts, [])


def test_shards_hold_all_documents_in_order(tmp_path, tokenized):
    stream = np.concatenate(make_documents()).tolist()
    tokenize("x", tmp_path, shards=100, shard_tokens=50, workers=1)
    lengths, tokens = joined(tmp_path)
    assert tokens == stream and lengths == [50] * (len(stream) // 50) + [len(stream) % 50]


@pytest.mark.parametrize("shard_tokens", [3, 7, 50])
def test_interrupted_work_continues_at_the_first_missing_shard(tmp_path, tokenized, shard_tokens):
    stream = np.concatenate(make_documents()).tolist()
    for shards in (1, 2, 4):
        tokenize("x", tmp_path, shards=shards, shard_tokens=shard_tokens, workers=1)
        assert joined(tmp_path)[1] == stream[:shards * shard_tokens]
    assert tokenized == sorted(tokenized) and (tokenized[-1] > 0) == (shard_tokens > 3)
    (tmp_path / shard_name(2)).unlink()
    tokenize("x", tmp_path, shards=4, shard_tokens=shard_tokens, workers=1)
    assert joined(tmp_path)[1] == stream[:4 * shard_tokens]
    tokenize("x", tmp_path, shards=1000, shard_tokens=shard_tokens, workers=1)
    assert joined(tmp_path)[1] == stream
    began = len(tokenized)
    tokenize("x", tmp_path, shards=1000, shard_tokens=shard_tokens, workers=1)
    assert len(tokenized) == began, "complete shards are not made again"


def test_a_kill_between_writing_and_recording_a_shard_loses_no_tokens(tmp_path, tokenized):
    stream = np.concatenate(make_documents()).tolist()
    recorded = tmp_path / "tokenized.json"
    for shards in (1, 1000):  # killed after a full shard, and after the last, shorter one
        open_progress("x", tmp_path, 50)
        before = recorded.read_text()
        tokenize("x", tmp_path, shards=shards, shard_tokens=50, workers=1)
        recorded.write_text(before)
        tokenize("x", tmp_path, shards=shards, shard_tokens=50, workers=1)
        assert joined(tmp_path)[1] == stream[:shards * 50]


def test_documents_that_end_with_a_shard_leave_no_empty_one(tmp_path, tokenized):
    total = sum(map(len, make_documents()))
    tokenize("x", tmp_path, shards=9, shard_tokens=total, workers=1)
    assert joined(tmp_path)[0] == [total]
    assert json.loads((tmp_path / "tokenized.json").read_text())["exhausted"]


def test_a_folder_with_other_shards_is_refused(tmp_path, tokenized):
    tokenize("x", tmp_path, shards=2, shard_tokens=50, workers=1)
    with pytest.raises(ValueError, match="holds shards of 50 tokens made from x; .*choose another --dir"):
        tokenize("y", tmp_path, shards=2, shard_tokens=50, workers=1)
    write_shard(tmp_path / "other" / shard_name(1), np.arange(5))
    with pytest.raises(ValueError, match="holds shards not made from x"):
        tokenize("x", tmp_path / "other", shards=2, shard_tokens=50, workers=1)


def test_a_source_without_documents_is_refused(tmp_path):
    with pytest.raises(ValueError, match="x holds no documents"):
        write_shards([], tmp_path, open_progress("x", tmp_path, 50), shards=2, skip_tokens=0)


@pytest.mark.parametrize(("files", "message"), [
    ({"a.txt": "x", "b.jsonl": "{}"}, "files of one kind of .txt, .jsonl, .parquet, but it holds .jsonl, .txt"),
    ({"a.md": "x"}, "it holds none"),
    ({"a.jsonl": '{"body": "x"}'}, "has no column 'text', only body"),
])
def test_folders_of_unreadable_or_mixed_files_are_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list(fetch_fineweb.read_documents(str(tmp_path), 0))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_folders_are_read_in_order(tmp_path, suffix):
    import pyarrow
    import pyarrow.parquet

    texts = ["one\ntwo\n", "drei", "四"]
    for i, text in enumerate(texts):
        path = tmp_path / f"{i}{suffix}"
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
        else:
            path.write_text(text if suffix == ".txt" else json.dumps({"text": text}), encoding="utf-8")
    assert list(fetch_fineweb.read_documents(str(tmp_path), 0)) == texts
    assert list(fetch_fineweb.read_documents(str(tmp_path), 2)) == texts[2:]


@needs_gpt2
def test_tokenizing_a_folder_from_the_command_line(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text("Hello world" * (i + 1))
    done = command("--tokenize", "texts", "--dir", "here", "--shard-tokens", 5, "--shards", 1, "--workers", 2,
                   cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lengths, tokens = joined(tmp_path / "here")
    assert lengths == [5, 5] and tokens[:4] == [50_256, 15_496, 995, 50_256]
