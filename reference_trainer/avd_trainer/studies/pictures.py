"""Clips as pictures that a person can compare: strips of frames, sheets of them, and animations."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from avd_trainer.data.video_files import enlarge, load_font, save_gif
from avd_trainer.runtime.files import write_bytes

CELL = 128
"""Pixels: smaller clips are enlarged to this width, so that shapes are seen and not counted in pixels."""
FPS = 8
"""Frames per second of animations: slow enough to follow two shapes at once."""
HOLD = 5
"""How often an animation shows its last frame again, so that its jump back to the first is not taken for motion."""
GAP = 8
BORDER = "#555555"
TEXT = "#222222"
NAMES_WIDTH = 112
FONT_SIZE, NAME_SIZE = 12, 15


def save_animation(videos: Mapping[str, Tensor], captions: Sequence[str], path: Path) -> None:
    """Write a GIF that loops: a row for each of ``videos`` with its name at the left, whole, a column for each caption.

    Args:
        videos: By name, ``[N, 3, F, H, W]`` RGB in [0, 1]; clip ``n`` of each belongs to caption ``n``.
        captions: N of them, shown above their columns, whole.
        path: File to write.

    Raises:
        UserError: If it cannot be written.
    """
    clips = [[magnify(clip) for clip in video] for video in videos.values()]
    height, width = clips[0][0].shape[-2:]
    heads = [wrap(caption, width) for caption in captions]
    top = GAP + max(text.count("\n") + 1 for text in heads) * (FONT_SIZE + 4)
    lefts = [NAMES_WIDTH + column * (width + GAP) for column in range(len(captions))]
    tops = [top + row * (height + GAP) for row in range(len(clips))]

    canvas = Image.new("RGB", (lefts[-1] + width + GAP, tops[-1] + height + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for left, text in zip(lefts, heads, strict=True):
        pen.multiline_text((left, GAP // 2), text, fill=TEXT, font=load_font(FONT_SIZE), spacing=2)
    for y, name in zip(tops, videos, strict=True):
        _write_name(pen, name, y + height // 2)
        for left in lefts:
            pen.rectangle((left - 1, y - 1, left + width, y + height), outline=BORDER)
    still = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255
    movie = still.unsqueeze(1).repeat(1, clips[0][0].shape[1], 1, 1)
    for y, row in zip(tops, clips, strict=True):
        for left, clip in zip(lefts, row, strict=True):
            movie[:, :, y : y + height, left : left + width] = clip
    save_gif(hold_last(movie), path, FPS)


def save_sheet(videos: Mapping[str, Tensor], captions: Sequence[str], title: str, path: Path, frames: int) -> None:
    """Write a picture: a row for each of ``videos`` with its name at the left, a strip of frames for each caption.

    Args:
        videos: By name, ``[N, 3, F, H, W]`` RGB in [0, 1]; clip ``n`` of each belongs to caption ``n``.
        captions: N of them, shown above their columns, whole.
        title: Above all, whole.
        path: File to write, a PNG. One that is there is replaced at once.
        frames: Of each clip, evenly spaced.
    """
    strips = [[draw_strip(clip, frames) for clip in video] for video in videos.values()]
    width, height = strips[0][0].size
    lefts = [NAMES_WIDTH + column * (width + 3 * GAP) for column in range(len(captions))]
    right = lefts[-1] + width + GAP
    title = wrap(title, right - 2 * GAP, NAME_SIZE)
    heads = [wrap(caption, width) for caption in captions]
    below_title = GAP + (NAME_SIZE + 4) * (title.count("\n") + 1)
    top = below_title + GAP + (FONT_SIZE + 4) * max(text.count("\n") + 1 for text in heads)
    sheet = Image.new("RGB", (right, top + len(strips) * (height + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((GAP, GAP // 2), title, fill=TEXT, font=load_font(NAME_SIZE))
    for left, text in zip(lefts, heads, strict=True):
        pen.multiline_text((left, below_title), text, fill=TEXT, font=load_font(FONT_SIZE), spacing=2)
    for number, (name, row) in enumerate(zip(videos, strips, strict=True)):
        y = top + number * (height + GAP)
        _write_name(pen, name, y + height // 2)
        for left, strip in zip(lefts, row, strict=True):
            sheet.paste(strip, (left, y))
    content = BytesIO()
    sheet.save(content, "PNG", optimize=True)
    write_bytes(path, content.getvalue())


def _write_name(pen: ImageDraw.ImageDraw, name: str, middle: int) -> None:
    """A row's name, whole, left of the row whose middle is there."""
    text, place = wrap(name, NAMES_WIDTH - GAP, NAME_SIZE), (NAMES_WIDTH - GAP, middle)
    pen.multiline_text(place, text, fill=TEXT, font=load_font(NAME_SIZE), anchor="rm", align="right")


def hold_last(video: Tensor) -> Tensor:
    """``[3, F, H, W]`` with its last frame repeated ``HOLD`` times."""
    return torch.cat([video, video[:, -1:].expand(-1, HOLD, -1, -1)], dim=1)


def draw_strip(clip: Tensor, frames: int) -> Image.Image:
    """Frames of a clip ``[3, F, H, W]``, evenly spaced from first to last, side by side with a border around each."""
    chosen = torch.linspace(0, clip.shape[1] - 1, frames).round().long()
    clip = magnify(clip[:, chosen])
    height, width = clip.shape[-2:]
    strip = Image.new("RGB", (frames * (width + 2 + GAP) - GAP, height + 2), "white")
    for number, frame in enumerate(clip.unbind(1)):
        left = number * (width + 2 + GAP)
        strip.paste(BORDER, (left, 0, left + width + 2, height + 2))
        strip.paste(to_image(frame), (left + 1, 1))
    return strip


def magnify(clip: Tensor) -> Tensor:
    """``[..., H, W]`` at least ``CELL`` pixels wide: each pixel repeated, so that nothing is seen that is not there."""
    return enlarge(clip, max(1, CELL // clip.shape[-1]))


def to_image(frame: Tensor) -> Image.Image:
    """``[3, H, W]``, clamped to [0, 1]."""
    pixels = (255 * frame.nan_to_num(0.0).clamp(0, 1)).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def wrap(text: str, width: int, font_size: int = FONT_SIZE) -> str:
    """Break a text into lines of at most ``width`` pixels."""
    return "\n".join(textwrap.wrap(text, int(width / load_font(font_size).getlength("n"))))
