"""Training time counts what is not paused, and goes on where a resumed run stopped."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from data.run import clock
from data.run.clock import Clock, Interruption


@pytest.fixture
def fake_time(monkeypatch):
    """Replace the time by a number that the test sets."""
    fake_time = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: fake_time.seconds)
    return fake_time


def test_a_pause_does_not_count(fake_time):
    timer = Clock(torch.device("cpu"), 5.0)
    fake_time.seconds += 2
    assert timer.seconds == 7
    with timer.paused():
        fake_time.seconds += 10
        assert timer.seconds == 7
    fake_time.seconds += 1
    assert timer.seconds == 8


def test_the_first_signal_is_a_flag_and_the_second_acts():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        interruption = Interruption()
        assert not interruption.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.received and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
