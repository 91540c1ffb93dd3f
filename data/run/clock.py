"""Training time, and the signals that end it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Training seconds, counted from its construction on; what runs under `paused` does not count."""

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        """Start at so many seconds: those of the run's earlier parts, where it is resumed."""
        self._device, self._seconds = device, seconds
        self._since: float | None = self._now()

    def _now(self) -> float:
        # A GPU works behind the program's back: what was launched before this moment must also end before it.
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds counted so far; the device is not waited for."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop counting for the block, and wait for the device before and after it."""
        self._seconds, self._since = self._seconds + self._now() - self._since, None
        yield
        self._since = self._now()


class Interruption:
    """SIGINT and SIGTERM become a flag that the loop reads between steps; a second signal acts as usual."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.received = True
        signal.signal(number, signal.SIG_DFL)
