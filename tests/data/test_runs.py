"""Run folders, metrics.jsonl and summary.json."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from data.files import replacing
from data.runs import (
    SUMMARY_KEYS,
    MetricsLog,
    open_run_folder,
    read_metrics,
    write_json,
    write_summary,
)


def record(step, **more):
    return {"step": step, "tokens": 10 * step, "train_seconds": 0.5 * step, **more}


def open_plain(dir, name, *, resume=False):
    return open_run_folder(dir, name, fallback_name="tiny", resume=resume)


def test_a_name_is_taken_as_it_is(tmp_path):
    assert open_plain(tmp_path / "new" / "runs", "a") == tmp_path / "new" / "runs" / "a"
    assert open_plain(tmp_path / "new" / "runs", "a") == tmp_path / "new" / "runs" / "a"  # still empty


def test_a_filled_folder_is_refused_unless_resumed(tmp_path):
    (open_plain(tmp_path, "a") / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a is taken.*--run\.resume.*--run\.name, say a-2$"):
        open_plain(tmp_path, "a")
    assert open_plain(tmp_path, "a", resume=True) == tmp_path / "a"


def test_without_a_name_the_fallback_is_numbered(tmp_path):
    names = [open_plain(tmp_path, "").name for _ in range(3)]
    assert names == ["tiny", "tiny-2", "tiny-3"]
    assert open_plain(tmp_path, "", resume=True).name == "tiny"


def test_runs_that_start_at_once_get_different_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: open_plain(tmp_path, ""), range(16)))
    assert len(set(folders)) == 16


def test_resume_without_a_folder_makes_one(tmp_path):
    assert open_plain(tmp_path, "b", resume=True).is_dir()


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\\b", "/etc", " a", "a\n", "a\0"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="plain folder name"):
        open_plain(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_an_empty_fallback_is_refused(tmp_path):
    with pytest.raises(ValueError, match="plain folder name"):
        open_run_folder(tmp_path, "", fallback_name="", resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_in_the_way_is_named(tmp_path, resume):
    (tmp_path / "file").write_text("")
    for dir, name in ((tmp_path, "file"), (tmp_path / "file", "a"), (tmp_path / "file", "")):
        with pytest.raises(ValueError, match=f"cannot use {tmp_path}"):
            open_plain(dir, name, resume=resume)


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="a is not writable"):
        open_plain(tmp_path, "a")


def test_json_is_strict_and_keeps_order(tmp_path):
    write_json(tmp_path / "a.json", {"b": math.nan, "a": [math.inf, (1, 2.5)], "c": {"é": None}})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"b": None, "a": [None, [1, 2.5]], "c": {"é": None}}
    assert list(json.loads(text)) == ["b", "a", "c"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(RuntimeError), replacing(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    with pytest.raises(TypeError):
        write_json(path, object())
    assert json.loads(path.read_text()) == 1 and list(tmp_path.iterdir()) == [path]


def test_metrics_are_read_as_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(record(1))
    log.write(record(2, **{"train/loss_nats": math.nan, "val/loss_nats": 2.5}))
    expected = [record(1), record(2, **{"train/loss_nats": None, "val/loss_nats": 2.5})]
    assert read_metrics(path) == expected  # before it is closed
    assert log.offset() == path.stat().st_size
    log.close()
    assert read_metrics(path) == expected


def test_a_record_without_its_clock_is_a_bug(tmp_path):
    with pytest.raises(AssertionError, match="train_seconds"):
        MetricsLog(tmp_path / "metrics.jsonl").write({"step": 1, "tokens": 2})


def test_resuming_drops_what_will_be_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(record(1))
    offset = log.offset()
    log.write(record(2, kept=False))
    log.close()
    path.write_bytes(path.read_bytes() + b'{"step": 3, "tok')
    log = MetricsLog(path, offset=offset)
    assert log.offset() == offset
    log.write(record(2, kept=True))
    assert read_metrics(path) == [record(1), record(2, kept=True)]
    log.close()
    MetricsLog(path).close()
    assert len(read_metrics(path)) == 2
    MetricsLog(path, offset=0).close()
    assert read_metrics(path) == []


def test_a_log_shorter_than_its_checkpoint_says_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl has 3 bytes but the checkpoint was taken at 50"):
        MetricsLog(path, offset=50)
    assert path.read_text() == "{}\n"


@pytest.mark.parametrize("tail", [b"", b'{"step": 2', b'{"step": "\xc3'])
def test_an_incomplete_last_line_is_left_out(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize("text", [b'{"step": 1}\n{"st\n{"step": 2}\n', b'{"step": 1}\n[1]\n', b'{"step": 1}\n\xff\n'])
def test_a_damaged_line_is_named(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, is not (a )?JSON"):
        read_metrics(path)


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no .*metrics.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_summary_has_exactly_its_keys(tmp_path):
    path = tmp_path / "summary.json"
    values = {key: None for key in reversed(SUMMARY_KEYS)} | {"steps": 3, "val_loss_nats": math.inf}
    write_summary(path, **values)
    written = json.loads(path.read_text())
    assert tuple(written) == SUMMARY_KEYS and written["steps"] == 3 and written["val_loss_nats"] is None
    with pytest.raises(ValueError, match="no field 'val_los'; did you mean 'val_loss_nats'"):
        write_summary(path, **values, val_los=1)
    values.pop("seed")
    with pytest.raises(ValueError, match="lacks the field 'seed'"):
        write_summary(path, **values)
