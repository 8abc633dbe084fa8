from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from avd_trainer.studies.pictures import (
    CELL,
    GAP,
    HOLD,
    NAMES_WIDTH,
    draw_strip,
    magnify,
    save_animation,
    save_sheet,
    wrap,
)


def clip(level: float, frames: int = 4, size: int = 32) -> torch.Tensor:
    """Plain frames that get brighter: ``[3, F, S, S]``."""
    return (level + 0.1 * torch.arange(frames)).view(1, frames, 1, 1).expand(3, frames, size, size)


def test_an_animation_has_a_row_for_each_name_and_a_column_for_each_caption(tmp_path: Path) -> None:
    rows = {"one": torch.stack([clip(0.1), clip(0.3)]), "two": torch.stack([clip(0.5), clip(0.6)])}
    save_animation(rows, ["first", "second"], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.info["loop"] == 0
        durations, levels = [], []
        for number in range(animation.n_frames):  # type: ignore[attr-defined]
            animation.seek(number)
            durations.append(animation.info["duration"])
            pixels = np.asarray(animation.convert("L"))
            bottom, right = pixels.shape[0] - GAP - CELL // 2, pixels.shape[1] - GAP - CELL // 2
            step = CELL + GAP
            levels.append([pixels[y, x] for y in (bottom - step, bottom) for x in (right - step, right)])
    expected = [[level + 0.1 * frame for level in (0.1, 0.3, 0.5, 0.6)] for frame in range(4)]
    assert np.array(levels) / 255 == pytest.approx(np.array(expected), abs=0.02)
    assert sum(durations[:3]) / 3 == pytest.approx(125, abs=5)
    assert durations[3] == pytest.approx(125 * (1 + HOLD), abs=10)


def test_captions_are_shown_whole(tmp_path: Path) -> None:
    short, long = "a cat", "a cat and a dog and a horse and a cow and a goose walk along a wall and then come back"
    assert wrap(long, CELL).replace("\n", " ") == long
    heights = []
    for caption in (short, long):
        save_animation({"one": clip(0.1).unsqueeze(0)}, [caption], tmp_path / "a.gif")
        with Image.open(tmp_path / "a.gif") as animation:
            heights.append(animation.height)
    assert heights[1] - heights[0] == 16 * (wrap(long, CELL).count("\n"))


def test_names_of_several_words_are_shown_whole(tmp_path: Path) -> None:
    save_animation({"teacher, 25 steps, no guidance": clip(0.1).unsqueeze(0)}, ["a cat"], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as animation:
        assert np.asarray(animation.convert("L"))[:, :2].min() > 250


def test_a_sheet_has_a_row_of_strips_for_each_name(tmp_path: Path) -> None:
    rows = {"one": torch.stack([clip(0.1), clip(0.3)]), "two": torch.stack([clip(0.5), clip(0.6)])}
    save_sheet(rows, ["first", "second"], "Two rows.", tmp_path / "a.png", 2)
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    frame = CELL + 2 + GAP
    ys = [pixels.shape[0] - GAP - CELL // 2 - up * frame for up in (1, 0)]
    xs = [NAMES_WIDTH + CELL // 2 + x for x in (0, frame, 2 * frame + 2 * GAP, 3 * frame + 2 * GAP)]
    levels = np.array([[0.1, 0.4, 0.3, 0.6], [0.5, 0.8, 0.6, 0.9]])
    assert pixels[np.ix_(ys, xs)] / 255 == pytest.approx(levels, abs=0.01)
    names = pixels[:, : NAMES_WIDTH - 2]
    assert (names.min(1) < 100).any()
    assert pixels[:, :2].min() > 250


def test_a_strip_has_first_and_last_frame_with_a_border_around_each() -> None:
    strip = draw_strip(clip(0.2, frames=7), 3)
    assert strip.size == (3 * (CELL + 2) + 2 * GAP, CELL + 2)
    pixels = np.asarray(strip.convert("L"))
    centers = [CELL // 2 + place * (CELL + 2 + GAP) for place in range(3)]
    assert pixels[CELL // 2, centers] / 255 == pytest.approx(np.array([0.2, 0.5, 0.8]), abs=0.01)
    assert pixels[0, 0] == pixels[-1, CELL + 1] == 0x55
    assert pixels[CELL // 2, CELL + 2 + GAP // 2] == 255


@pytest.mark.parametrize(("width", "expected"), [(32, 128), (100, 100), (480, 480)])
def test_small_clips_are_enlarged_by_whole_pixels(width: int, expected: int) -> None:
    video = torch.rand(3, 2, 4, width)
    magnified = magnify(video)
    assert magnified.shape[-1] == expected
    assert torch.equal(magnified[..., :: expected // width, :: expected // width], video)


def test_values_beyond_a_screen_are_clamped() -> None:
    pixels = np.asarray(draw_strip(torch.tensor([2.0, -1.0, torch.nan]).view(3, 1, 1, 1).expand(3, 1, 8, 8), 1))
    assert pixels[10, 10].tolist() == [255, 0, 0]
