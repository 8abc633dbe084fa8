"""The blind check: pairs of clips without names, for a person to judge, and the key apart from them."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image, ImageDraw
from scipy.stats import binomtest
from torch import Tensor

from avd_trainer.data.video_files import load_font, save_gif
from avd_trainer.runtime.files import claim_folder, write_json, write_text
from avd_trainer.studies.pictures import FPS, GAP, TEXT, draw_strip, hold_last, wrap

PAGE = "blind.html"
FOLDER = "blind"
KEY = "key.json"
PAIRS = 20
"""Pairs to judge: a few minutes for a person, who has to prefer one model in 15 of them to tell the two apart."""
FRAMES = 7
"""Frames of a clip in a picture."""
LETTERS = ("A", "B")


@dataclass(frozen=True)
class Pair:
    """Two models' clips of one caption and one noise.

    Attributes:
        number: From 1; that of the picture.
        clip: Which of the demo's clips.
        caption: What both should show.
        left: The model at the left of the page, and above, as "A", in the picture.
        right: The other one.
    """

    number: int
    clip: int
    caption: str
    left: str
    right: str


def draw_pairs(models: tuple[str, str], captions: Sequence[str], seed: int) -> list[Pair]:
    """Choose clips, and which model is at the left of each pair.

    Each model is at the left of half of the pairs; of an odd number one more, by chance. Another seed chooses other
    clips and other sides.

    Args:
        models: Names of the two.
        captions: Of the demo's clips.
        seed: Of the choice.
    """
    draws = random.Random(seed)
    count = min(PAIRS, len(captions))
    lefts = [models[number % 2] for number in range(count)]
    if draws.random() < 0.5:
        lefts = [models[1 - models.index(left)] for left in lefts]
    draws.shuffle(lefts)
    clips = draws.sample(range(len(captions)), count)
    return [
        Pair(number, clip, captions[clip], left, models[1 - models.index(left)])
        for number, (clip, left) in enumerate(zip(clips, lefts, strict=True), start=1)
    ]


def write_blind_check(
    videos: Mapping[str, Tensor], captions: Sequence[str], titles: Mapping[str, str], output: Path, seed: int
) -> Path:
    """Write ``blind.html`` (needs no other file), ``blind/pair-01.png`` and so on, and ``blind/key.json``.

    Args:
        videos: The two models' clips ``[N, 3, F, H, W]``, RGB in [0, 1], of the same captions and the same noise.
        captions: N of them.
        titles: What the models are called where the page names them, at its end.
        output: An existing folder. Files of an earlier check there are replaced.
        seed: Of :func:`draw_pairs`.

    Returns:
        The page.

    Raises:
        UserError: If a file cannot be written.
    """
    first, second = videos
    pairs = draw_pairs((first, second), captions, seed)
    claim_folder(output / FOLDER)
    for pair in pairs:
        picture = _draw_pair(pair, videos[pair.left][pair.clip], videos[pair.right][pair.clip])
        picture.save(output / FOLDER / f"pair-{pair.number:02d}.png")
    above, below = LETTERS
    write_json(
        output / FOLDER / KEY,
        {"seed": seed, "above": above, "below": below, "pairs": [asdict(pair) for pair in pairs]},
    )
    shown = [
        {"caption": pair.caption, "gif": _embed(videos[pair.left][pair.clip], videos[pair.right][pair.clip])}
        for pair in pairs
    ]
    # Not to be read by chance by a person who looks at the page's source.
    key = base64.b64encode(json.dumps([[titles[pair.left], titles[pair.right]] for pair in pairs]).encode()).decode()
    data = {"pairs": shown, "key": key, "seed": seed, "intervals": _intervals(len(pairs))}
    template = files("avd_trainer.studies").joinpath(PAGE).read_text(encoding="utf-8")
    # A caption comes from a person's own file, and must not end the script that it stands in.
    page = template.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))
    write_text(output / PAGE, page)
    return output / PAGE


def _draw_pair(pair: Pair, above: Tensor, below: Tensor) -> Image.Image:
    """The caption, and below it frames of the two clips, "A" above "B"."""
    strips = [draw_strip(clip, FRAMES) for clip in (above, below)]
    margin, font = 3 * GAP, load_font(16)
    width, height = strips[0].size
    text = f"{pair.number}. {pair.caption}"
    text = wrap(text, width, 16)
    top = margin + 20 * (text.count("\n") + 1)
    picture = Image.new("RGB", (width + 3 * margin, top + 2 * height + 3 * GAP + margin), "white")
    pen = ImageDraw.Draw(picture)
    pen.multiline_text((2 * margin, GAP), text, fill=TEXT, font=font)
    for letter, strip, y in zip(LETTERS, strips, (top, top + height + 2 * GAP), strict=True):
        pen.text((margin, y + height // 2), letter, fill=TEXT, font=load_font(22), anchor="mm")
        picture.paste(strip, (2 * margin, y))
    pen.text((width + 2 * margin, picture.height - GAP), "time →", fill=TEXT, font=load_font(12), anchor="rb")
    return picture


def _embed(left: Tensor, right: Tensor) -> str:
    """Both clips in one animation, so that they never run apart; as base64. The page enlarges it."""
    gap = torch.ones(*left.shape[:-1], left.shape[-1] // 10)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "pair.gif"
        save_gif(hold_last(torch.cat([left, gap, right], dim=-1)), file, FPS)
        return base64.b64encode(file.read_bytes()).decode()


def _intervals(pairs: int) -> list[list[list[float]]]:
    """``[n][k]``: 95% interval (Clopper and Pearson 1934) of a share of which ``k`` of ``n`` were seen."""

    def interval(k: int, n: int) -> list[float]:
        if n == 0:
            return [0.0, 1.0]
        bounds: Any = binomtest(k, n).proportion_ci(0.95, method="exact")
        return [round(float(bounds.low), 3), round(float(bounds.high), 3)]

    return [[interval(k, n) for k in range(n + 1)] for n in range(pairs + 1)]
