"""Replaying a run from its folder, even a moved one, gives the same losses bit for bit; changed files are noticed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = ["bytes", "--train.steps", "4", "--train.val_every_steps", "2", "--log.every_steps", "1", "--data.val_bytes", "2048",
         "--log.wandb", "disabled", "--log.sample_tokens", "0", "--data.source", "text", "--data.train_files", "words.txt"]


def replay(folder: Path) -> subprocess.CompletedProcess:
    """Run the script in the folder of words.txt, in which the run was started."""
    return subprocess.run([sys.executable, "-m", "scripts.replay", str(folder)], cwd=folder.parent, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "words.txt").write_text(" ".join(str(number**3) for number in range(20_000)))
    subprocess.run([sys.executable, str(ROOT / "train_gpt.py"), *QUICK, "--run.dir", str(folder), "--run.name", "first"],
                   check=True, capture_output=True, cwd=folder)
    return folder / "first"


@pytest.fixture
def folder(first, tmp_path) -> Path:
    """A copy of the run folder elsewhere, without its checkpoint."""
    copy = shutil.copytree(first, tmp_path / "moved")
    (copy / "checkpoint.safetensors").unlink()
    shutil.copy(first.parent / "words.txt", tmp_path)
    return copy


def test_replay_gives_the_same_losses_bit_for_bit(folder):
    before = sorted(folder.iterdir())
    done = replay(folder)
    assert done.returncode == 0 and "the same, bit for bit: 6 losses" in done.stdout, done.stderr
    assert sorted(folder.iterdir()) == before


def test_a_changed_loss_is_reported(folder):
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    lines[1] = lines[1].replace('"train/loss_nats": ', '"train/loss_nats": 1')
    metrics.write_text("\n".join(lines) + "\n")
    done = replay(folder)
    assert done.returncode == 1 and "first at step 2, train/loss_nats" in done.stdout and "1 of 6" in done.stdout


def test_the_recorded_code_is_what_runs(folder):
    """Recorded code that trains with another seed gives other losses; truncated code is refused."""
    code = folder / "code.txt"
    original, changed = "torch.manual_seed(run.run.seed)", "torch.manual_seed(1234567)"
    code.write_text(code.read_text().replace(original, changed.ljust(len(original))))
    assert replay(folder).returncode == 1
    code.write_text(code.read_text()[:-100])
    done = replay(folder)
    assert done.returncode == 2 and done.stderr.startswith("error: not a code text")
