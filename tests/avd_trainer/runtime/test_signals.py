import os
import signal

import pytest

from avd_trainer.runtime.signals import StopSignals

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def test_signals_are_noted_and_afterwards_mean_what_they_did() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with StopSignals() as signals:
        assert signals.received is None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.received == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):  # for those in a hurry
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in NUMBERS] == before
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
