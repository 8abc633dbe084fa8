from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny_pipeline
from avd_trainer.config.sections import SamplesConfig
from avd_trainer.data.schema import Encoding
from avd_trainer.runtime.errors import UserError
from avd_trainer.training.sample_clips import SampleWriter, frames_per_second

CPU = torch.device("cpu")
ALWAYS = SamplesConfig(every=1)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_pipeline.build(tmp_path_factory.mktemp("wan")))


@pytest.mark.parametrize("which", ["codec", "encoding", "teacher", "neither gone"])
def test_the_vae_is_the_first_that_there_is(tmp_path: Path, pipeline: str, which: str) -> None:
    gone = str(tmp_path / "gone")
    codec = pipeline if which == "codec" else None
    encoding = Encoding("wan", {"encoding": pipeline, "neither gone": pipeline}.get(which, gone), 8.0)
    teacher = pipeline if which in ("teacher", "neither gone") else gone
    writer = SampleWriter(ALWAYS, encoding, codec=codec, teacher=teacher, folder=tmp_path / "samples", device=CPU)
    folder = writer.write(3, torch.randn(2, 16, 2, 4, 4), ["a", "b"])
    assert folder.name == "step-00000003"
    with Image.open(folder / "1.gif") as animation:
        assert (animation.size, animation.n_frames) == ((32, 32), 5)  # type: ignore[attr-defined]
        assert animation.info["duration"] in (120, 130)  # 8 a second, in hundredths


def test_the_block_dct_needs_no_pipeline(tmp_path: Path) -> None:
    writer = SampleWriter(ALWAYS, Encoding("block-dct-4"), codec=None, teacher="not/there", folder=tmp_path, device=CPU)
    assert (writer.write(1, torch.randn(1, 16, 2, 4, 4), ["a"]) / "0.mp4").is_file()


def test_a_missing_vae_is_told_before_the_run_and_only_if_samples_are_wanted(tmp_path: Path, pipeline: str) -> None:
    gone = str(tmp_path / "gone")
    places = {"codec": None, "teacher": gone, "folder": tmp_path, "device": CPU}
    with pytest.raises(UserError, match=f"asks for clips, but {gone} has no VAE .* Set codec to"):
        SampleWriter(ALWAYS, Encoding("wan"), **places)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"{gone} has no VAE"):  # what was asked for is not replaced
        SampleWriter(ALWAYS, Encoding("wan", pipeline), **places | {"codec": gone})  # type: ignore[arg-type]
    SampleWriter(SamplesConfig(), Encoding("wan"), **places)  # type: ignore[arg-type]


def test_the_frame_rate_is_what_is_asked_for_or_the_datas_or_wans() -> None:
    known = Encoding("wan", fps=24.0)
    assert frames_per_second(SamplesConfig(fps=8), known) == 8
    assert frames_per_second(SamplesConfig(), known) == 24
    assert frames_per_second(SamplesConfig(), Encoding("wan")) == 16
