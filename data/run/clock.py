"""Training time, and the signals that interrupt a run."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Stopwatch of training seconds: it runs from its construction on, except in blocks under `paused`."""

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        """Start at `seconds`: the training time of a resumed run before its checkpoint."""
        self._device, self._seconds = device, seconds
        self._since: float | None = self._read_synchronized()

    def _read_synchronized(self) -> float:
        # A GPU works behind the program: kernels launched before this moment count for the time before it.
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training seconds so far; does not wait for the device."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock during the block, and wait for the device before and after it."""
        self._seconds, self._since = self._seconds + self._read_synchronized() - self._since, None
        yield
        self._since = self._read_synchronized()


class Interruption:
    """Flag that SIGINT (Ctrl-C) or SIGTERM sets; the training loop reads it between steps and saves a checkpoint.

    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        """Replace the handlers of both signals."""
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: object) -> None:
        self.received = True
        # The default handler again, so that a run that hangs can still be stopped.
        signal.signal(number, signal.SIG_DFL)
