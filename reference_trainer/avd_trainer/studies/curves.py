"""Curves of a demo's two runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from avd_trainer.evaluation.palette import COLORS, STEP_COLORS
from avd_trainer.training.metrics_log import read_series


def draw_curves(
    figure: SubFigure,
    histories: Mapping[str, Path],
    titles: Mapping[str, str],
    timesteps: Sequence[float],
    floor: float | None,
    real: Mapping[str, float],
) -> None:
    """Draw what the two runs logged, step by step, smoothed.

    Args:
        figure: Where to draw.
        histories: Files of training metrics of ``dmd`` and ``avd``.
        titles: What the two are called.
        timesteps: The few steps.
        floor: Floor of the motion term, if there is one.
        real: What real clips have of ``sample/std`` and ``sample/temporal_loss``.
    """
    (spread, motion, matching), (online, losses, weights) = figure.subplots(2, 3)
    shared = {
        "sample/std": (spread, "spread of generated latents (std)"),
        "sample/temporal_loss": (motion, "temporal loss of generated clips"),
        "matching/loss": (matching, "distribution-matching loss"),
        "online/loss": (online, "loss of the online model"),
    }
    for metric, (axis, title) in shared.items():
        for name, history in histories.items():
            axis.plot(_smooth(_scalars(history, metric)), color=COLORS[name], label=titles[name])
        if metric in real:
            axis.axhline(real[metric], color=COLORS["real"], linestyle=":", label="Real")
        axis.set_title(title, fontsize=10)
    if floor is not None:
        motion.axhline(floor, color=COLORS["avd"], linestyle="--", linewidth=0.8, label="floor")
    _draw_by_timestep(losses, histories["avd"], "regression/sample_losses", timesteps, "regression loss (AVD)")
    _draw_by_timestep(weights, histories["avd"], "regression/weights", timesteps, "adaptive weight (AVD)")
    for axis in (spread, motion, matching, online, losses, weights):
        if axis in (online, losses, weights):
            axis.set_xlabel("student's updates", fontsize=9)
        _draw_legend(axis)
        plain(axis)


def _draw_legend(axis: Axes) -> None:
    """In one row above all curves."""
    if not (labels := axis.get_legend_handles_labels()[1]):
        return
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.15 * (high - low))
    axis.legend(loc="upper center", ncols=len(labels), fontsize=8, frameon=False, handlelength=1.2, columnspacing=1.0)


def plain(axis: Axes) -> None:
    """No box around it, small ticks."""
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _draw_by_timestep(axis: Axes, history: Path, name: str, timesteps: Sequence[float], title: str) -> None:
    axis.set_title(title, fontsize=10)
    means: dict[float, dict[int, float]] = {timestep: {} for timestep in timesteps}
    steps = zip(_lists(history, "regression/timesteps"), _lists(history, name), strict=True)
    for number, (drawn, values) in enumerate(steps, start=1):
        # Times were float32 on their way here.
        nearest = [_nearest(own, timesteps) for own in drawn]
        for timestep in set(nearest):
            own_values = [value for t, value in zip(nearest, values, strict=True) if t == timestep]
            means[timestep][number] = sum(own_values) / len(own_values)
    for color, (timestep, curve) in zip(cycle(STEP_COLORS), means.items(), strict=False):
        axis.plot(list(curve), _smooth(list(curve.values())), color=color, label=f"t = {timestep:g}")


def _scalars(history: Path, name: str) -> list[float]:
    return [value for value in read_series(history, name) if isinstance(value, float)]


def _lists(history: Path, name: str) -> list[list[float]]:
    return [value for value in read_series(history, name) if isinstance(value, list)]


def _nearest(timestep: float, timesteps: Sequence[float]) -> float:
    return min(timesteps, key=lambda candidate: abs(candidate - timestep))


def _smooth(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """An exponential moving average, corrected for its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(total / weight)
    return smoothed
