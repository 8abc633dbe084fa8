"""Pictures of a demo: contact sheets, curves, animations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib

from avd_trainer.evaluation.palette import COLORS, STEP_COLORS

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from avd_trainer.evaluation.clip_metrics import ClipMetrics
from avd_trainer.training.metrics_log import read_series

TITLES = {"real": "Real", "teacher": "Teacher", "dmd": "DMD alone", "avd": "AVD"}

CLIPS_PER_SHEET = 3
FRAMES_PER_CLIP = 5


def save_report(
    path: Path,
    videos: Mapping[str, Tensor],
    metrics: Mapping[str, ClipMetrics],
    histories: Mapping[str, Path],
    captions: Sequence[str],
    timesteps: Sequence[float],
    floor: float | None,
    latent_std: float,
) -> None:
    """Draw ``report.png``.

    Args:
        path: File to write.
        videos: Per row ``[N, 3, F, H, W]`` decoded clips; all rows in the order of ``captions``.
        metrics: Per row.
        histories: Files of training metrics of ``dmd`` and ``avd``.
        captions: Of the clips, the same in all rows.
        timesteps: The few steps.
        floor: Floor of the motion term, if there is one.
        latent_std: Standard deviation of the real latents.
    """
    figure = plt.figure(figsize=(15, 13), layout="constrained")
    sheets, bars, curves = figure.subfigures(3, 1, height_ratios=(4.8, 2.7, 5.0))  # type: ignore[misc]
    _draw_sheets(sheets, videos, metrics, captions)
    _draw_bars(bars, metrics)
    _draw_curves(curves, histories, metrics, timesteps, floor, latent_std)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=100, format="png")
    plt.close(figure)
    part.replace(path)


def _draw_sheets(
    figure: Figure, videos: Mapping[str, Tensor], metrics: Mapping[str, ClipMetrics], captions: Sequence[str]
) -> None:
    axes = figure.subplots(len(videos), CLIPS_PER_SHEET, squeeze=False)
    for row, (name, video) in zip(axes, videos.items(), strict=True):
        for column, axis in enumerate(row):
            axis.set_xticks([])
            axis.set_yticks([])
            if column >= len(video):
                axis.axis("off")
                continue
            axis.imshow(_strip(video[column]), interpolation="nearest")
            for side in axis.spines.values():
                side.set_edgecolor(COLORS[name])
                side.set_linewidth(1.5)
            if row is axes[0]:
                axis.set_title(captions[column], fontsize=8, color="#555555")
        row[0].set_ylabel(TITLES[name], fontsize=13, color=COLORS[name], fontweight="bold")
    figure.suptitle("Frames of decoded clips: one caption per column, one noise for all models", fontsize=11)


def _strip(clip: Tensor) -> np.ndarray:
    """``[3, F, H, W]`` to a strip of frames ``[H, n W, 3]``."""
    index = torch.linspace(0, clip.shape[1] - 1, FRAMES_PER_CLIP).round().long()
    strip: np.ndarray = rearrange(clip[:, index].clamp(0, 1), "c f h w -> h (f w) c").numpy()
    return strip


def _draw_bars(figure: Figure, metrics: Mapping[str, ClipMetrics]) -> None:
    fields = {
        "saturation": "mean HSV saturation",
        "temporal_loss": "temporal loss, nats (lower: more motion)",
        "pixel_motion": "pixel change per frame",
        "distance": "energy distance to held-out clips",
    }
    for axis, (field, title) in zip(figure.subplots(1, len(fields)), fields.items(), strict=True):
        values = [getattr(metrics[name], field) for name in metrics]
        bars = axis.bar([TITLES[n] for n in metrics], values, color=[COLORS[n] for n in metrics], width=0.65)
        axis.bar_label(bars, fmt="%.3f", fontsize=8)
        axis.axhline(values[0], color=COLORS["real"], linewidth=0.8, linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.18)
        _plain(axis)


def _draw_curves(
    figure: Figure,
    histories: Mapping[str, Path],
    metrics: Mapping[str, ClipMetrics],
    timesteps: Sequence[float],
    floor: float | None,
    latent_std: float,
) -> None:
    (spread, motion, matching), (online, losses, weights) = figure.subplots(2, 3)
    for name, history in histories.items():
        for axis, metric in (
            (spread, "sample/std"),
            (motion, "sample/temporal_loss"),
            (matching, "matching/loss"),
            (online, "online/loss"),
        ):
            axis.plot(_smooth(_scalars(history, metric)), color=COLORS[name], label=TITLES[name])
    spread.axhline(latent_std, color=COLORS["real"], linestyle=":", label="Real")
    motion.axhline(metrics["real"].temporal_loss, color=COLORS["real"], linestyle=":", label="Real")
    if floor is not None:
        motion.axhline(floor, color=COLORS["avd"], linestyle="--", linewidth=0.8, label="floor")
    spread.set_title("spread of generated latents (std)", fontsize=10)
    motion.set_title("temporal loss of generated clips", fontsize=10)
    matching.set_title("distribution-matching loss", fontsize=10)
    online.set_title("loss of the online model", fontsize=10)
    _draw_by_timestep(losses, histories["avd"], "regression/sample_losses", timesteps, "regression loss (AVD)")
    _draw_by_timestep(weights, histories["avd"], "regression/weights", timesteps, "adaptive weight (AVD)")
    for axis in (spread, motion, matching, online, losses, weights):
        if axis in (online, losses, weights):
            axis.set_xlabel("student's updates", fontsize=9)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
        _plain(axis)


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


def _plain(axis: Axes) -> None:
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
