"""Code and configuration in pages that no test of their own subject runs, as they stand there."""

import re
from pathlib import Path
from typing import Any

import torch

from avd_core import ConditionalScoreDistillationLoss, HingeLoss, SpatioTemporalR1Loss
from avd_trainer.config.loading import load_config, to_yaml
from avd_trainer.data.preparation.recipe import load_recipe
from avd_trainer.studies.definition import load_study
from avd_trainer.training.config import TrainConfig

DOCS = Path(__file__).parents[1] / "docs"
DATA = {"data": {"kind": "shards", "path": "data/clips"}}


def block(page: str, words: str) -> str:
    """The one block of a page that has these words."""
    blocks = re.findall(r"^```\w+\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (code,) = (block for block in blocks if words in block)
    return code


def test_roll_off_points_have_the_shapes_beside_them() -> None:
    code = block("spectrum.md", "spectral_rolloff")
    scope: dict[str, Any] = {}
    exec(code, scope)
    calls = re.findall(r"^(\w+_rolloff\(.*?\))  # (\[[\d, ]+\])", code, re.MULTILINE)
    assert len(calls) == 3
    for call, shape in calls:
        assert str(list(eval(call, scope).shape)) == shape


def test_the_adversarial_losses_are_called_like_this() -> None:
    code = block("method.md", "hinge.discriminator")
    weight = torch.ones((), requires_grad=True)
    clips_t = torch.randn(2, 4, 3, 8, 8)
    scope: dict[str, Any] = {
        "hinge": HingeLoss(),
        "r1": SpatioTemporalR1Loss(),
        "distillation": ConditionalScoreDistillationLoss(),
        "discriminator": lambda x_t: weight * x_t.mean(dim=(1, 2, 3, 4)),
        "clips_t": clips_t,
        "clip_logits": weight * clips_t.mean(dim=(1, 2, 3, 4)),
        "sample_logits": weight * torch.randn(2),
        "samples": weight * torch.randn(2, 4, 3, 8, 8),
        "teachers_x_0": torch.randn(2, 4, 3, 8, 8),
    }
    exec(code, scope)
    for name in ("loss", "penalty", "distance"):
        assert scope[name].requires_grad


def test_shards_are_written_and_read(tmp_path: Path) -> None:
    code = block("data.md", "ShardWriter")
    latent, embedding = torch.randn(16, 5, 8, 8), torch.randn(7, 4096)
    scope: dict[str, Any] = {
        "folder": tmp_path,
        "clips": [(latent, embedding, "a cat", "cat.mp4")],
        "negative_embedding": torch.randn(3, 4096),
        "negative_prompt": "blurred",
    }
    exec(code, scope)
    torch.testing.assert_close(scope["latent"], latent, rtol=1e-3, atol=1e-3)
    assert scope["text"].shape == (512, 4096)
    assert (scope["caption"], scope["source"]) == ("a cat", "cat.mp4")


def test_a_file_of_values_extends_a_preset(tmp_path: Path) -> None:
    code = block("training.md", "extends: wan2.1-1.3b/avd")
    (tmp_path / "mine.yaml").write_text(code)
    mine = load_config(TrainConfig, str(tmp_path / "mine.yaml"), replace=DATA)
    assert (mine.method.kind, mine.max_steps) == ("avd", 2000)
    assert mine.method.regression.weight == 1.0


def test_logging_is_configured_like_this(tmp_path: Path) -> None:
    code = block("monitoring.md", "wandb: {")
    (tmp_path / "mine.yaml").write_text(to_yaml({"extends": "tiny/avd"}) + code)
    mine = load_config(TrainConfig, str(tmp_path / "mine.yaml"))
    assert mine.logging.tensorboard
    assert mine.logging.wandb is not None
    assert mine.logging.wandb.project == "my-students"
    assert (mine.samples.every, mine.samples.count) == (200, 4)


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    code = block("data.md", "# mine.yaml")
    (tmp_path / "mine.yaml").write_text(code)
    stages = load_recipe(tmp_path / "mine.yaml").stages
    chosen: dict[str, Any] = {name: stage.settings for name, stage in stages.items()}
    assert (chosen["flow"].min, chosen["duplicates"].distance, chosen["detail"].min) == (0.5, 6, 0.1)


def test_a_study_is_two_files_and_their_relatives(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(block("studies.md", "# study.yaml"))
    (tmp_path / "with.yaml").write_text(block("studies.md", "# with.yaml"))
    (tmp_path / "without.yaml").write_text("# Without it.\nextends: tiny/avd\nmethod: {motion: {weight: 0.0}}\n")
    (tmp_path / "teacher.yaml").write_text("# The teacher.\nteacher_of: without\nsteps: 2\n")
    (tmp_path / "interpolator.yaml").write_text("# The network.\nextends: tiny/frame_interpolation\n")
    (tmp_path / "half-rate.yaml").write_text("# At half rate.\nof: with\ninterpolator: interpolator\n")
    loaded = load_study(str(tmp_path))
    assert loaded.run("with").method.motion.weight == 0.3
    assert loaded.run("without").method.motion.weight == 0.0
    assert loaded.titles["with"] == "with.yaml: With the temporal term."
