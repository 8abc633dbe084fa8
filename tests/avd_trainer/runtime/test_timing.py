"""Seconds of parts of the work."""

import pytest

from avd_trainer.runtime.timing import timed


def test_a_parts_seconds_add_up_and_a_failure_has_none() -> None:
    times = iter([10.0, 11.256, 20.0, 22.0, 30.0])
    seconds = {"train": 5.0}
    with timed(seconds, "sample", times.__next__):
        pass
    assert seconds == {"train": 5.0, "sample": 1.26}
    with timed(seconds, "sample", times.__next__):
        pass
    with pytest.raises(KeyError), timed(seconds, "measure", times.__next__):
        raise KeyError
    assert seconds == {"train": 5.0, "sample": 3.26}
