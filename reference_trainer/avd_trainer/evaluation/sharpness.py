"""Whether the regression's sharpness fits the losses of a student that starts: Eq. 7's weight as it would come out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from torch import Tensor

from avd_core import (
    MAX_SWITCHED,
    MIN_WEIGHT_SPREAD,
    OUTER_WEIGHTS,
    PAPER_SPREAD,
    AVDConfig,
    AVDObjective,
    RegressionConfig,
    adaptive_regression_loss,
)
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import VelocityPredictor, schedule
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.errors import UserError

PAPER_SHARPNESS = 3.0
"""The paper's k of Eq. 7."""
PAPER_STEEPNESS = PAPER_SHARPNESS * PAPER_SPREAD
"""The paper's k times the spread that it was chosen for: 0.9 in the sigmoid for a loss one spread above the mean,
by our reading (:data:`PAPER_SPREAD`)."""

# Half of the variance explained. Of fewer clips, a correlation as high comes about by chance.
_HIGH_CORRELATION, _CLIPS_FOR_CORRELATION = 0.7, 10
_TURNED_DOWN = 0.4  # a fifth less than a clip at the mean has
_QUANTILES = (0.05, 0.5, 0.95)
# Losses are of the order of 1, in float32: what spreads by less differs by rounding alone.
_ROUNDING = 1e-6


class ClipBatch(NamedTuple):
    """Real clips, and the numbers that are drawn for them.

    Attributes:
        latents: ``[B, C, F, H, W]``.
        condition: What they show.
        draws: Of these clips.
    """

    latents: Tensor
    condition: Condition
    draws: Draws


class StepWeights(BaseModel):
    """What the weight judges at one of the few steps, and the weights that come of it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    timestep: float
    """The few step."""
    judged: tuple[float, ...]
    """What is judged, of each clip."""
    mean: float
    """Mean over clips of what is judged."""
    spread: float
    """Its standard deviation over clips; 0 where they differ by rounding alone."""
    steepness: float
    """Sharpness times the spread of the deviations: 0.9 in the paper. Standardised deviations spread by 0.3."""
    weights: tuple[float, float, float]
    """5%, 50% and 95% of the weights, as shares of ``w_reg``."""
    at_the_ends: float
    """Share of clips whose weight is in the outer tenths of (0, ``w_reg``)."""
    weight_spread: float
    """Standard deviation of the weights, as a share of ``w_reg``."""
    energy_correlation: float | None
    """Correlation over clips of what is judged with the clip's own energy, its mean square; None for fewer than 10
    clips, or where one of the two is constant."""

    @property
    def is_switch(self) -> bool:
        """Whether most weights are nearly on or off, and not all alike; as CollapseMonitor judges a run."""
        return self.at_the_ends > MAX_SWITCHED and not self.is_constant

    @property
    def is_constant(self) -> bool:
        """Whether nearly all clips have the same weight."""
        return self.weight_spread < MIN_WEIGHT_SPREAD

    @property
    def follows_energy(self) -> bool:
        """Whether most of what is judged is the clip's own energy, and some of these clips lose weight by it."""
        return abs(self.energy_correlation or 0.0) > _HIGH_CORRELATION and self.weights[0] < _TURNED_DOWN


class SharpnessCalibration(BaseModel):
    """What :func:`calibrate_sharpness` found."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    options: RegressionConfig
    """The regression that was looked at."""
    samples: int
    """Number of clips."""
    steps: tuple[StepWeights, ...]
    """The few steps, in their order."""
    paper_sharpness: float | None
    """The sharpness whose steepness is the paper's 0.9 on average over the steps; None where nothing spreads."""
    remarks: tuple[str, ...]
    """What does not fit, in words, with what to do."""

    def reweighed(self, options: RegressionConfig) -> SharpnessCalibration:
        """What would have been found with another sharpness or deviation, on the same clips.

        Args:
            options: A regression that judges the same.
        """
        assert options.judged == self.options.judged, "losses of another kind are not known"
        return _calibration(
            (
                _weights(
                    step.timestep,
                    torch.tensor(step.judged, dtype=torch.float64),
                    step.energy_correlation,
                    options,
                )
                for step in self.steps
            ),
            options,
        )


@torch.no_grad()
def calibrate_sharpness(
    student: VelocityPredictor,
    teacher: VelocityPredictor,
    batches: Iterable[ClipBatch],
    few_steps: tuple[float, ...],
    options: RegressionConfig,
) -> SharpnessCalibration:
    """Regress each clip at each of the few steps, as training does, and compare with the mean over clips.

    Means and spreads are those of the starting student over all clips, in place of the running ones of training.

    Args:
        student: The student as it starts, which is the teacher where it has no weights of its own.
        teacher: Asked where the excess over its own error is judged.
        batches: Real clips; a few dozen suffice.
        few_steps: The student's timesteps.
        options: The regression.

    Raises:
        UserError: If there are fewer than two clips, or what is judged is not finite.
    """
    regression = AVDObjective(AVDConfig(timesteps=few_steps, regression=options, motion=None)).regression
    assert regression is not None
    regression.eval()  # read what is judged, keep no means
    judged: list[list[Tensor]] = [[] for _ in few_steps]
    energies: list[Tensor] = []
    for clips, condition, draws in batches:
        regression.to(clips.device)
        energies.append(clips.square().flatten(1).mean(dim=1).cpu().double())
        for values, timestep in zip(judged, few_steps, strict=True):
            t = clips.new_full((len(clips),), timestep)
            noise = draws.normal("regression_noise", clips.shape[1:])
            x_t = schedule.add_noise(clips, noise, t)
            judged_by = {"clips": clips} if options.judged == "relative" else {}
            if options.judged == "excess":
                judged_by = {"teacher_prediction": teacher(x_t, t, condition)}
            _, metrics = regression(student(x_t, t, condition), schedule.velocity(clips, noise), t, **judged_by)
            values.append(metrics.get("judged", metrics["sample_losses"]).cpu().double())
    count = sum(map(len, energies))
    if count < 2:
        raise UserError(
            f"The sharpness goes by how losses of real clips differ, and there are {count} of them. Give at least two, "
            "better a few dozen (--samples)."
        )
    energy, of_steps = torch.cat(energies), map(torch.cat, judged)
    return _calibration(
        (
            _weights(timestep, values, _correlation(values, energy), options)
            for timestep, values in zip(few_steps, of_steps, strict=True)
        ),
        options,
    )


def render_sharpness(calibration: SharpnessCalibration) -> Table:
    """The calibration for a terminal."""
    options = calibration.options
    explanation = (
        "k x spread, sharpness times the spread of deviations, is what a loss one spread above its mean has in the "
        f"weight's sigmoid; {PAPER_STEEPNESS:g} in the paper, by our reading. Weights are shares of "
        "method.regression.weight: 5, 50 and 95% of clips are below. At the ends: weights in the outer tenths. Energy: "
        "correlation of what is judged with the clip's mean square."
    )
    caption = "\n".join([explanation, *(f"Note: {remark}" for remark in calibration.remarks)])
    title = f"Sharpness {options.sharpness:g}, {options.deviation} deviation of the {_NAMES[options.judged]}"
    table = Table(title=title, caption=caption, caption_justify="left")
    for column in ("t", "mean", "spread", "k x spread", "weights", "at the ends", "energy"):
        table.add_column(column, justify="right")
    for step in calibration.steps:
        correlation = step.energy_correlation
        table.add_row(
            f"{step.timestep:g}",
            f"{step.mean:.3g}",
            f"{step.spread:.3g}",
            f"{step.steepness:.2f}",
            " ".join(f"{weight:.2f}" for weight in step.weights),
            f"{step.at_the_ends:.0%}",
            "-" if correlation is None else f"{correlation:.2f}",
        )
    return table


_NAMES = {"loss": "loss", "relative": "loss over the clip's energy", "excess": "excess over the teacher's loss"}


def _calibration(weights: Iterable[StepWeights], options: RegressionConfig) -> SharpnessCalibration:
    steps = tuple(weights)
    paper_sharpness = _paper_sharpness(steps, options)
    return SharpnessCalibration(
        options=options,
        samples=len(steps[0].judged),
        steps=steps,
        paper_sharpness=paper_sharpness,
        remarks=tuple(_remarks(steps, options, paper_sharpness)),
    )


def _weights(
    timestep: float, judged: Tensor, energy_correlation: float | None, options: RegressionConfig
) -> StepWeights:
    mean, spread = judged.mean(), judged.std(correction=0)
    if not bool(mean.isfinite() & spread.isfinite()):
        raise UserError(
            f"Losses of real clips at t = {timestep:g} are not finite. Check the clips, the weights and the precision."
        )
    spread = torch.where(spread > _ROUNDING, spread, 0.0)
    standardized = options.deviation == "standardized"
    anything = torch.zeros_like(judged).unsqueeze(1)  # the weights depend on what is judged alone
    _, metrics = adaptive_regression_loss(
        anything,
        anything,
        mean.expand_as(judged),
        weight=1.0,
        sharpness=options.sharpness,
        spreads=spread.expand_as(judged) if standardized else None,
        judged=judged,
    )
    weights = metrics["weights"]
    low, median, high = weights.quantile(weights.new_tensor(_QUANTILES)).tolist()
    return StepWeights(
        timestep=timestep,
        judged=tuple(judged.tolist()),
        mean=float(mean),
        spread=float(spread),
        steepness=options.sharpness * _unit(float(spread), options),
        weights=(low, median, high),
        at_the_ends=float(((weights < OUTER_WEIGHTS) | (weights > 1 - OUTER_WEIGHTS)).double().mean()),
        weight_spread=float(weights.std(correction=0)),
        energy_correlation=energy_correlation,
    )


def _unit(spread: float, options: RegressionConfig) -> float:
    """The spread of the deviations of something that spreads so."""
    return PAPER_SPREAD if options.deviation == "standardized" and spread > 0 else spread


def _correlation(judged: Tensor, energy: Tensor) -> float | None:
    if len(judged) < _CLIPS_FOR_CORRELATION or not min(judged.std(), energy.std()) > 0:
        return None
    return float(torch.corrcoef(torch.stack([judged, energy]))[0, 1])


def _paper_sharpness(steps: tuple[StepWeights, ...], options: RegressionConfig) -> float | None:
    unit = sum(_unit(step.spread, options) for step in steps) / len(steps)
    return PAPER_STEEPNESS / unit if unit > 0 else None


def _remarks(steps: tuple[StepWeights, ...], options: RegressionConfig, paper_sharpness: float | None) -> list[str]:
    if paper_sharpness is None:
        unknown = (
            "what the weight judges is the same for all clips, as is the excess of a student over the teacher that it "
            "starts from. So no sharpness can be taken from it. Set method.regression.deviation=standardized, which "
            "goes by the spread that training brings."
        )
        return [unknown] if options.deviation == "absolute" else []
    remarks = []
    remedy = f"method.regression.sharpness={paper_sharpness:.2g}"
    if options.deviation == "absolute":
        remedy = f"method.regression.deviation=standardized with a sharpness of {PAPER_SHARPNESS:g}, or {remedy}"
    if switch := [step for step in steps if step.is_switch]:
        share = sum(step.at_the_ends for step in switch) / len(switch)
        remarks.append(
            f"at t = {_times(switch)} the weight is a switch, which turns clips on or off: {share:.0%} of the weights "
            "are in the outer tenths of (0, method.regression.weight). That is right where losses fall into two "
            f"groups, since some clips misfit their captions. Where they do not, set {remedy}, for the paper's curve."
        )
    if options.sharpness > 0 and (constant := [step for step in steps if step.is_constant]):
        remarks.append(
            f"at t = {_times(constant)} the weight is nearly a constant on these clips, as in plain regression. That "
            f"is right where all of them fit their captions{_far_off(options)}. Where some do not, set {remedy}, for "
            "the paper's curve."
        )
    if options.judged == "loss" and (energetic := [step for step in steps if step.follows_energy]):
        for contrast, sign in (("high", 1), ("low", -1)):
            if not (steps_so := [step for step in energetic if sign * (step.energy_correlation or 0.0) > 0]):
                continue
            strongest = sign * max(sign * (step.energy_correlation or 0.0) for step in steps_so)
            remarks.append(
                f"at t = {_times(steps_so)} what the weight judges goes by the clip's own energy (correlation "
                f"{strongest:.2f}): it would turn off clips of {contrast} contrast rather than clips that fit badly. "
                "Set method.regression.judged=relative and deviation=standardized."
            )
    return remarks


def _far_off(options: RegressionConfig) -> str:
    """How far off a clip has to be to lose most of its weight."""
    if options.deviation == "standardized":
        return ""
    return f": one that is off by {math.log(9) / options.sharpness:.2g} more than the mean has a fifth of their weight"


def _times(steps: list[StepWeights]) -> str:
    return ", ".join(f"{step.timestep:g}" for step in steps)
