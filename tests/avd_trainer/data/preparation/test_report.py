"""The report of prepared videos: what it counts, which clips it shows, and that its page needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from avd_trainer.data.preparation.journal import FileState, Journal, KnownFile
from avd_trainer.data.preparation.prepare import RECIPE, SOURCE
from avd_trainer.data.preparation.recipe import Recipe, load_recipe
from avd_trainer.data.preparation.report import BINS, SHOWN, _borderline, _edges, _spread_over, write_report
from avd_trainer.data.preparation.schedule import clip_id
from avd_trainer.data.preparation.stage import Done, Failed, Span
from avd_trainer.data.video_files import save_clip
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import write_json, write_text

SPAN = Span(0, 500)
HOSTILE = "<b>&amp;.mp4"
FILES = [f"{number}.mp4" for number in range(8)] + [HOSTILE]
OVERRIDES = ["clip.frames=5", "clip.fps=10", "hue.at=[1,5]", "hue.min=2.5", "flow.min=0.1", "flow.keep=0.5"]


def sha256(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def clip_of(name: str) -> str:
    return clip_id(sha256(name), SPAN)


def recipe_of(*overrides: str) -> Recipe:
    off = [f"{name}=off" for name in ("sharpness", "detail", "repeats")]
    return load_recipe("tiny", [*OVERRIDES, *off, *overrides])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine files, one of which has no clip. Hue leaves out 0 and 1; flow fails for 2, and leaves out the half of the
    rest that moves least: 3, 4 and 5. Duplicates leave out 7, which is like 6."""
    folder = tmp_path_factory.mktemp("report")
    videos, output = folder / "raw", folder / "prepared"
    videos.mkdir()
    recipe = recipe_of()
    with Journal(output) as journal:

        def record(stage: str, row: str, values: dict[str, Any] | str) -> None:
            outcome = Failed(values) if isinstance(values, str) else Done(values)
            journal.record(stage, recipe.stages[stage].digest, row, outcome, 0.5)

        write_text(output / RECIPE, recipe.to_yaml())
        write_json(output / SOURCE, {"videos": str(videos)})
        for number, name in enumerate([*FILES, "broken.mp4"]):
            if number < 6:  # the others are no longer there
                shade = torch.linspace(0, 1, 6).view(1, 6, 1, 1) * torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1, 1)
                save_clip(shade.expand(3, 6, 32, 48), videos / Path(name).stem, 10.0, ["mp4"])
            journal.add_file(KnownFile(name, FileState(1, 1), sha256(name), None))
            if name == "broken.mp4":
                record("probe", sha256(name), "it has no video stream")
                continue
            record("probe", sha256(name), {"width": 48, "height": 32})
            record("framing", sha256(name), {"height": 32, "width": 32, "cut_off": 0.3})
            record("cut", sha256(name), {"scenes": [[0, 600]]})
            record("span", sha256(name), {"clips": [list(SPAN)]})
            clip = clip_of(name)
            journal.record("decoding", "", clip, Done({}), 0.25)
            record("hue", clip, {"entropy": 1.0 + number})
            record("flow", clip, "flow crashed with SIGSEGV" if number == 2 else {"motion": 0.2 * number})
            hashes = ["0" * 16 if number in (6, 7) else f"{number:x}" * 16] * 8
            record("duplicates", clip, {"hashes": {"frames": hashes, "pixels": 1000 - number}})
            for stage, values in (
                ("caption", {"caption": f"number {number} </script>"}),
                ("latents", {}),
                ("text", {}),
            ):
                record(stage, recipe.stages[stage].key(clip, ""), values)
    return output


def data_of(page: Path) -> Any:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def test_what_came_and_what_was_left(prepared: Path) -> None:
    report, _ = write_report(prepared)
    steps = {stage.name: (stage.came, stage.left) for stage in report.stages}
    assert steps["span"] == (9, 9)
    assert steps["hue"] == (9, 7)
    assert steps["flow"] == (7, 3)
    assert steps["duplicates"] == (3, 2)
    assert steps["text"] == (2, 2)
    assert (report.files, report.clips, report.kept) == (10, 9, 2)
    assert report.files_left_out == {"probe: it has no video stream": 1}
    assert report.hours_kept == pytest.approx(2 * 0.5 / 3600)
    flow = {stage.name: stage for stage in report.stages}["flow"]
    assert flow.failed == {"flow crashed with SIGSEGV": 1}
    assert (flow.rows, flow.seconds) == (9, 4.5)
    assert report.other_seconds == {"decoding": 2.25}


def test_histograms_hold_the_clips_that_came(prepared: Path) -> None:
    report, _ = write_report(prepared)
    stages = {stage.name: stage for stage in report.stages}
    hue, flow = stages["hue"].histogram, stages["flow"].histogram
    assert hue is not None
    assert flow is not None
    assert (sum(hue.kept), sum(hue.left_out)) == (7, 2)
    assert (sum(flow.kept), sum(flow.left_out)) == (3, 3)  # the one that failed has no score
    assert hue.limits == {"at least": 2.5}
    assert flow.limits == pytest.approx({"at least": 0.1, "the best 50%": 1.2})
    assert stages["duplicates"].histogram is None  # its score is no number
    # Bars lie on their side of the limit.
    assert all(edge <= 2.5 for edge, count in zip(hue.edges, hue.left_out, strict=False) if count)
    assert all(edge >= 2.5 for edge, count in zip(hue.edges[1:], hue.kept, strict=True) if count)


def test_clips_that_are_shown(prepared: Path) -> None:
    report, _ = write_report(prepared)
    stages = {stage.name: stage for stage in report.stages}
    assert [example.clip for example in stages["hue"].left_out] == [clip_of("0.mp4"), clip_of("1.mp4")]
    assert [(example.clip, example.verdict) for example in stages["hue"].borderline] == [
        (clip_of("0.mp4"), "left out"),
        (clip_of("1.mp4"), "left out"),
        (clip_of("2.mp4"), "kept"),
        (clip_of("3.mp4"), "kept"),
    ]
    assert stages["hue"].left_out[0].reason == "1 is below 2.5"
    assert stages["hue"].across == ()
    assert [example.score for example in stages["framing"].across] == [0.3] * SHOWN  # it left out nothing
    (duplicate,) = stages["duplicates"].left_out
    assert duplicate.reason == "nearly the same as clip 6.mp4 from 0.0 s"
    assert {example.clip for example in report.examples} == {clip_of("6.mp4"), clip_of(HOSTILE)}


def test_every_clip_is_accounted_for(prepared: Path) -> None:
    write_report(prepared)
    clips = {clip["file"]: clip for clip in json.loads((prepared / "report.json").read_text())["all_clips"]}
    assert set(clips) == set(FILES)
    assert (clips["0.mp4"]["stage"], clips["0.mp4"]["reason"]) == ("hue", "1 is below 2.5")
    assert (clips["2.mp4"]["stage"], clips["2.mp4"]["reason"]) == ("flow", "flow crashed with SIGSEGV")
    assert clips["2.mp4"]["scores"] == {"framing": 0.3, "hue": 3.0}
    kept = clips["6.mp4"]
    assert (kept["kept"], kept["stage"], kept["caption"]) == (True, None, "number 6 </script>")


def test_the_page_needs_nothing_else(prepared: Path) -> None:
    report, page = write_report(prepared)
    text = page.read_text()
    assert not re.search(r"(src|href)=|@import|url\(|fetch\(|<link", text)
    data = data_of(page)
    shown = report.model_dump(mode="json", exclude={"all_clips"})
    assert {key: data[key] for key in shown} == shown
    assert HOSTILE in {about["file"] for about in data["about"].values()}
    assert text.count("</script>") == 2  # those of captions would end the page's own


def test_pictures_are_three_frames_of_the_clip(prepared: Path) -> None:
    data = data_of(write_report(prepared)[1])
    assert set(data["pictures"]) == {clip_of(f"{number}.mp4") for number in range(6)} & set(data["about"])
    jpeg = base64.b64decode(data["pictures"][clip_of("0.mp4")].partition(",")[2])
    picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (90, 3 * 135, 3)
    shades = [float(picture[:, 135 * part + 20 : 135 * part + 115, 2].mean()) / 255 for part in range(3)]
    assert shades == pytest.approx([0.0, 0.4, 0.8], abs=0.06)  # frames 0, 2 and 4 of red that grows


def test_another_limit_is_tried_without_a_run(prepared: Path) -> None:
    report, _ = write_report(prepared, ["hue.min=null", "flow.keep=null", "duplicates.distance=null"])
    assert report.kept == 7  # all but 2, for which flow failed, and 0, which stands still


def test_before_captions_their_lack_leaves_nothing_out(prepared: Path) -> None:
    """As after the parts of an array of jobs, which only score; the changed prompt stands for captions not yet made."""
    report, _ = write_report(prepared, ["caption.prompt=another", "latents.model=tiny2", "text.model=tiny2"])
    assert report.kept == 2


def test_no_folder_of_prepared_videos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no prepared videos"):
        write_report(tmp_path)


def test_the_few_that_are_shown_go_from_the_lowest_to_the_highest() -> None:
    scores = {f"{number:02}": float(-number) for number in range(20)}
    shown = _spread_over(scores)
    assert len(shown) == SHOWN
    assert (shown[0], shown[-1]) == ("19", "00")


def test_borderline_clips_are_neighbours_of_both_limits() -> None:
    scores = {f"{number:02}": float(number) for number in range(20)}
    left_out = {clip: score for clip, score in scores.items() if not 5 <= score < 12}
    assert _borderline(scores, left_out) == ["03", "04", "05", "06", "10", "11", "12", "13"]
    assert _borderline(scores, {}) == []


@pytest.mark.parametrize(
    ("values", "limits", "logarithmic"),
    [
        ([1.0, 2.0, 3.0], [], False),
        ([0.0, 0.01, 5.0, 400.0], [0.2], True),
        ([-1.0, 400.0], [], False),
        ([7.0, 7.0], [], False),
        ([0.0, 0.0], [0.001], False),
        ([3.0, 4.0], [10.0], False),
    ],
)
def test_edges_take_in_scores_and_limits(values: list[float], limits: list[float], logarithmic: bool) -> None:
    edges, is_logarithmic = _edges(np.array(values), limits)
    assert len(edges) == BINS + 1
    assert (np.diff(edges) > 0).all()
    assert is_logarithmic == logarithmic
    tolerance = 1e-9
    assert all(edges[0] - tolerance <= limit <= edges[-1] + tolerance for limit in limits)


def test_a_few_scores_far_beyond_do_not_squeeze_the_rest() -> None:
    edges, _ = _edges(np.array([*np.linspace(-1, 1, 999), 1e6]), [])
    assert edges[-1] < 2
