"""A run in a few lines."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from avd_trainer.data.decoding import FoundCaption
from avd_trainer.data.preparation.selection import Dropped
from avd_trainer.data.preparation.stages.span import fitting_length
from avd_trainer.data.preparation.summary import LeftOut, _found_caption, _group


def test_reasons_that_differ_in_numbers_or_brackets_are_one() -> None:
    reasons = {
        "a.mp4": Dropped("span", "it has 80 frames at 16 fps (5.00 s), a clip takes 81"),
        "b.mp4": Dropped("span", "it has 7 frames at 16 fps (0.44 s), a clip takes 81"),
        "c.mp4": Dropped("span", "it has 12 frames at 16 fps (0.75 s), a clip takes 81"),
        "d.mp4": Dropped("reading", "it has the same bytes as another file (a.mp4)"),
        "e.mp4": Dropped("probe", "it has 80 frames at 16 fps, a clip takes 81"),
        "f.mp4": Dropped("reading", "it has the same bytes as another file (b.mp4)"),
    }
    assert _group(reasons.items(), {}) == (
        LeftOut("span", "it has 7 to 80 frames at 16 fps, a clip takes 81", ("a.mp4", "b.mp4", "c.mp4")),
        LeftOut("reading", "it has the same bytes as another file", ("d.mp4", "f.mp4")),
        LeftOut("probe", "it has 80 frames at 16 fps, a clip takes 81", ("e.mp4",)),
    )


def test_numbers_of_any_size_are_one_range() -> None:
    reasons = {
        f"{low}.mp4": Dropped("still", f"{low} is below 0.001", scored=True) for low in ("6.086e-05", "0", "-2e-07")
    }
    assert [str(group) for group in _group(reasons.items(), {"still": "deviation of pixels"})] == [
        "3 x still: -2e-07 to 6.086e-05 is below 0.001 (deviation of pixels): -2e-07.mp4, 0.mp4, 6.086e-05.mp4"
    ]


def test_a_failure_is_not_given_the_meaning_of_a_score() -> None:
    reasons = {"a.mp4": Dropped("flow", "it crashed"), "b.mp4": Dropped("flow", "0.1 is below 0.2", scored=True)}
    assert {group.reason for group in _group(reasons.items(), {"flow": "pixels"})} == {
        "it crashed",
        "0.1 is below 0.2 (pixels)",
    }


def test_of_two_files_with_the_same_bytes_the_one_that_is_kept_is_named() -> None:
    reasons = {"b.mp4": Dropped("reading", "it has the same bytes as another file (a.mp4)")}
    assert [str(group) for group in _group(reasons.items(), {})] == [
        "1 x reading: it has the same bytes as another file (a.mp4): b.mp4"
    ]


def test_a_few_names_stand_for_many() -> None:
    assert str(LeftOut("probe", "it is odd", tuple("abcde"))) == "5 x probe: it is odd: a, b, c and 2 more"
    assert str(LeftOut("probe", "it is odd", ("a",))) == "1 x probe: it is odd: a"


@given(
    names=st.lists(st.text(st.characters(codec="ascii")), unique=True), reason=st.sampled_from(["h264 1.5", "(x)", ""])
)
def test_no_name_is_lost(names: list[str], reason: str) -> None:
    groups = _group(((name, Dropped("probe", f"{reason}{len(name)}")) for name in names), {})
    assert sorted(name for group in groups for name in group.names) == sorted(names)


@given(lengths=st.lists(st.integers(0, 200), min_size=1))
def test_the_length_that_is_suggested_fits_most_files_or_none_does(lengths: list[int]) -> None:
    frames = fitting_length(lengths)
    if frames is None:
        assert max(lengths) < 5
        return
    assert frames % 4 == 1
    fits = [length for length in lengths if length >= frames]
    more = [length for length in lengths if length >= frames + 4]
    assert fits
    assert 2 * len(more) <= len(lengths)  # a longer one would not fit most


def test_clips_of_five_seconds() -> None:
    assert fitting_length([80, 80, 80, 10]) == 77
    assert fitting_length([80, 80, 30, 30, 30]) == 29
    assert fitting_length([80, 3, 3]) == 77
    assert fitting_length([4, 3]) is None


def test_captions_are_counted_as_the_run_read_them(tmp_path: Path) -> None:
    video, text = tmp_path / "a_dog.mp4", tmp_path / "a_dog.txt"
    text.write_text("caf\u00e9", encoding="latin-1")
    assert _found_caption(video, "caf\u00e9") == FoundCaption("caf\u00e9", "a_dog.txt", "windows-1252")
    text.write_text("a cat, written since")
    assert _found_caption(video, "") == FoundCaption("", "a_dog.txt")
    assert _found_caption(video, "a dog") == FoundCaption("a dog")
    text.unlink()
    assert _found_caption(video, "two dogs") == FoundCaption("two dogs", "a_dog.txt")
    text.mkdir()  # which cannot be read
    assert _found_caption(video, "a dog") == FoundCaption("a dog")
