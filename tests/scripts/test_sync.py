"""Offline wandb runs are uploaded once, by `wandb sync`, and skipped while they may still be training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import sync

ROOT = Path(sync.__file__).resolve().parent.parent
NO_KEY = "def login(**options): return False\n"
WANDB = "def login(**options): return options == {'prompt': False, 'verify': False}\n"
SENDS = """
import sys
from pathlib import Path
assert sys.argv[1] == "sync"
print(f"wandb sent {len(sys.argv) - 2}")
for folder in map(Path, sys.argv[2:]):
    if "stuck" not in str(folder):
        file, = folder.glob("run-*.wandb")
        file.with_suffix(".wandb.synced").touch()
"""


def make_run(folder, *names, ended=True):
    """A run folder with wandb folders of the given names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if ended:
        (folder / "summary.json").write_text("{}")
    for name in names:
        (folder / "wandb" / name).mkdir(parents=True)
        (folder / "wandb" / name / "run-x.wandb").touch()


@pytest.fixture
def runs(tmp_path):
    """Three runs: one resumed, so with two offline folders; one logged online; one not finished."""
    make_run(tmp_path / "runs" / "a", "offline-run-1-x", "offline-run-2-x")
    make_run(tmp_path / "runs" / "b", "run-1-x")
    make_run(tmp_path / "runs" / "c", "offline-run-1-x", ended=False)
    return tmp_path / "runs"


def call(home, *arguments, wandb=WANDB):
    """Return exit status, output and error of the command, run with a fake package in place of wandb."""
    package = home / "fake" / "wandb"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(wandb)
    (package / "__main__.py").write_text(SENDS)
    done = subprocess.run([sys.executable, "-m", "scripts.sync", *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(package.parent)})
    return done.returncode, done.stdout, done.stderr


def test_every_offline_folder_is_uploaded_once(tmp_path, runs):
    status, output, error = call(tmp_path, runs)
    assert (status, error) == (0, "") and "uploading 2:" in output and "wandb sent 2" in output and "1 skipped" in output
    assert sorted(path.parent.name for path in runs.glob("a/wandb/*/*.synced")) == ["offline-run-1-x", "offline-run-2-x"]
    assert not list(runs.glob("[bc]/wandb/*/*.synced"))
    status, output, _ = call(tmp_path, runs / "a", runs / "b")
    assert (status, output) == (0, "nothing to upload\n")


def test_uploaded_folders_are_not_listed(runs):
    (runs / "a" / "wandb" / "offline-run-1-x" / "run-x.wandb.synced").touch()
    assert [path.name for path in sync.unsent_folders(runs / "a")] == ["offline-run-2-x"]


def test_unfinished_runs_are_uploaded_with_the_flag(tmp_path, runs):
    _, output, _ = call(tmp_path, runs, "--unfinished")
    assert "wandb sent 3" in output and "skipped" not in output


def test_a_dry_run_lists_the_folders_and_uploads_nothing(tmp_path, runs):
    status, output, _ = call(tmp_path, runs, "--dry_run", wandb=NO_KEY)
    assert status == 0 and "would upload 2:" in output and output.count("offline-run") == 2
    assert not list(runs.glob("*/wandb/*/*.synced"))


@pytest.mark.parametrize(("wandb", "message"), [
    (NO_KEY, "no wandb key"), ("raise ImportError('no')", "pip install -r requirements.txt")])
def test_a_missing_key_or_package_gives_one_line(tmp_path, runs, wandb, message):
    status, _, error = call(tmp_path, runs, wandb=wandb)
    assert status == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_pattern_without_runs_gives_one_line(tmp_path, runs):
    status, _, error = call(tmp_path, runs / "z")
    assert status == 2 and error.startswith("error: no run at") and error.count("\n") == 1


def test_folders_that_wandb_did_not_upload_are_named(tmp_path, runs):
    make_run(runs / "stuck", "offline-run-3-x")
    status, _, error = call(tmp_path, runs)
    assert status == 2 and "1 of 3" in error and "stuck" in error and "runs/a" not in error
