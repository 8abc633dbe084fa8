"""Aesthetic score: what people who rated pictures would give the clip's frames."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from avd_trainer.data.preparation.frames import spread
from avd_trainer.data.preparation.needs import package_missing, weights_missing
from avd_trainer.data.preparation.stage import ClipStage, Done, FrameRequest, Frames, Limits, Row, Score
from avd_trainer.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from avd_trainer.data.preparation.image_models import ImageEmbedder

HEAD_FROM = "https://github.com/christophschuhmann/improved-aesthetic-predictor"


class AestheticsSettings(Limits):
    """Of the aesthetic score. The paper keeps the better half, and does not name its model."""

    clip: str = "openai/clip-vit-large-patch14"
    """CLIP L/14: a folder or hub id."""
    head: Path = Path("sac+logos+ava1-l14-linearMSE.pth")
    """File of the linear head on CLIP's vectors; the default is LAION's, trained on ratings from 1 to 10."""
    side: int = Field(default=224, ge=8)
    """Height and width of the frames that CLIP takes, in pixels. The centre is cut out."""
    frames: int = Field(default=8, ge=1)
    """Frames of a clip that are rated, evenly spread. Paper: 8."""


def load_head(path: Path) -> tuple[Tensor, Tensor]:
    """Read a linear head: one linear layer, or several without anything nonlinear between them, which are one.

    Args:
        path: A state dictionary of PyTorch (``.pth``, ``.pt``) or safetensors, whose weights and biases are in the
            order of their layers.

    Returns:
        Weight ``[D]`` and bias ``[]``, float32.

    Raises:
        UserError: If the file is no such head.
    """
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        layers = sorted({name.removesuffix("weight") for name in state if name.endswith("weight")}, key=_by_number)
        weight, bias = torch.eye(state[f"{layers[0]}weight"].shape[1], dtype=torch.float64), torch.zeros(())
        for layer in layers:
            matrix = state[f"{layer}weight"].double()
            weight, bias = matrix @ weight, matrix @ bias.double().expand(matrix.shape[1]) + state[f"{layer}bias"]
        return weight.view(weight.shape[1]).float(), bias.view(()).float()
    except Exception as error:  # whatever a file that is something else makes of it
        raise UserError(
            f"{path} is no aesthetic head, the weights and biases of linear layers from CLIP's vectors to one number. "
            f"Get sac+logos+ava1-l14-linearMSE.pth from {HEAD_FROM}."
        ) from error


class Aesthetics(ClipStage[AestheticsSettings]):
    """How good the frames look, on average."""

    name = "aesthetics"
    Settings = AestheticsSettings
    score = Score("aesthetics", "mean over frames of the rating that a linear head gives CLIP's vector, about 1 to 10")
    gpu = True

    def missing(self) -> str | None:
        head = self.settings.head
        return (
            package_missing(self.name, "transformers", "wan")
            or weights_missing(self.name, "clip", self.settings.clip)
            or (
                None
                if head.is_file()
                else f"{self.name} needs the linear head {head}, which is not there. Get sac+logos+ava1-l14-linearMSE."
                f"pth from {HEAD_FROM} and name it by {self.name}.head, or leave {self.name} out of the recipe."
            )
        )

    def frames(self, row: Row) -> FrameRequest:
        side = self.settings.side
        return FrameRequest(spread(self.clip.frames, self.settings.frames), cover=(side, side))

    def run(self, row: Row, frames: Frames) -> Done:
        weight, bias = self._head
        ratings = (self._clip(frames) @ weight + bias).tolist()
        return Done({"frames": ratings, "aesthetics": sum(ratings) / len(ratings)})

    def load(self) -> None:
        _ = self._clip, self._head

    @cached_property
    def _clip(self) -> ImageEmbedder:
        from avd_trainer.data.preparation.image_models import ImageEmbedder

        return ImageEmbedder("clip", self.settings.clip, self.settings.side)

    @cached_property
    def _head(self) -> tuple[Tensor, Tensor]:
        return load_head(self.settings.head)


def _by_number(layer: str) -> list[int]:
    """``layers.10.`` behind ``layers.2.``."""
    return [int(part) for part in layer.split(".") if part.isdigit()]


STAGE = Aesthetics
