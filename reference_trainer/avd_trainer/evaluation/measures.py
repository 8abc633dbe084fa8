"""The measures of a set of clips: their registry, and the one call that takes them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import wasserstein_distance
from torch import Tensor

from avd_trainer.evaluation.clip_measures import clip_measures
from avd_trainer.evaluation.shape_measures import shape_measures
from avd_trainer.evaluation.shape_tracking import track_shapes

VERSION = 2
"""Raise it with every change of what a measure is of the same clips: results of two versions are not compared."""


@dataclass(frozen=True)
class Measure:
    """What a number of :func:`measure` says.

    Attributes:
        name: Its key.
        title: What it is in plain words, with its unit where it has one.
        better: ``"higher"``, ``"lower"``, or ``"as real"`` where real clips are the goal and both sides of them wrong.
        headline: Whether it is one of the few that a comparison is judged by. The others explain.
        needs_captions: Whether it compares :class:`~avd_trainer.data.moving_shapes.MovingShapes` with their captions.
    """

    name: str
    title: str
    better: Literal["higher", "lower", "as real"]
    headline: bool = True
    needs_captions: bool = False


MEASURES: dict[str, Measure] = {
    each.name: each
    for each in (
        Measure("visible", "captioned shapes that are visible, share of frames", "higher", needs_captions=True),
        Measure(
            "complete",
            "clips that show both shapes in 3 of 4 frames, share",
            "higher",
            headline=False,
            needs_captions=True,
        ),
        Measure("kind", "shapes of the captioned kind, share", "higher", needs_captions=True),
        Measure("preserved", "shapes that persist with colour and kind, share", "higher", needs_captions=True),
        Measure("area_change", "change of a shape's area, relative", "lower", headline=False, needs_captions=True),
        Measure(
            "color_error", "colour against the caption, RGB distance", "lower", headline=False, needs_captions=True
        ),
        Measure("direction", "shapes that follow the captioned direction, share", "higher", needs_captions=True),
        Measure("moves", "dynamic degree: shapes that move, share", "higher", headline=False, needs_captions=True),
        Measure(
            "speed_distance",
            "distance of speeds to the captioned ones, pixels per frame",
            "lower",
            headline=False,
            needs_captions=True,
        ),
        Measure("jerk", "jerk of the typical shape, pixels per frame cubed", "lower", needs_captions=True),
        Measure("saturation", "HSV saturation of pixels, 0 to 1", "as real"),
        Measure("channel_spread", "spread of the channel farthest off, log ratio to real", "lower", headline=False),
        Measure("spatial_frequency", "mean spatial frequency, cycles per pixel", "as real"),
        Measure("temporal_frequency", "mean temporal frequency, cycles per frame", "as real"),
        Measure("autocorrelation", "correlation of neighbouring latent frames", "as real", headline=False),
        Measure("motion_distance", "energy distance of frame differences to real", "lower"),
        Measure("temporal_loss", "temporal loss, nats; lower is more motion", "as real", headline=False),
    )
}
"""All measures, in the order in which tables show them."""


def measure(latents: Tensor, video: Tensor, captions: Sequence[str] | None, real: Tensor) -> dict[str, float]:
    """Measure a set of clips.

    No clip is left out of a mean: a shape that cannot be found has the worst value of each measure
    (:func:`~avd_trainer.evaluation.shape_measures.shape_measures`), and a clip without motion a defined one.

    Args:
        latents: ``[N, C, F, h, w]`` floating, on any device, as all of these.
        video: ``[N, 3, F', H, W]`` the same clips decoded, RGB; values outside [0, 1] are clamped, as a screen does.
        captions: Of the N clips, which are then :class:`~avd_trainer.data.moving_shapes.MovingShapes`; None for any
            other clips, which get the measures without ``needs_captions``.
        real: ``[M, C, F, h, w]`` latents of real clips of the same captions that are not among ``latents``.

    Returns:
        A finite number for each of ``MEASURES``, by name and in its order.

    Raises:
        ValueError: If shapes do not fit each other, values are not finite, or a caption is of other clips.
    """
    _check(latents, video, real)
    latents, video, real = (x.detach().float().cpu() for x in (latents, video, real))
    values = clip_measures(latents, video, real)
    if captions is not None:
        values |= _captioned(video, captions)
    return {name: values[name] for name, each in MEASURES.items() if captions is not None or not each.needs_captions}


def headlines(values: Mapping[str, object]) -> list[str]:
    """The names among ``values`` that are headline measures, in the order of ``MEASURES``."""
    return [name for name, each in MEASURES.items() if each.headline and name in values]


def _captioned(video: Tensor, captions: Sequence[str]) -> dict[str, float]:
    shapes = shape_measures(track_shapes(video, captions))
    speed, captioned = (shapes.pop(name).flatten() for name in ("speed", "speed_captioned"))
    # The median, so that jerk says how shapes move, and not once more how many are visible.
    jerk = shapes.pop("jerk").median()
    return {
        **{name: float(values.mean()) for name, values in shapes.items()},
        "jerk": float(jerk),
        "speed_distance": float(wasserstein_distance(speed.numpy(), captioned.numpy())),
    }


def _check(latents: Tensor, video: Tensor, real: Tensor) -> None:
    if latents.ndim != 5 or latents.shape[0] < 2 or latents.shape[2] < 2:
        raise ValueError(
            "latents of at least 2 clips and 2 frames are expected, [N, C, F, h, w], got "
            f"{list(latents.shape)}. Measure more clips at once."
        )
    if video.ndim != 5 or len(video) != len(latents) or video.shape[1] != 3:
        raise ValueError(
            f"video of the same {len(latents)} clips is expected, [N, 3, F, H, W], got {list(video.shape)}. Decode all "
            "of the latents."
        )
    if real.ndim != 5 or len(real) < 2 or real.shape[1:] != latents.shape[1:]:
        raise ValueError(
            f"real latents of at least 2 clips are expected, [M, {', '.join(map(str, latents.shape[1:]))}], got "
            f"{list(real.shape)}. Encode real clips of the same size and number of frames."
        )
    for name, values in (("latents", latents), ("video", video), ("real", real)):
        broken = int((~values.isfinite()).flatten(1).any(1).sum())
        if broken:
            raise ValueError(
                f"finite {name} are expected, got {broken} of {len(values)} clips with NaN or infinity. What made "
                "them has diverged; there is nothing to measure."
            )
