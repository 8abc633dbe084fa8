import pytest

from avd_trainer.planning.duration import Speed, assumed_speed, plan_time
from avd_trainer.planning.operations import update_operations
from planned_runs import described


def test_time_is_operations_over_speed() -> None:
    run = described(gpus=2, batch_size=8, max_steps=1800)
    forward, training = update_operations(run)
    time = plan_time(run, Speed(forward=1e12, training=2e12, gpu="any", source="made up"))
    seconds = 4 * (forward / 1e12 + training / 2e12)  # four of the eight examples on each GPU
    assert time.seconds_per_update == pytest.approx(seconds)
    assert time.hours == pytest.approx(seconds / 2)


def test_twice_the_gpus_take_half_the_time() -> None:
    speed = assumed_speed("float32")
    one, two = (plan_time(described(gpus=gpus), speed).seconds_per_update for gpus in (1, 2))
    assert one == pytest.approx(2 * two)


def test_an_assumed_speed_says_that_it_is_assumed() -> None:
    speed = assumed_speed("bfloat16")
    assert speed.forward == speed.training == pytest.approx(0.4 * 989.5e12)
    assert "assumed utilisation of 0.4 of 989.5 TFLOP/s, an H100's in bfloat16" in speed.source
    assert speed.gpu == "H100"
    own = assumed_speed("bfloat16", peak_tflops=312, utilisation=0.5)
    assert own.forward == pytest.approx(156e12)
    assert own.gpu == "GPU of 312 TFLOP/s"
    assert own.source == "computed, at an assumed utilisation of 0.5 of 312 TFLOP/s"
