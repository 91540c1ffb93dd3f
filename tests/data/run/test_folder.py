"""Run folders, and files that are written whole."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from data.files import atomic_write
from data.run.folder import open_run_folder, write_json


def open_plain(dir, name, *, resume=False):
    return open_run_folder(dir, name, fallback_name="tiny", resume=resume)


def test_a_name_is_taken_as_it_is(tmp_path):
    assert open_plain(tmp_path / "new" / "runs", "a") == tmp_path / "new" / "runs" / "a"
    assert open_plain(tmp_path / "new" / "runs", "a") == tmp_path / "new" / "runs" / "a"  # still empty


def test_a_filled_folder_is_refused_unless_resumed(tmp_path):
    (open_plain(tmp_path, "a") / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a holds a run already.*--run\.resume.*--run\.name, for example a-2$"):
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
    with pytest.raises(RuntimeError), atomic_write(path) as temporary_path:
        temporary_path.write_text("half")
        raise RuntimeError
    with pytest.raises(TypeError):
        write_json(path, object())
    assert json.loads(path.read_text()) == 1 and list(tmp_path.iterdir()) == [path]
