"""A sweep survives failures, kills and Ctrl-C, and runs no trial twice.

Most tests replace train_gpt.py by a stand-in, a few lines that write the same files; two tests use the real script.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.lab import sweep
from scripts.lab.folders import RunFolder
from scripts.lab.sweep import Progress, Trial, TrialResult, last_error, run_sweep

ROOT = Path(__file__).resolve().parents[3]
SHORT = ("--train.steps", "2", "--data.val_bytes", "2048", "--log.sample_tokens", "0", "--log.wandb", "disabled")
STAND_IN = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from configs.cli import parse
from configs.serialize import config_hash, config_to_dict
from data.run.folder import write_json
run = parse(sys.argv[1:])
folder = Path(run.run.dir) / run.run.name
folder.mkdir(exist_ok=True)
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
print("start", "at", (folder / "state").exists(), "threads", os.environ["OMP_NUM_THREADS"], flush=True)
if run.train.steps == 666:
    sys.exit("error: steps are cursed")
(folder / "state").touch()
until = time.time() + run.train.steps / 100
while time.time() < until and not stopped:
    time.sleep(0.01)
if stopped:
    print("saved")
else:
    write_json(folder / "config.json", config_to_dict(run))
    write_json(folder / "summary.json", {{"config_hash": config_hash(run), "val_loss_nats": 1.0 + run.run.seed}})
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Replace train_gpt.py by a program that takes steps / 100 seconds, and fails if there are 666 steps."""
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(sweep, "TRAIN", path)
    return path


def trial(name, *flags, seed=1):
    return Trial(f"{name}-seed{seed}", name, "bytes", tuple(flags), seed)


def starts(dir, name):
    """Return how often a trial was started."""
    return (dir / f"{name}.log").read_text().count("start at")


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ---- The real script ------------------------------------------------------------------------------------------------


def test_real_runs_finish_fail_and_are_not_repeated(tmp_path, capsys):
    broken = trial("broken", *SHORT, "--data.source", "text", "--data.train_files", str(tmp_path / "none.txt"))
    trials = [broken, trial("good", *SHORT)]
    first = run_sweep(trials, dir=tmp_path / "sweep")
    assert [result.status for result in first] == ["failed", "finished"]
    assert "no file matches" in first[0].error and first[0].run is None
    assert first[1].run.summary["steps"] == 2 and first[1].run.experiment == "good"
    assert "2 of 2: good-seed1 finished" in capsys.readouterr().out
    log = (tmp_path / "sweep" / "good-seed1.log").read_text()
    assert run_sweep(trials, dir=tmp_path / "sweep") == first
    assert (tmp_path / "sweep" / "good-seed1.log").read_text() == log


def test_a_real_run_that_was_cut_is_resumed(tmp_path):
    long = trial("long", *SHORT, "--train.steps", "60", "--model.layers", "1", "--log.every_steps", "1",
                 "--train.val_every_steps", "0")
    process = subprocess.Popen([sys.executable, sweep.TRAIN, "bytes", *sweep.run_flags(long, tmp_path)],
                             stdout=subprocess.DEVNULL)
    metrics = tmp_path / "long-seed1" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 3)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    [result] = run_sweep([long], dir=tmp_path)
    assert result.run.summary["steps"] == 60
    assert "resuming" in (tmp_path / "long-seed1.log").read_text()


# ---- The stand-in ---------------------------------------------------------------------------------------------------


def test_a_failed_run_is_tried_again_only_if_asked(tmp_path, stand_in, capsys):
    cursed = trial("cursed", "--train.steps", "666")
    for _ in range(2):
        [result] = run_sweep([cursed], dir=tmp_path)
        assert (result.status, result.error) == ("failed", "steps are cursed")
    assert starts(tmp_path, "cursed-seed1") == 1
    assert json.loads((tmp_path / "cursed-seed1.failed").read_text()) == {
        "error": "steps are cursed", "status": 1, "flags": ["--train.steps", "666"]}
    run_sweep([cursed], dir=tmp_path, retry_failed=True)
    assert starts(tmp_path, "cursed-seed1") == 2
    assert "1 of 1: cursed-seed1 failed: steps are cursed" in capsys.readouterr().out


def test_a_failure_of_other_flags_is_forgotten(tmp_path, stand_in):
    run_sweep([trial("a", "--train.steps", "666")], dir=tmp_path)
    [result] = run_sweep([trial("a", "--train.steps", "2")], dir=tmp_path)
    assert result.status == "finished" and not (tmp_path / "a-seed1.failed").exists()


def test_nothing_runs_if_one_trial_has_a_mistake(tmp_path, stand_in):
    with pytest.raises(ValueError, match="train.stepps"):
        run_sweep([trial("a", "--train.steps", "2"), trial("b", "--train.stepps", "2")], dir=tmp_path)
    with pytest.raises(ValueError, match="two trials are named 'a-seed1'"):
        run_sweep([trial("a"), trial("a")], dir=tmp_path)
    with pytest.raises(ValueError, match="--jobs must be at least 1, got 0"):
        run_sweep([trial("a")], dir=tmp_path, jobs=0)
    assert not list(tmp_path.glob("*.log"))


def test_a_folder_of_another_run_is_refused(tmp_path, stand_in):
    run_sweep([trial("a", "--train.steps", "2")], dir=tmp_path)
    with pytest.raises(ValueError, match="a-seed1 holds another run; choose another --dir"):
        run_sweep([trial("a", "--train.steps", "3")], dir=tmp_path)


def test_jobs_run_side_by_side_and_share_the_cores(tmp_path, stand_in, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    trials = [trial("a", "--train.steps", "50", seed=seed) for seed in range(1, 5)]
    assert [result.trial for result in run_sweep(trials, dir=tmp_path, jobs=4)] == trials
    starts = [(tmp_path / each.name / "state").stat().st_mtime for each in trials]
    assert max(starts) - min(starts) < 0.5 * len(trials) - 0.5  # one after another they would begin half a second apart
    assert "threads 2" in (tmp_path / "a-seed1.log").read_text()


def test_the_environments_threads_win(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run_sweep([trial("a", "--train.steps", "1")], dir=tmp_path)
    assert "threads 3" in (tmp_path / "a-seed1.log").read_text()


def start_sweep(dir, stand_in, *steps):
    """Start a sweep in a process of its own, over trials t0, t1, ... with the given numbers of steps."""
    code = f"""
import signal, sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from scripts.lab import sweep
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process of a shell ignores SIGINT by default
sweep.TRAIN = Path({str(stand_in)!r})
sweep.run_sweep([sweep.Trial(f"t{{i}}-seed1", f"t{{i}}", "bytes", ("--train.steps", str(n)), 1)
                 for i, n in enumerate({steps!r})], dir=Path({str(dir)!r}))
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_killed_sweep_continues_and_runs_nothing_twice(tmp_path, stand_in):
    steps = (1, 200, 2)
    killed = start_sweep(tmp_path, stand_in, *steps)
    wait_for(lambda: (tmp_path / "t1-seed1.log").exists() and starts(tmp_path, "t1-seed1"))
    killed.kill()
    killed.wait()
    assert not (tmp_path / "t1-seed1" / "summary.json").exists()  # its orphaned run still lives
    trials = [trial(f"t{i}", "--train.steps", str(n)) for i, n in enumerate(steps)]
    assert [result.status for result in run_sweep(trials, dir=tmp_path)] == ["finished"] * 3
    assert [starts(tmp_path, each.name) for each in trials] == [1, 1, 1]


def test_an_orphan_that_dies_is_continued(tmp_path, stand_in):
    lock = os.open(tmp_path / "t-seed1.lock", os.O_RDWR | os.O_CREAT)
    orphan = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, time; fcntl.flock({lock}, fcntl.LOCK_EX); print(flush=True); time.sleep(.3)"],
        pass_fds=[lock], stdout=subprocess.PIPE)
    orphan.stdout.readline()
    os.close(lock)
    [result] = run_sweep([trial("t", "--train.steps", "1")], dir=tmp_path)
    assert orphan.poll() is not None, "the sweep did not wait"
    assert result.status == "finished" and starts(tmp_path, "t-seed1") == 1
    orphan.stdout.close()


def test_ctrl_c_lets_the_runs_save_and_says_how_to_go_on(tmp_path, stand_in):
    stopped = start_sweep(tmp_path, stand_in, 1, 3000)
    wait_for(lambda: (tmp_path / "t1-seed1.log").exists() and starts(tmp_path, "t1-seed1"))
    stopped.send_signal(signal.SIGINT)
    out, _ = stopped.communicate(timeout=20)
    assert stopped.returncode == 130
    assert "1 of 2 runs are done" in out and "same command again" in out
    assert "saved" in (tmp_path / "t1-seed1.log").read_text()
    assert not (tmp_path / "t1-seed1.failed").exists()


def test_the_reason_is_the_last_error_of_the_last_try(tmp_path):
    log = tmp_path / "log"
    log.write_text("error: old\n")
    assert last_error(log) == "old"
    old = log.stat().st_size
    log.write_text("error: old\nTraceback\nKeyError: 'x'\n\n")
    assert last_error(log, old) == "KeyError: 'x'"
    log.write_text("error: a\nerror: b\nbye\n")
    assert last_error(log) == "b"
    log.write_text("")
    assert last_error(log) == ""


# ---- Progress -------------------------------------------------------------------------------------------------------


A, B = (Trial(f"{name}-seed1", name, "bytes", (), 1) for name in "ab")


def finished(trial, path, loss=2.0):
    return TrialResult(trial, "finished", RunFolder(path, {}, {}, {"val_loss_nats": loss}), "")


def test_the_time_left_is_estimated_from_the_runs_of_this_sweep(tmp_path, capsys):
    progress = Progress(4)
    progress.report(finished(A, tmp_path), fresh=False)
    assert progress.left == "?"
    progress.start_seconds -= 30
    progress.report(finished(B, tmp_path), fresh=True)
    assert progress.left == "0:01:00"  # two trials are left
    progress.report(TrialResult(B, "failed", None, "why"), fresh=True)
    assert capsys.readouterr().out.splitlines() == [
        "1 of 4: a-seed1 was finished, 2.00000 nats; ? left", "2 of 4: b-seed1 finished, 2.00000 nats; 0:01:00 left",
        "3 of 4: b-seed1 failed: why; 0:00:15 left"]
