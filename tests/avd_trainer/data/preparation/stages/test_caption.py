from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from avd_trainer.data.preparation.captioners import Question
from avd_trainer.data.preparation.stage import ClipSettings, Done, Failed, Row, digest
from avd_trainer.data.preparation.stages.caption import PROMPT, Caption, CaptionSettings

NO_FRAMES = np.zeros((0, 0, 0, 3), np.uint8)


def test_captions_from_files_need_no_frames(row: Row) -> None:
    stage = Caption(CaptionSettings(by="file"), ClipSettings())
    assert stage.missing() is None
    assert stage.frames(row) is None
    assert stage.run(row._replace(caption="A dog runs."), NO_FRAMES) == Done({"caption": "A dog runs."})
    assert Caption.reads_caption(stage.settings)
    assert not Caption.reads_caption(CaptionSettings())


@pytest.mark.parametrize("answer", ["A dog.", Failed("busy", again=True)])
def test_a_model_is_asked_about_eight_frames(row: Row, monkeypatch: pytest.MonkeyPatch, answer: str | Failed) -> None:
    asked = []

    def captioner(frames: np.ndarray, question: Question) -> str | Failed:
        asked.append((len(frames), question))
        return answer

    stage = Caption(CaptionSettings(), ClipSettings())
    monkeypatch.setitem(stage.__dict__, "_captioner", captioner)
    frames = np.zeros((len(stage.frames(row).indices), 360, 640, 3), np.uint8)
    assert stage.run(row, frames) == (Done({"caption": "A dog."}) if answer == "A dog." else answer)
    assert asked == [(8, Question(PROMPT, 512))]


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    said = Caption(CaptionSettings(model=str(tmp_path)), ClipSettings()).missing()
    assert said is not None
    assert "caption.model" in said


def test_an_endpoint_needs_its_url() -> None:
    with pytest.raises(ValidationError, match="needs the server's URL"):
        CaptionSettings(by="endpoint")


def test_another_server_asks_nothing_again_and_another_model_does() -> None:
    def key(**settings: object) -> str:
        return digest(Caption, CaptionSettings(by="endpoint", **settings), ClipSettings(), {})

    one = key(endpoint="http://one/v1")
    assert key(endpoint="http://two/v1", timeout=5, tries=9) == one
    assert key(endpoint="http://one/v1", model="another") != one


def test_a_gpu_is_wanted_for_a_model_on_this_machine_alone() -> None:
    assert Caption.wants_gpu(CaptionSettings())
    assert not Caption.wants_gpu(CaptionSettings(by="endpoint", endpoint="http://one/v1"))
    assert not Caption.wants_gpu(CaptionSettings(by="file"))
