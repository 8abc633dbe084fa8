"""The contract of a stage: what its results are keyed by, and how limits decide."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from avd_trainer.data.preparation.stage import ClipSettings, Done, Limits, Row, Span, digest
from avd_trainer.data.preparation.stages.framing import FramingSettings
from avd_trainer.data.preparation.stages.overlay_text import OverlayTextSettings
from toy_stages import Brightness, BrightnessSettings, Contrast, ContrastSettings, ToySpan, ToySpanSettings

CLIP = ClipSettings(frames=5, fps=10)


def key_of_brightness(clip: ClipSettings = CLIP, **settings: Any) -> str:
    return digest(Brightness, BrightnessSettings(**settings), clip, {})


def key_of_contrast(read: str, **settings: Any) -> str:
    return digest(Contrast, ContrastSettings(**settings), CLIP, {"brightness": read, "another": "0"})


def test_a_key_changes_with_what_results_depend_on() -> None:
    keys = {
        key_of_brightness(),
        key_of_brightness(at=(0, 1)),
        key_of_brightness(ClipSettings(frames=9, fps=10)),
        key_of_contrast("one"),
        key_of_contrast("two"),
        key_of_contrast("one", gain=2.0),
    }
    assert len(keys) == 6


def test_a_key_changes_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of_brightness()
    monkeypatch.setattr(Brightness, "version", 2)
    assert key_of_brightness() != before


def test_what_only_decides_changes_no_key() -> None:
    assert key_of_brightness(min=3, max=250, keep=0.5, time_limit=7) == key_of_brightness()
    # Nor does the length of clips change what a file stage finds, unless it says so.
    longer = ClipSettings(frames=9, fps=10)
    assert digest(ToySpan, ToySpanSettings(), CLIP, {}) == digest(ToySpan, ToySpanSettings(), longer, {})


def test_two_stages_in_a_row() -> None:
    row = Row("0123-0", Path("a.mp4"), "0123", Span(0, 500), {})
    first = Brightness(BrightnessSettings(), CLIP)
    assert first.frames(row).indices == (0, 2)
    found = first.run(row, np.full((2, 16, 16, 3), 27, dtype=np.uint8))
    assert found == Done({"mean": 27.0})
    second = Contrast(ContrastSettings(gain=2.0), CLIP)
    assert second.frames(row) is None
    read = row._replace(results={"brightness": found.values})
    assert second.run(read, np.zeros((0, 0, 0, 3), dtype=np.uint8)) == Done({"value": 201.0})


SCORES = {"a": 1.0, "b": 4.0, "c": 2.0, "d": 3.0, "e": 4.0}


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        (Limits(), "abcde"),
        (Limits(min=2), "bcde"),  # a limit itself is within
        (Limits(max=3), "acd"),
        (Limits(keep=0.4), "be"),
        (Limits(keep=0.2), "b"),  # of equal scores the lesser id
        (Limits(keep=0.01), "b"),  # never none of some
        (Limits(max=3, keep=0.5), "cd"),  # half of what the limit left, rounded up
        (Limits(keep=1), "abcde"),
    ],
)
def test_limits(limits: Limits, kept: str) -> None:
    rejected = limits.reject(SCORES)
    assert "".join(sorted(SCORES.keys() - rejected.keys())) == kept
    shuffled = list(SCORES.items())
    random.Random(0).shuffle(shuffled)
    assert limits.reject(dict(shuffled)) == rejected


def test_the_better_half_of_scores_that_say_how_much_is_wrong() -> None:
    for limits in (OverlayTextSettings(keep=0.4), FramingSettings(keep=0.4, max=None)):
        assert SCORES.keys() - limits.reject(SCORES).keys() == set("ac")


def test_reasons_are_words() -> None:
    rejected = Limits(min=1.5, keep=0.5).reject(SCORES)
    assert rejected == {
        "a": "1 is below 1.5",
        "d": "3 is number 3 of 4, the best 50% are kept",
        "c": "2 is number 4 of 4, the best 50% are kept",
    }


def test_a_tenth_of_thirty_is_three() -> None:
    assert len(Limits(keep=0.1).reject({str(number): 0.0 for number in range(30)})) == 27


def test_nothing_to_decide_on() -> None:
    assert Limits(min=0, keep=0.5).reject({}) == {}


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"keep": 1.5}, {"time_limit": 0}, {"least": 3}])
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Limits(**wrong)


def test_how_long_a_clip_is() -> None:
    assert ClipSettings().milliseconds == 5062
    assert CLIP.milliseconds == 500
