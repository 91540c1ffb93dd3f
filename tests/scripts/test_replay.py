"""Replay: a run repeated from its own folder alone, in another place, is the same bit for bit; a tampered one is not."""

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
    """Started beside words.txt, where the run was started."""
    return subprocess.run([sys.executable, "-m", "scripts.replay", str(folder)], cwd=folder.parent, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    (place / "words.txt").write_text(" ".join(str(number**3) for number in range(20_000)))
    subprocess.run([sys.executable, str(ROOT / "train_gpt.py"), *QUICK, "--run.dir", str(place), "--run.name", "first"],
                   check=True, capture_output=True, cwd=place)
    return place / "first"


@pytest.fixture
def folder(first, tmp_path) -> Path:
    """A copy in another place, without its checkpoint."""
    copy = shutil.copytree(first, tmp_path / "moved")
    (copy / "checkpoint.safetensors").unlink()
    shutil.copy(first.parent / "words.txt", tmp_path)
    return copy


def test_the_same_curve_bit_for_bit(folder):
    before = sorted(folder.iterdir())
    done = replay(folder)
    assert done.returncode == 0 and "the same, bit for bit: 6 losses" in done.stdout, done.stderr
    assert sorted(folder.iterdir()) == before


def test_another_loss_is_found(folder):
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    lines[1] = lines[1].replace('"train/loss_nats": ', '"train/loss_nats": 1')
    metrics.write_text("\n".join(lines) + "\n")
    done = replay(folder)
    assert done.returncode == 1 and "first at step 2, train/loss_nats" in done.stdout and "1 of 6" in done.stdout


def test_the_code_that_runs_is_the_recorded_one(folder):
    """Recorded code that trains with another seed gives another curve; cut code is refused."""
    code = folder / "code.txt"
    honest, other = "torch.manual_seed(run.run.seed)", "torch.manual_seed(1234567)"
    code.write_text(code.read_text().replace(honest, other.ljust(len(honest))))
    assert replay(folder).returncode == 1
    code.write_text(code.read_text()[:-100])
    done = replay(folder)
    assert done.returncode == 2 and done.stderr.startswith("error: not a code text")
