from pathlib import Path

import pytest

from avd_trainer.data.preparation.stage import Row, Span


@pytest.fixture
def row() -> Row:
    """A clip whose stages read nothing of other stages."""
    return Row("0" * 64 + "-0", Path("clip.mp4"), "0" * 64, Span(0, 5062), {})
