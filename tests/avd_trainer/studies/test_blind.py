"""The blind check: nobody can tell from it which model made which clip, and its key is right."""

import base64
import html.parser
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom

from avd_trainer.studies.blind import PAIRS, draw_pairs, write_blind_check

MODELS = ("dmd", "avd")
TITLES = {"dmd": "DMD alone", "avd": "AVD"}
CAPTIONS = [f"caption {number}" for number in range(30)]
GRAY = {"dmd": 0.2, "avd": 0.8}


class Visible(html.parser.HTMLParser):
    """What a page shows, besides what its scripts put there."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self._hidden = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden = tag in ("script", "style")
        self.text += [value for _, value in attrs if value]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)


def write(output: Path, captions: list[str], seed: int = 0) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """A check of plain gray clips, by which each model's are known: its page, the page's data and the key's pairs."""
    videos = {name: torch.full((len(captions), 3, 5, 16, 16), gray) for name, gray in GRAY.items()}
    page = write_blind_check(videos, captions, TITLES, output, seed).read_text(encoding="utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return page, json.loads(found[1]), json.loads((output / "blind" / "key.json").read_text())["pairs"]


def of_gray(pixels: np.ndarray) -> str:
    return min(GRAY, key=lambda name: abs(pixels.mean() / 255 - GRAY[name]))


@pytest.mark.parametrize("count", [30, 7, 2])
def test_each_model_is_at_the_left_of_half_of_the_pairs(count: int) -> None:
    for seed in range(20):
        pairs = draw_pairs(MODELS, CAPTIONS[:count], seed)
        assert len(pairs) == min(PAIRS, count)
        lefts = Counter(pair.left for pair in pairs)
        assert abs(lefts["dmd"] - lefts["avd"]) == len(pairs) % 2
        assert all({pair.left, pair.right} == set(MODELS) for pair in pairs)
        assert len({pair.clip for pair in pairs}) == len(pairs)


def test_sides_follow_from_the_seed_alone_and_no_place_has_a_usual_side() -> None:
    assert draw_pairs(MODELS, CAPTIONS, 5) == draw_pairs(MODELS, CAPTIONS, 5)
    draws = [[pair.left for pair in draw_pairs(MODELS, CAPTIONS, seed)] for seed in range(400)]
    assert len({tuple(lefts) for lefts in draws}) == 400
    for place in zip(*draws, strict=True):
        assert 150 < place.count("avd") < 250  # five standard deviations
    odd = [Counter(pair.left for pair in draw_pairs(MODELS, CAPTIONS[:7], seed))["avd"] for seed in range(400)]
    assert 150 < odd.count(4) < 250


def test_the_key_says_which_clip_is_whose(tmp_path: Path) -> None:
    _, data, pairs = write(tmp_path, CAPTIONS)
    assert len(data["pairs"]) == len(pairs) == PAIRS
    shown = json.loads(base64.b64decode(data["key"]))
    for number, (pair, own, titles) in enumerate(zip(pairs, data["pairs"], shown, strict=True), start=1):
        assert titles == [TITLES[pair["left"]], TITLES[pair["right"]]]
        assert own["caption"] == pair["caption"] == CAPTIONS[pair["clip"]]
        with Image.open(io.BytesIO(base64.b64decode(own["gif"]))) as animation:
            pixels = np.asarray(animation.convert("L"))
        assert (of_gray(pixels[:, :16]), of_gray(pixels[:, -16:])) == (pair["left"], pair["right"])
        with Image.open(tmp_path / "blind" / f"pair-{number:02d}.png") as picture:
            middle = np.asarray(picture.convert("L"))[:, picture.width // 2]
        frames = np.flatnonzero((abs(middle / 255 - 0.2) < 0.01) | (abs(middle / 255 - 0.8) < 0.01))
        assert of_gray(middle[frames[0]]) == pair["left"]  # "A", above
        assert of_gray(middle[frames[-1]]) == pair["right"]


def test_no_model_is_named_where_a_person_looks(tmp_path: Path) -> None:
    page, data, _ = write(tmp_path, CAPTIONS)
    visible = Visible()
    visible.feed(page)
    assert "Which clip is better?" in visible.text
    for text in (" ".join(visible.text), json.dumps([pair["caption"] for pair in data["pairs"]])):
        assert not re.search("avd|dmd|teacher", text, re.IGNORECASE)
    names = sorted(path.name for path in (tmp_path / "blind").iterdir())
    assert names == ["key.json", *(f"pair-{number:02d}.png" for number in range(1, PAIRS + 1))]
    # Not in the page's source either, where a person might look: only as base64.
    source = page.replace(data["key"], "")
    for pair in data["pairs"]:
        source = source.replace(pair["gif"], "")
    assert not re.search("avd|dmd", source, re.IGNORECASE)


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    page, _, _ = write(tmp_path, CAPTIONS)
    assert not re.search(r'(src|href)="(?!#)|https?:|@import|url\(', page)


def test_a_caption_cannot_break_the_page(tmp_path: Path) -> None:
    captions = ["a </script><b>cat</b>", "„Größe“ 🐈", "third"]
    page, data, _ = write(tmp_path, captions)
    assert sorted(pair["caption"] for pair in data["pairs"]) == sorted(captions)
    assert page.count("</script>") == 2
    assert "<b>" not in page


def test_intervals_are_those_of_clopper_and_pearson(tmp_path: Path) -> None:
    """At each end, what was seen or more of it has a probability of 2.5%."""
    _, data, _ = write(tmp_path, CAPTIONS)
    intervals = data["intervals"]
    assert [len(row) for row in intervals] == list(range(1, PAIRS + 2))
    assert intervals[20][0][0] == 0
    assert intervals[20][20][1] == 1
    for n, k in ((20, 15), (20, 3), (7, 4)):
        low, high = intervals[n][k]
        assert binom.sf(k - 1, n, low) == pytest.approx(0.025, abs=1e-3)
        assert binom.cdf(k, n, high) == pytest.approx(0.025, abs=1e-3)
    assert intervals[20][15][0] > 0.5 > intervals[20][14][0]


def test_another_seed_replaces_the_whole_check(tmp_path: Path) -> None:
    write(tmp_path, CAPTIONS, seed=1)
    _, data, pairs = write(tmp_path, CAPTIONS, seed=2)
    assert data["seed"] == json.loads((tmp_path / "blind" / "key.json").read_text())["seed"] == 2
    assert [pair["left"] for pair in pairs] == [pair.left for pair in draw_pairs(MODELS, CAPTIONS, 2)]
