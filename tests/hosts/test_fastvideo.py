"""The FastVideo adapter inside FastVideo: its entry point, Trainer, DMD2Method, WanModel and checkpoints."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize(
    "proof",
    [
        pytest.param(["data_latent", "simulate"], id="losses by hand"),
        pytest.param(["resume"], id="checkpoint"),
        pytest.param(["refusals"], id="refusals"),
        pytest.param(["two_ranks"], id="two ranks"),
    ],
)
def test_a_run_with_the_lines_of_the_page(run_in_host: Callable[..., dict[str, Any]], proof: list[str]) -> None:
    report = run_in_host("FastVideo", "fastvideo_dmd2.py", *proof)
    assert list(report) == proof
