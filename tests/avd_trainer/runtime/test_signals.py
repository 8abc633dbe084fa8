import os
import signal
import types

import pytest

from avd_trainer.runtime import signals as signals_module
from avd_trainer.runtime.signals import StopSignals

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, for a test to set."""
    now = [1000.0]
    monkeypatch.setattr(signals_module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_signals_are_noted_and_afterwards_mean_what_they_did(clock: list[float]) -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with StopSignals() as signals:
        assert signals.received is None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.received == "SIGUSR1"
        clock[0] += 1.5
        with pytest.raises(KeyboardInterrupt):  # for those in a hurry
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in NUMBERS] == before
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"


def test_a_ctrl_c_that_a_launcher_sends_again_is_one(clock: list[float]) -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 0.2
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:  # which would end pytest
            pytest.fail("the repetition interrupted")
        assert signals.received == "SIGINT"


def test_a_signal_inside_is_told_to_what_is_around() -> None:
    with StopSignals() as outer:
        with StopSignals() as inner:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert inner.received == outer.received == "SIGUSR1"
    with StopSignals() as outer, StopSignals():
        pass
    assert outer.received is None
