"""Clips as files that a person can look at: MP4 and GIF."""

from __future__ import annotations

import logging
import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import cast

import av
import matplotlib
import numpy as np
import torch
from av.codec.codec import UnknownCodecError
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from avd_trainer.runtime.errors import UserError

logger = logging.getLogger(__name__)

FORMATS = ("mp4", "gif")
"""Endings of the files that clips are written to."""

# In order of preference; PyAV's own wheels have the first, some distributions leave it out for its licence. Without
# macroblock trees, since libx264 (core 165) reads memory there that nobody has written: one clip gives several files.
ENCODERS = {"libx264": {"crf": "18", "x264-params": "mbtree=0"}, "libopenh264": {}, "mpeg4": {}}
BT709 = 1
"""FFmpeg's code for its matrix, primaries and transfer, as in H.273."""
LIMITED_RANGE = 1
"""FFmpeg's code: luma from 16 to 235."""
BIT_RATE = 8_000_000
"""Bits per second of an encoder that knows no constant quality."""

CAPTIONED_WIDTH = 256
"""Pixels. Clips that are narrower are enlarged in a grid, so that their captions can be read."""
CAPTION_LINES = 3
FONT_SIZE = 14
PALETTE_PIXELS = 200_000
"""Of a clip, at most, that the colours of its animation are chosen from."""


def save_clip(video: Tensor, path: Path, fps: float, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write a clip as MP4 (H.264, 4:2:0, BT.709) and as GIF.

    A file appears whole or not at all; one of the same name is replaced.

    Args:
        video: ``[3, F, H, W]`` RGB on any device; values outside [0, 1] are clamped, as a screen does, and NaN is
            black.
        path: Without suffix; its folder exists.
        fps: Frames per second.
        formats: Which of :data:`FORMATS` to write.

    Returns:
        The files. In the MP4 an odd height or width is one pixel larger: 4:2:0 knows even sizes only.

    Raises:
        UserError: If a file cannot be written.
    """
    return _write_clip(_to_bytes(video), path, fps, formats)


def save_grid(
    videos: Tensor, captions: Sequence[str], path: Path, fps: float, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write several clips side by side, each below its caption, as :func:`save_clip` does.

    Args:
        videos: ``[N, 3, F, H, W]``; clips narrower than ``CAPTIONED_WIDTH`` are enlarged by a whole factor.
        captions: N of them; what is longer than ``CAPTION_LINES`` lines is cut.
        path: Without suffix; its folder exists.
        fps: Frames per second.
        formats: Which of :data:`FORMATS` to write.

    Returns:
        The files.

    Raises:
        UserError: If a file cannot be written.
    """
    clips = torch.stack([_to_bytes(video) for video in videos])
    clips = enlarge(clips, math.ceil(CAPTIONED_WIDTH / clips.shape[-1]))
    frames, width = clips.shape[2], clips.shape[-1]
    strips = torch.stack([_caption_strip(caption, width) for caption in captions])
    strips = strips.unsqueeze(2).expand(-1, -1, frames, -1, -1)
    return _write_clip(tile(torch.cat([strips, clips], dim=3)), path, fps, formats)


def save_gif(video: Tensor, path: Path, fps: float) -> None:
    """Write an animation; the arguments are those of :func:`save_clip`, but ``path`` has its suffix."""
    _write_gif(path, _frames(_to_bytes(video)), fps)


def tile(videos: Tensor) -> Tensor:
    """Clips ``[N, 3, F, H, W]`` as one ``[3, F, rows H, columns W]``, in reading order, with no tile left empty."""
    rows = max(n for n in range(1, math.isqrt(len(videos)) + 1) if len(videos) % n == 0)
    return rearrange(videos, "(r n) c f h w -> c f (r h) (n w)", r=rows)


def enlarge(video: Tensor, factor: int) -> Tensor:
    """Repeat the pixels of ``[..., H, W]``."""
    return video.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans of a height in pixels. Pillow's own font knows English alone."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _to_bytes(video: Tensor) -> Tensor:
    """``[3, F, H, W]`` in [0, 1] to bytes in main memory; frame by frame, for temporaries of one frame's size."""
    frames = (frame.nan_to_num(0.0).clamp(0, 1) for frame in video.detach().unbind(1))
    return torch.stack([(255 * frame).round().to(torch.uint8).cpu() for frame in frames], dim=1)


def _frames(pixels: Tensor) -> Tensor:
    """Bytes ``[3, F, H, W]`` to ``[F, H, W, 3]``."""
    return rearrange(pixels, "c f h w -> f h w c").contiguous()


def _write_clip(pixels: Tensor, path: Path, fps: float, formats: Sequence[str]) -> list[Path]:
    """Write bytes ``[3, F, H, W]`` in each of the formats."""
    frames = _frames(pixels)
    writers = {"mp4": _write_mp4, "gif": _write_gif}
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in formats]
    for suffix, file in zip(formats, files, strict=True):
        writers[suffix](file, frames, fps)
    return files


def _write_mp4(path: Path, frames: Tensor, fps: float) -> None:
    if frames.shape[1] % 2:
        frames = torch.cat([frames, frames[:, -1:]], dim=1)
    if frames.shape[2] % 2:
        frames = torch.cat([frames, frames[:, :, -1:]], dim=2)
    name = _encoder()
    with _whole_file(path) as part, av.open(part, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = cast(av.VideoStream, container.add_stream(name, rate=rate, options=ENCODERS[name]))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Players take small clips for BT.601 unless told otherwise, and colours are what these clips are about.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        if "crf" not in ENCODERS[name]:
            stream.bit_rate = BIT_RATE
        for frame in frames.numpy():
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


@cache
def _encoder() -> str:
    for name in ENCODERS:
        try:
            av.Codec(name, "w")
        except UnknownCodecError:
            continue
        if name != next(iter(ENCODERS)):
            logger.warning(f"This build of PyAV has no libx264: clips are encoded by {name}.")
        return name
    raise UserError(
        f"This build of PyAV can encode by none of {', '.join(ENCODERS)}. Install its wheel: `pip install "
        "--force-reinstall --only-binary av av`."
    )


def _write_gif(path: Path, frames: Tensor, fps: float) -> None:
    # One palette for all frames: with one for each, colours flicker, which looks like the student's own jitter, and a
    # clip of 832x480x81 takes 17 s in place of 0.5.
    step = math.ceil(math.sqrt(frames[..., 0].numel() / PALETTE_PIXELS))
    colours = Image.fromarray(_flat(frames[:, ::step, ::step])).quantize(256)
    images = [Image.fromarray(frame).quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames.numpy()]
    # Its clock ticks in hundredths of a second: each frame ends at the tick nearest to its time.
    ends = [round(100 * number / fps) for number in range(len(images) + 1)]
    durations = [10 * (end - start) for start, end in pairwise(ends)]
    with _whole_file(path) as part:
        images[0].save(part, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def _flat(frames: Tensor) -> np.ndarray:
    """``[F, H, W, 3]`` to one picture ``[F H, W, 3]``."""
    flat: np.ndarray = rearrange(frames, "f h w c -> (f h) w c").contiguous().numpy()
    return flat


def _caption_strip(caption: str, width: int) -> Tensor:
    """White text on black, bytes ``[3, H, width]``; every caption's strip has the same even height."""
    font = load_font(FONT_SIZE)
    letters = int((width - 8) / font.getlength("n"))
    lines = textwrap.wrap(caption, letters, max_lines=CAPTION_LINES, placeholder=" ...")
    strip = Image.new("RGB", (width, 2 * round(0.65 * CAPTION_LINES * FONT_SIZE) + 8))
    ImageDraw.Draw(strip).multiline_text((4, 2), "\n".join(lines), font=font)
    return rearrange(torch.from_numpy(np.array(strip)), "h w c -> c h w")


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place at the end."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except (OSError, av.FFmpegError) as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Free some space or mend its permissions, then run "
            "the same command again."
        ) from error
    finally:
        part.unlink(missing_ok=True)
