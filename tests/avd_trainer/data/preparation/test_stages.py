"""What every stage of the package keeps to."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from avd_trainer.data.preparation.registry import list_stages, load_stage
from avd_trainer.data.preparation.stage import ClipSettings, ClipStage, FileStage, ScanStage, Stage, StageSettings

STAGES = [load_stage(name) for name in list_stages()]
of_each_stage = pytest.mark.parametrize("stage", STAGES, ids=list_stages())


def test_there_are_stages() -> None:
    assert len(STAGES) > 10


@of_each_stage
def test_a_stage_says_what_it_is(stage: type[Stage[Any]]) -> None:
    assert stage.__module__.rpartition(".")[2] == stage.name
    assert stage.__doc__
    assert stage.version >= 1
    assert sum(issubclass(stage, kind) for kind in (FileStage, ScanStage, ClipStage)) == 1
    for read in stage.reads:
        assert issubclass(stage, ClipStage) or not issubclass(load_stage(read), ClipStage)


@of_each_stage
def test_settings_have_defaults_and_say_what_they_mean(stage: type[Stage[Any]]) -> None:
    settings = stage.Settings()
    fields = type(settings).model_fields
    assert fields.keys() >= settings.DECIDES
    assert all(field.description for field in fields.values())
    # Without a score there is nothing to decide on.
    decides = type(settings).reject is not StageSettings.reject
    assert decides == (stage.score is not None)


@of_each_stage
def test_what_is_missing_is_told_with_how_to_get_it(stage: type[Stage[Any]]) -> None:
    missing = stage(stage.Settings(), ClipSettings()).missing()
    assert missing is None or stage.name in missing


def test_listing_and_importing_all_stages_is_quick() -> None:
    """Each worker does it, and so does ``avd data prepare`` before anything else."""
    program = (
        "import sys; from avd_trainer.data.preparation.registry import *; [load_stage(n) for n in list_stages()];"
        "print(sorted({'torch', 'transformers', 'cv2', 'rapidocr'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
