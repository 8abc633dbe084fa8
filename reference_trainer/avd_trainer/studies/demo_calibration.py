"""What the demo measures of the user's own clips, for which the preset's floor and sharpness were not chosen."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, computed_field

from avd_core import RegressionConfig
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData
from avd_trainer.data.sources import TrainingData
from avd_trainer.evaluation.calibration import Calibration, calibrate_models
from avd_trainer.evaluation.sharpness import PAPER_SHARPNESS
from avd_trainer.methods.avd import AVDMethodConfig
from avd_trainer.models.architecture import image_input
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json, write_json
from avd_trainer.runtime.terminal import say
from avd_trainer.training.config import TrainConfig

CALIBRATION = "calibration.json"
"""File in a demo's folder: what was chosen, and what was measured."""

Part = Literal["floor", "sharpness"]
"""``floor`` is ``method.motion.floor``, ``sharpness`` both ``deviation`` and ``sharpness`` of ``method.regression``."""


class Choice(BaseModel):
    """Values of a method that go by clips, and the measurement behind them."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    floor: float | None
    """Of the motion term, in nats; None to leave the method's."""
    deviation: Literal["absolute", "standardized"] | None
    """Of the regression; None to leave the method's."""
    sharpness: float | None
    """Of the regression; None to leave the method's."""
    measured: Calibration
    """What was measured, with the method's own values."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def at_the_ends(self) -> tuple[float, ...] | None:
        """Share of the weights that are nearly on or off at each of the few steps, with this deviation and sharpness;
        None where the method's are left. With the method's own it is in ``measured``."""
        found = self.measured.sharpness
        if found is None or self.deviation is None:
            return None
        chosen = found.options.model_copy(update={"deviation": self.deviation, "sharpness": self.sharpness})
        return tuple(step.at_the_ends for step in found.reweighed(chosen).steps)

    def applied(self, method: AVDMethodConfig) -> AVDMethodConfig:
        """The method with these values in place of its own."""
        motion, regression = method.motion, method.regression
        if motion is not None and self.floor is not None:
            motion = motion.model_copy(update={"floor": self.floor})
        if regression is not None and self.deviation is not None:
            regression = regression.model_copy(update={"deviation": self.deviation, "sharpness": self.sharpness})
        return method.model_copy(update={"motion": motion, "regression": regression})


def calibrated(
    config: TrainConfig, parts: Collection[Part], clips: CaptionedLatents, output: Path, *, samples: int, steps: int
) -> AVDMethodConfig:
    """The method of a run with values that fit its clips.

    Measured once: the choice is written to ``calibration.json`` in ``output``, and read from there when a demo goes on.

    Args:
        config: The run, of method ``avd``.
        parts: What to choose by the clips; the rest stays as it is.
        clips: What is trained on.
        output: Folder of the demo.
        samples: Clips to sample from the teacher, and to look at.
        steps: Euler steps of the teacher.

    Raises:
        UserError: As :func:`calibrate_models`, or if ``calibration.json`` is damaged or of another version.
    """
    method = config.method
    assert isinstance(method, AVDMethodConfig)
    if not parts:
        return method
    file = output / CALIBRATION
    if file.exists():
        try:
            return Choice.model_validate(read_json(file)).applied(method)
        except ValidationError as error:
            raise UserError(
                f"{file} is none of this version: {error.errors()[0]['msg']}. Delete it, and the clips are measured "
                "again; or choose a new --output."
            ) from error
    assert config.teacher is not None  # the method needs one
    teacher = load_transformer(config.teacher)
    embed = HashTextEmbedding(TEXT_LENGTH, teacher.config.text_dim)
    data = InMemoryData(clips, embed, image=image_input(teacher.config) is not None)
    measured = calibrate_models(
        config,
        VelocityModel(teacher),
        TrainingData(data, data),
        torch.device("cpu"),
        samples=samples,
        steps=steps,
    )
    choice = choose(method, parts, measured)
    write_json(file, choice.model_dump(mode="json"))
    say(describe(choice, method))
    return choice.applied(method)


def choose(method: AVDMethodConfig, parts: Collection[Part], measured: Calibration) -> Choice:
    """Values by a measurement.

    - The floor is that of the teacher's samples or of the clips, whichever move less: regression and motion term pull
      in opposite directions where it asks for more motion than the clips have.
    - Deviations are standardised, with the paper's sharpness. One sharpness for absolute deviations would not do: in
      real footage their spread differs much from step to step.
    """
    floor = "floor" in parts and method.motion is not None
    sharpness = "sharpness" in parts and method.regression is not None
    return Choice(
        floor=round(max(measured.teacher.clip_mean, measured.real.clip_mean), 2) if floor else None,
        deviation="standardized" if sharpness else None,
        sharpness=PAPER_SHARPNESS if sharpness else None,
        measured=measured,
    )


def describe(choice: Choice, method: AVDMethodConfig) -> str:
    """A line for the user: what was chosen, in place of what, and why."""
    said = []
    if choice.floor is not None and method.motion is not None:
        said.append(f"method.motion.floor={choice.floor:g} (in place of {method.motion.floor:g})")
    if choice.at_the_ends is not None and method.regression is not None:
        said.append(
            f"method.regression.deviation={choice.deviation}, method.regression.sharpness={choice.sharpness:g}, with "
            f"which at most {max(choice.at_the_ends):.0%} of the weights are nearly on or off at any of the few steps "
            f"(in place of {_describe_regression(method.regression, choice.measured)})"
        )
    return f"Calibrated on your clips: {'; '.join(said) or 'nothing, as both terms are left out'}. See {CALIBRATION}."


def _describe_regression(regression: RegressionConfig, measured: Calibration) -> str:
    assert measured.sharpness is not None
    step = max(measured.sharpness.steps, key=lambda step: step.at_the_ends)
    return (
        f"{regression.deviation}, {regression.sharpness:g}, with which it would be {step.at_the_ends:.0%} at "
        f"t = {step.timestep:g}"
    )
