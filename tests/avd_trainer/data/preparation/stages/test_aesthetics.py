from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from avd_trainer.data.preparation.image_models import ImageEmbedder
from avd_trainer.data.preparation.stage import ClipSettings, Done, Row
from avd_trainer.data.preparation.stages.aesthetics import Aesthetics, AestheticsSettings, load_head
from avd_trainer.runtime.errors import UserError
from tiny_image_models import CLIP_DIM, SIDE


@pytest.fixture
def head() -> nn.Module:
    """Built as LAION's: linear layers with nothing but dropout between; 11 modules, so that 10 comes behind 2."""
    layers = [nn.Linear(CLIP_DIM, 8), nn.Dropout(0.2), nn.Linear(8, 6), *(nn.Dropout(0.1) for _ in range(7))]
    return nn.ModuleDict({"layers": nn.Sequential(*layers, nn.Linear(6, 1))}).eval()


def test_several_linear_layers_are_one(head: nn.ModuleDict, tmp_path: Path) -> None:
    torch.save(head.state_dict(), tmp_path / "head.pth")
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    vectors = torch.randn(5, CLIP_DIM)
    for file in ("head.pth", "head.safetensors"):
        weight, bias = load_head(tmp_path / file)
        torch.testing.assert_close(vectors @ weight + bias, head["layers"](vectors)[:, 0])


def test_a_single_layer(tmp_path: Path) -> None:
    layer = nn.Linear(CLIP_DIM, 1)
    torch.save(layer.state_dict(), tmp_path / "head.pth")
    weight, bias = load_head(tmp_path / "head.pth")
    torch.testing.assert_close(weight, layer.weight[0])
    torch.testing.assert_close(bias, layer.bias[0])


def test_what_is_no_head_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(CLIP_DIM, 3).state_dict(), tmp_path / "three.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({}, tmp_path / "empty.pth")
    for file in ("three.pth", "text.pth", "empty.pth"):
        with pytest.raises(UserError, match=r"is no aesthetic head.*improved-aesthetic-predictor"):
            load_head(tmp_path / file)


def test_the_score_is_the_mean_rating(clip_folder: Path, head: nn.ModuleDict, tmp_path: Path, row: Row) -> None:
    torch.save(head.state_dict(), tmp_path / "head.pth")
    settings = AestheticsSettings(clip=str(clip_folder), head=tmp_path / "head.pth", side=SIDE)
    stage = Aesthetics(settings, ClipSettings())
    assert stage.missing() is None
    assert stage.frames(row).indices == (5, 15, 25, 35, 45, 55, 65, 75)
    frames = np.random.default_rng(0).integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)
    outcome = stage.run(row, frames)
    assert isinstance(outcome, Done)
    with torch.no_grad():
        wanted = head["layers"](ImageEmbedder("clip", str(clip_folder), SIDE)(frames))[:, 0]
    assert outcome.values["frames"] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert outcome.values["aesthetics"] == pytest.approx(float(wanted.mean()), abs=1e-5)


def test_a_head_that_is_not_there_is_named(clip_folder: Path, tmp_path: Path) -> None:
    settings = AestheticsSettings(clip=str(clip_folder), head=tmp_path / "none.pth")
    said = Aesthetics(settings, ClipSettings()).missing()
    assert said is not None
    assert "aesthetics.head" in said
    assert "https://" in said
