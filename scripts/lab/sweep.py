"""Sweeps: many training runs, one after another or several at once, that survive failures and kills of the sweep itself.

Beside each run folder NAME there are three files:
- NAME.log: the output of the run;
- NAME.lock: locked while the run lives, even after the sweep that started it was killed;
- NAME.failed: why the run failed, if it did.

A sweep that is started again skips finished runs, resumes runs that were cut off, and waits for runs that still live.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

from configs.cli import parse_row
from configs.notation import raise_if
from configs.schema import Run
from configs.serialize import config_from_dict, config_hash, unflatten
from data.run.folder import write_json
from scripts.lab.folders import RunFolder, read_json, read_run

TRAIN = Path(__file__).resolve().parent.parent.parent / "train_gpt.py"
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Trial:
    """Run of a sweep: a preset, the flags that change it, and a seed."""

    name: str
    """Name of the run folder, for example `no_smear-seed2`."""
    experiment: str
    """Name that its seeds share, for example `no_smear`."""
    preset: str
    flags: tuple[str, ...]
    """Flags of train_gpt.py, without the seed."""
    seed: int


class TrialResult(NamedTuple):
    """Result of a trial."""

    trial: Trial
    status: Literal["finished", "failed"]
    run: RunFolder | None
    """Folder of a finished run; None if it failed."""
    error: str
    """Reason of a failure; empty if the run finished."""


class ChildProcess(NamedTuple):
    """Trial that is running."""

    trial: Trial
    process: subprocess.Popen[bytes] | None
    """None if the process belongs to another sweep, which holds the lock."""
    lock: int
    """File descriptor of NAME.lock."""
    log_bytes: int = 0
    """Length of NAME.log before this process began."""


def run_sweep(trials: Sequence[Trial], *, dir: Path, jobs: int = 1, nproc: int = 1,
              retry_failed: bool = False) -> list[TrialResult]:
    """Run all trials, `jobs` at once, with `nproc` processes each. Return their results in the order of the trials.

    Raise ValueError, before any run starts, for a trial with a wrong flag, for a name given twice, and for a folder that
    has another run. On Ctrl-C the runs save a checkpoint, and the sweep exits with status 130.
    """
    for option, value in (("jobs", jobs), ("nproc", nproc)):
        raise_if(value < 1, f"--{option} must be at least 1, got {value}")
    for name, count in Counter(trial.name for trial in trials).items():
        raise_if(count > 1, f"two trials are named {name!r}; names must differ")
    dir = dir.expanduser().resolve()
    runs = {trial: parse_row(trial.preset, run_flags(trial, dir)) for trial in trials}
    sweep = Sweep(dir, runs, nproc=nproc, threads=max(1, (os.cpu_count() or 1) // jobs))
    progress = Progress(len(trials))
    # Results of earlier sweeps come first: they are not run again.
    results = {trial: result for trial in trials if (result := sweep.saved_result(trial, retry_failed))}
    for result in results.values():
        progress.report(result, fresh=False)
    try:
        sweep.run_all([trial for trial in trials if trial not in results], results, jobs, progress)
    except KeyboardInterrupt:
        sweep.stop()
        print(f"interrupted: {len(results)} of {len(trials)} runs are done, the others are saved. "
              "Give the same command again to continue", flush=True)
        raise SystemExit(130) from None  # the status of a shell after Ctrl-C: 128 + SIGINT
    return [results[trial] for trial in trials]


def run_flags(trial: Trial, dir: Path) -> list[str]:
    """Return the command line of a trial, after the preset. Of a repeated flag, train_gpt.py takes the last."""
    return [*trial.flags, "--run.name", trial.name, "--run.dir", str(dir), "--run.seed", str(trial.seed), "--run.resume",
            "--log.experiment", trial.experiment]


def launch_command(script: Path, nproc: int) -> list[str]:
    """Return the command that starts a script in `nproc` processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    return [sys.executable, *launcher, str(script)]


class Sweep:
    """Files and processes of one sweep."""

    def __init__(self, dir: Path, runs: dict[Trial, Run], *, nproc: int, threads: int) -> None:
        """Create the folder. Nothing is started yet. `threads`: CPU threads of each process."""
        self.dir, self.runs, self.nproc, self.threads = dir, runs, nproc, threads
        self.children: list[ChildProcess] = []
        try:
            dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot use {dir} for the runs: {error.strerror}; choose another --dir") from None

    def saved_result(self, trial: Trial, retry_failed: bool = False) -> TrialResult | None:
        """Return the trial's result from its files; None if it must run. Raise ValueError if the folder has another run."""
        folder, failed = self.dir / trial.name, self.dir / f"{trial.name}.failed"
        if (folder / "summary.json").is_file():
            run = read_run(folder)
            if config_hash(config_from_dict(unflatten(run.config))) != config_hash(self.runs[trial]):
                raise ValueError(f"{folder} holds another run; choose another --dir")
            return TrialResult(trial, "finished", run, "")
        if failed.is_file() and not retry_failed:
            note = read_json(failed)
            if note.get("flags") == list(trial.flags):  # with other flags it may succeed
                return TrialResult(trial, "failed", None, str(note.get("error")))
        return None

    def run_all(self, waiting: list[Trial], results: dict[Trial, TrialResult], jobs: int, progress: "Progress") -> None:
        """Run the waiting trials, at most `jobs` at once, and write each result into `results`."""
        while waiting or self.children:
            while waiting and len(self.children) < jobs:
                self.children.append(self.start(waiting.pop(0)))
            for child in list(self.children):
                if (result := self.poll(child)) is not None:
                    self.children.remove(child)
                    results[child.trial] = result
                    progress.report(result, fresh=child.process is not None)
            time.sleep(POLL_SECONDS)

    def start(self, trial: Trial) -> ChildProcess:
        """Lock a trial and start it. If another sweep has its lock, return a child without a process, to wait for.

        The lock belongs to the open file, which the run inherits. So the kernel releases it when the run ends, whichever
        way, and keeps it while the run lives on after a killed sweep: no run can start twice, and no stale lock remains.
        """
        (self.dir / f"{trial.name}.failed").unlink(missing_ok=True)  # of the attempt that is now repeated
        lock = os.open(self.dir / f"{trial.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        # The second check is not redundant: another sweep may have finished the trial since the first look.
        if not _try_lock(lock) or self.saved_result(trial):
            return ChildProcess(trial, None, lock)
        return self._spawn(trial, lock)

    def _spawn(self, trial: Trial, lock: int) -> ChildProcess:
        """Start the process of a trial."""
        environment = {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"} | os.environ
        with open(self.dir / f"{trial.name}.log", "ab") as log:
            log_bytes = log.tell()
            # A process group of its own: the terminal's Ctrl-C reaches only the sweep, which passes it on once, in `stop`.
            # Two interrupts would end a run before its checkpoint is written.
            process = subprocess.Popen([*launch_command(TRAIN, self.nproc), trial.preset, *run_flags(trial, self.dir)],
                                       stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, pass_fds=[lock],
                                       process_group=0)
        return ChildProcess(trial, process, lock, log_bytes)

    def poll(self, child: ChildProcess) -> TrialResult | None:
        """Return the result of a child; None while it runs. A failure is written to NAME.failed."""
        if child.process is None:
            return self._poll_other_sweep(child)
        status = child.process.poll()
        if status is None:
            return None
        os.close(child.lock)
        result = self.saved_result(child.trial) if status == 0 else None
        return result or self._failed(child, status)

    def _poll_other_sweep(self, child: ChildProcess) -> TrialResult | None:
        """Return the result of another sweep's run; None while it lives. If it died without a result, start it again."""
        if not _try_lock(child.lock):
            return None
        if result := self.saved_result(child.trial):
            os.close(child.lock)
            return result
        self.children[self.children.index(child)] = self._spawn(child.trial, child.lock)
        return None

    def _failed(self, child: ChildProcess, status: int) -> TrialResult:
        """Return the failure, and write NAME.failed, so that the next sweep does not try the run again unasked.

        A run that ended with status 0 but without a summary was interrupted: no file is written, and it may be resumed.
        """
        trial = child.trial
        reason = last_error(self.dir / f"{trial.name}.log", child.log_bytes) or f"ended with status {status}"
        if status:
            failure = {"error": reason, "status": status, "flags": list(trial.flags)}
            write_json(self.dir / f"{trial.name}.failed", failure)
        return TrialResult(trial, "failed", None, reason)

    def stop(self) -> None:
        """Interrupt every run, so that it saves a checkpoint, and wait until all have ended."""
        processes = [child.process for child in self.children if child.process is not None]
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)  # the group: torchrun and all its ranks
        for process in processes:
            process.wait()


def _try_lock(lock: int) -> bool:
    """Try to take a lock without waiting. Return True if it is now held."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def last_error(log: Path, start: int = 0) -> str:
    """Return the last `error:` line of a log from byte `start` on, else its last line, else an empty string."""
    lines = [line.strip() for line in log.read_bytes()[start:].decode("utf-8", "replace").splitlines()]
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    return (errors or [line for line in lines if line] or [""])[-1]


# ---- Progress -------------------------------------------------------------------------------------------------------


class Progress:
    """Printer of one line per trial that ends, with an estimate of the time that is left."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.fresh, self.start_seconds = total, 0, 0, time.monotonic()

    def report(self, result: TrialResult, *, fresh: bool) -> None:
        """Print the result of a trial. `fresh`: True if this sweep ran it, so that its time counts in the estimate."""
        self.done += 1
        self.fresh += fresh
        message = f"failed: {result.error}"
        if result.run:
            loss = result.run.summary.get("val_loss_nats")
            message = ("finished" if fresh else "was finished") + ("" if loss is None else f", {loss:.5f} nats")
        print(f"{self.done} of {self.total}: {result.trial.name} {message}; {self.left} left", flush=True)

    @property
    def left(self) -> str:
        """Estimated time until all trials are done, such as `1:05:00`; `?` before this sweep has run one."""
        if not self.fresh:
            return "?"
        seconds = (time.monotonic() - self.start_seconds) / self.fresh * (self.total - self.done)
        return str(timedelta(seconds=round(seconds)))
