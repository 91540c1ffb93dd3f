"""Many runs, one after another or several at once, that survive whatever befalls the process that started them.

Beside the run folder NAME stand NAME.log (what the run printed), NAME.lock (held for as long as the run lives, even if
the sweep is killed) and, where the run failed, NAME.failed (why). A sweep that is started again skips what is finished,
continues what was cut, and waits for runs that outlived their sweep.
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
from configs.schema import Run
from configs.serialize import config_from_dict, config_hash, unflatten
from data.run.folder import write_json
from scripts.lab.folders import RunFolder, read_json, read_run

TRAIN = Path(__file__).resolve().parent.parent.parent / "train_gpt.py"
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep: a preset, what is changed there, and a seed."""

    name: str
    """Its folder, say `no_smear-seed2`."""
    experiment: str
    """What its seeds share, say `no_smear`."""
    preset: str
    flags: tuple[str, ...]
    seed: int


class Outcome(NamedTuple):
    """What became of a trial; `run` is its folder where it finished, `error` the reason where it did not."""

    trial: Trial
    status: Literal["finished", "failed"]
    run: RunFolder | None
    error: str


class Child(NamedTuple):
    """A trial at work: its process (None: another sweep's, which holds the lock), the lock's file, and the length that
    its log had before."""

    trial: Trial
    process: subprocess.Popen[bytes] | None
    lock: int
    log_bytes: int = 0


def run_sweep(trials: Sequence[Trial], *, dir: Path, jobs: int = 1, nproc: int = 1,
              retry_failed: bool = False) -> list[Outcome]:
    """Run all trials, `jobs` at once, `nproc` processes each; the outcomes in the order of the trials.

    Raises ValueError, before anything runs, for a trial that does not parse, for a name that is given twice, and for
    a folder that holds another run. Ctrl-C lets the runs save themselves and ends with status 130.
    """
    for option, value in (("jobs", jobs), ("nproc", nproc)):
        if value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    dir = dir.expanduser().resolve()
    sweep = Sweep(dir, _parse_all(trials, dir), nproc=nproc, threads=max(1, (os.cpu_count() or 1) // jobs))
    board = Board(len(trials))
    found = {trial: outcome for trial in trials if (outcome := sweep.known(trial, retry_failed))}
    for outcome in found.values():
        board.done(outcome, fresh=False)
    try:
        sweep.work([trial for trial in trials if trial not in found], found, jobs, board)
    except KeyboardInterrupt:
        sweep.stop()
        print(f"interrupted: {len(found)} of {len(trials)} runs are done, the others are saved. "
              "Give the same command again to continue", flush=True)
        raise SystemExit(130) from None  # the shell's status after Ctrl-C
    return [found[trial] for trial in trials]


def _parse_all(trials: Sequence[Trial], dir: Path) -> dict[Trial, Run]:
    """Each trial's complete configuration. Raises ValueError for the first mistake."""
    for name, count in Counter(trial.name for trial in trials).items():
        if count > 1:
            raise ValueError(f"two trials are named {name!r}; names must differ")
    return {trial: parse_row(trial.preset, run_flags(trial, dir)) for trial in trials}


def run_flags(trial: Trial, dir: Path) -> list[str]:
    """The trial's command line, the preset apart; a training run takes the last of repeated flags."""
    return [*trial.flags, "--run.name", trial.name, "--run.dir", str(dir), "--run.seed", str(trial.seed), "--run.resume",
            "--log.experiment", trial.experiment]


def launch(script: Path, nproc: int) -> list[str]:
    """The command that starts a script in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    return [sys.executable, *launcher, str(script)]


class Sweep:
    """The files and processes of one sweep."""

    def __init__(self, dir: Path, runs: dict[Trial, Run], *, nproc: int, threads: int) -> None:
        """Nothing is started; the folder is made."""
        self.dir, self.runs, self.nproc, self.threads = dir, runs, nproc, threads
        self.children: list[Child] = []
        try:
            dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot use {dir} for the runs: {error.strerror}; choose another --dir") from None

    def known(self, trial: Trial, retry_failed: bool = False) -> Outcome | None:
        """The outcome that the files tell. Raises ValueError where the folder holds another run."""
        folder, failed = self.dir / trial.name, self.dir / f"{trial.name}.failed"
        if (folder / "summary.json").is_file():
            run = read_run(folder)
            if config_hash(config_from_dict(unflatten(run.config))) != config_hash(self.runs[trial]):
                raise ValueError(f"{folder} holds another run; choose another --dir")
            return Outcome(trial, "finished", run, "")
        if failed.is_file() and not retry_failed:
            note = read_json(failed)
            if note.get("flags") == list(trial.flags):
                return Outcome(trial, "failed", None, str(note.get("error")))
        return None

    def work(self, waiting: list[Trial], found: dict[Trial, Outcome], jobs: int, board: "Board") -> None:
        """Start trials as places become free, until all have an outcome in `found`."""
        while waiting or self.children:
            while waiting and len(self.children) < jobs:
                self.children.append(self.start(waiting.pop(0)))
            for child in list(self.children):
                if (outcome := self.ended(child)) is not None:
                    self.children.remove(child)
                    found[child.trial] = outcome
                    board.done(outcome, fresh=child.process is not None)
            time.sleep(POLL_SECONDS)

    def start(self, trial: Trial) -> Child:
        """Take the trial's lock and start it; if an orphan holds the lock, a child without process, to be waited for."""
        (self.dir / f"{trial.name}.failed").unlink(missing_ok=True)  # of the try that is now repeated
        lock = os.open(self.dir / f"{trial.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        if not _locked(lock) or self.known(trial):  # it runs elsewhere, or has ended there since we looked
            return Child(trial, None, lock)
        return self._spawn(trial, lock)

    def _spawn(self, trial: Trial, lock: int) -> Child:
        """The trial's process, in a process group of its own, so that Ctrl-C reaches it once, through `stop`."""
        environment = {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"} | os.environ
        with open(self.dir / f"{trial.name}.log", "ab") as log:
            before = log.tell()
            process = subprocess.Popen([*launch(TRAIN, self.nproc), trial.preset, *run_flags(trial, self.dir)], stdout=log,
                                       stderr=log, stdin=subprocess.DEVNULL, env=environment, pass_fds=[lock],
                                       process_group=0)
        return Child(trial, process, lock, before)

    def ended(self, child: Child) -> Outcome | None:
        """The child's outcome, written down where it failed; None while it lives, or where it was started anew."""
        if child.process is None:
            return self._ended_elsewhere(child)
        status = child.process.poll()
        if status is None:
            return None
        os.close(child.lock)
        outcome = self.known(child.trial) if status == 0 else None
        return outcome or self._failed(child, status)

    def _ended_elsewhere(self, child: Child) -> Outcome | None:
        """Wait for the lock of another sweep's run; if that ended without an outcome, the trial is ours to continue."""
        if not _locked(child.lock):
            return None
        if outcome := self.known(child.trial):
            os.close(child.lock)
            return outcome
        self.children[self.children.index(child)] = self._spawn(child.trial, child.lock)
        return None

    def _failed(self, child: Child, status: int) -> Outcome:
        """Write NAME.failed, so that the run is not tried again unasked; status 0 is a run that was cut, and may go on."""
        trial = child.trial
        reason = last_error(self.dir / f"{trial.name}.log", child.log_bytes) or f"ended with status {status}"
        if status:
            note = {"error": reason, "status": status, "flags": list(trial.flags)}
            write_json(self.dir / f"{trial.name}.failed", note)
        return Outcome(trial, "failed", None, reason)

    def stop(self) -> None:
        """Ask every run to save itself and end, and wait until they have."""
        processes = [child.process for child in self.children if child.process is not None]
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
        for process in processes:
            process.wait()


def _locked(lock: int) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def last_error(log: Path, start: int = 0) -> str:
    """The reason that a run gave for its end: the last `error:` line from byte `start` on, else the last line."""
    lines = [line.strip() for line in log.read_bytes()[start:].decode("utf-8", "replace").splitlines()]
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    return (errors or [line for line in lines if line] or [""])[-1]


# ---- How a sweep stands ---------------------------------------------------------------------------------------------


class Board:
    """Prints a line for every trial that ends, with the time that the rest should take."""

    def __init__(self, total: int) -> None:
        self.total, self.known, self.fresh, self.began = total, 0, 0, time.monotonic()

    def done(self, outcome: Outcome, *, fresh: bool) -> None:
        """Say what became of a trial; `fresh`: this sweep ran it, so that its time tells of those to come."""
        self.known += 1
        self.fresh += fresh
        result = f"failed: {outcome.error}"
        if outcome.run:
            loss = outcome.run.summary.get("val_loss_nats")
            result = ("finished" if fresh else "was finished") + ("" if loss is None else f", {loss:.5f} nats")
        print(f"{self.known} of {self.total}: {outcome.trial.name} {result}; {self.left} left", flush=True)

    @property
    def left(self) -> str:
        """Time that the trials still to come should take, at the pace of this sweep: `1:05:00`; `?` before its first."""
        if not self.fresh:
            return "?"
        seconds = (time.monotonic() - self.began) / self.fresh * (self.total - self.known)
        return str(timedelta(seconds=round(seconds)))
