import pytest

from avd_trainer.data.preparation.stage import ClipSettings, Done, Row
from avd_trainer.data.preparation.stages.enlargement import Enlargement, enlargement


@pytest.mark.parametrize(
    ("size", "clip", "factor"),
    [
        ((16, 16), (480, 832), 52),  # a square covers the longer side
        ((480, 832), (480, 832), 1),
        ((1080, 1920), (480, 832), 480 / 1080),
        ((120, 400), (480, 832), 4),
    ],
)
def test_a_picture_grows_until_it_covers_the_clip(size: tuple[int, int], clip: tuple[int, int], factor: float) -> None:
    assert enlargement(size, clip) == pytest.approx(factor)


def test_an_upright_file_counts_as_it_is_seen(row: Row) -> None:
    results = {"probe": {"height": 64, "width": 36}, "framing": {"height": 128, "width": 72}}
    outcome = Enlargement(Enlargement.Settings(), ClipSettings()).run(row._replace(results=results))
    assert outcome == Done({"factor": 2.0})
