"""Offline wandb runs are found, sent once by wandb's own sync, and held back while they may still grow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import sync

ROOT = Path(sync.__file__).resolve().parent.parent
KEYLESS = "def login(**options): return False\n"
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
    """Three runs: one resumed and so in two offline parts, one sent online, one not ended."""
    make_run(tmp_path / "runs" / "a", "offline-run-1-x", "offline-run-2-x")
    make_run(tmp_path / "runs" / "b", "run-1-x")
    make_run(tmp_path / "runs" / "c", "offline-run-1-x", ended=False)
    return tmp_path / "runs"


def call(home, *arguments, wandb=WANDB):
    """Status, output and error of the command, with a package in the place of wandb that is home/wandb."""
    package = home / "fake" / "wandb"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(wandb)
    (package / "__main__.py").write_text(SENDS)
    done = subprocess.run([sys.executable, "-m", "scripts.sync", *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(package.parent)})
    return done.returncode, done.stdout, done.stderr


def test_all_parts_are_sent_once(tmp_path, runs):
    status, said, error = call(tmp_path, runs)
    assert (status, error) == (0, "") and "sending 2:" in said and "wandb sent 2" in said and "1 held back" in said
    assert sorted(path.parent.name for path in runs.glob("a/wandb/*/*.synced")) == ["offline-run-1-x", "offline-run-2-x"]
    assert not list(runs.glob("[bc]/wandb/*/*.synced"))
    status, said, _ = call(tmp_path, runs / "a", runs / "b")
    assert (status, said) == (0, "nothing to send\n")


def test_only_the_part_that_is_missing_goes(runs):
    (runs / "a" / "wandb" / "offline-run-1-x" / "run-x.wandb.synced").touch()
    assert [path.name for path in sync.unsent(runs / "a")] == ["offline-run-2-x"]


def test_unfinished_runs_go_when_asked(tmp_path, runs):
    _, said, _ = call(tmp_path, runs, "--unfinished")
    assert "wandb sent 3" in said and "held back" not in said


def test_a_dry_run_lists_and_sends_nothing(tmp_path, runs):
    status, said, _ = call(tmp_path, runs, "--dry_run", wandb=KEYLESS)
    assert status == 0 and "would send 2:" in said and said.count("offline-run") == 2
    assert not list(runs.glob("*/wandb/*/*.synced"))


@pytest.mark.parametrize(("wandb", "told"), [
    (KEYLESS, "no wandb key"), ("raise ImportError('no')", "pip install -r requirements.txt")])
def test_what_is_missing_is_one_line(tmp_path, runs, wandb, told):
    status, _, error = call(tmp_path, runs, wandb=wandb)
    assert status == 2 and error.startswith("error: ") and told in error and error.count("\n") == 1


def test_a_pattern_without_runs_is_one_line(tmp_path, runs):
    status, _, error = call(tmp_path, runs / "z")
    assert status == 2 and error.startswith("error: no run at") and error.count("\n") == 1


def test_what_wandb_left_behind_is_named(tmp_path, runs):
    make_run(runs / "stuck", "offline-run-3-x")
    status, _, error = call(tmp_path, runs)
    assert status == 2 and "1 of 3" in error and "stuck" in error and "runs/a" not in error
