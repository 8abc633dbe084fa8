from pathlib import Path

import pytest

from avd_trainer.models.transformer import build_transformer
from planned_runs import SMALL


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("small") / "teacher"
    build_transformer(SMALL).save_pretrained(folder)
    return str(folder)
