import pytest
from hypothesis import given
from hypothesis import strategies as st

from avd_trainer.data.preparation.stages.size import lines


@pytest.mark.parametrize(
    ("width", "height", "wanted"),
    [(1280, 720, 720), (720, 1280, 720), (1920, 1080, 1080), (960, 720, 540), (1280, 718, 718), (4000, 720, 720)],
)
def test_lines(width: int, height: int, wanted: float) -> None:
    assert lines(width, height) == wanted


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_720_lines_are_1280_by_720_in_either_direction(width: int, height: int) -> None:
    fits = (width >= 1280 and height >= 720) or (width >= 720 and height >= 1280)
    assert (lines(width, height) >= 720) == fits
