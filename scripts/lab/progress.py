"""How a sweep stands: a live table on a terminal, plain lines elsewhere."""

import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any


class Board(AbstractContextManager["Board"]):
    """Counts what was done; the plain board says nothing more."""

    def __init__(self, experiments: Sequence[str], *, jobs: int) -> None:
        """One entry of `experiments` a trial."""
        self.total, self.jobs, self.began = len(experiments), jobs, time.monotonic()
        self.trials = {name: experiments.count(name) for name in dict.fromkeys(experiments)}
        self.losses: dict[str, list[float]] = {name: [] for name in self.trials}
        self.failed, self.running = dict.fromkeys(self.trials, 0), dict.fromkeys(self.trials, 0)
        self.count, self.durations, self.starts = 0, [], {}

    def __exit__(self, *error: object) -> None:
        """The base board holds nothing open."""

    def started(self, trial: Any) -> None:
        """A trial began."""
        self.running[trial.experiment] += 1
        self.starts[trial.name] = time.monotonic()

    def done(self, outcome: Any, *, fresh: bool) -> None:
        """A trial has its outcome; `fresh`: this sweep ran it, so that its duration counts for the time left."""
        trial, self.count = outcome.trial, self.count + 1
        if trial.name in self.starts:
            self.running[trial.experiment] -= 1
        if fresh and outcome.status == "finished":
            self.durations.append(time.monotonic() - self.starts[trial.name])
        if outcome.status == "failed":
            self.failed[trial.experiment] += 1
        elif (loss := outcome.run.summary.get("val_loss_nats")) is not None:
            self.losses[trial.experiment].append(loss)

    def say(self, text: str) -> None:
        """One line for the reader."""

    def refresh(self) -> None:
        """Time has passed."""

    @property
    def left(self) -> str:
        """Time that the trials still to come should take, from the mean of those that finished; `?` before the first."""
        rest = self.total - self.count
        return spell(statistics.fmean(self.durations) * rest / min(self.jobs, max(1, rest))) if self.durations else "?"


class Lines(Board):
    """One line a trial."""

    def done(self, outcome: Any, *, fresh: bool) -> None:
        """Count, and say so."""
        super().done(outcome, fresh=fresh)
        if outcome.status == "failed":
            text = f"failed: {outcome.error}"
        else:
            loss = outcome.run.summary.get("val_loss_nats")
            text = ("finished" if fresh else "was finished") + (f", {loss:.5f} nats" if loss is not None else "")
        self.say(f"{self.count} of {self.total}: {outcome.trial.name} {text}; {self.left} left")

    def say(self, text: str) -> None:
        """Print it."""
        print(text, flush=True)


class Live(Board):
    """A table that is redrawn in place: a row an experiment."""

    def __init__(self, experiments: Sequence[str], *, jobs: int) -> None:
        """Opens the terminal's live region."""
        from rich.live import Live as Region

        super().__init__(experiments, jobs=jobs)
        self.region = Region(self.table(), refresh_per_second=2, transient=False)
        self.region.start()

    def __exit__(self, *error: object) -> None:
        """Leaves the last state standing."""
        self.refresh()
        self.region.stop()

    def say(self, text: str) -> None:
        """Above the table."""
        self.region.console.print(text, markup=False)

    def refresh(self) -> None:
        """Redraw."""
        self.region.update(self.table())

    def table(self) -> Any:
        """Counts and losses per experiment; the title says how long it took, and will."""
        from rich.table import Table

        elapsed = spell(time.monotonic() - self.began)
        found = Table("experiment", "done", "running", "failed", "best", "mean",
                      title=f"{self.count} of {self.total} runs, {elapsed} so far, {self.left} left")
        for name, losses in self.losses.items():
            found.add_row(name, f"{len(losses)} of {self.trials[name]}", str(self.running[name]), str(self.failed[name]),
                          f"{min(losses):.5f}" if losses else "", f"{statistics.fmean(losses):.5f}" if losses else "")
        return found


def board_for(experiments: Sequence[str], *, jobs: int, show: bool) -> Board:
    """The board that fits standard output; a silent one where nothing is to be shown."""
    kind = Board if not show else Live if sys.stdout.isatty() else Lines
    return kind(experiments, jobs=jobs)


def spell(seconds: float) -> str:
    """`42 s`, `3 min 20 s` or `5 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
