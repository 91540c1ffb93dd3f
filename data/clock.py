"""Training time, and the signals that end it."""

import signal
import time

import torch


class Clock:
    """Training seconds: runs between start and stop, waits for the device at both."""

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device, self._seconds, self._since = device, seconds, None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def start(self) -> None:
        """Go on counting."""
        self._synchronize()
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stop counting."""
        self._synchronize()
        self._seconds, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)


class Interruption:
    """SIGINT and SIGTERM become a flag that the loop reads between steps; a second signal acts as usual."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.received = True
        signal.signal(number, signal.SIG_DFL)
