"""The measures of a set of clips: their registry, and the one call that takes them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from avd_trainer.evaluation.clip_measures import clip_measures
from avd_trainer.evaluation.controls import Encoded
from avd_trainer.evaluation.image_measures import image_measures
from avd_trainer.evaluation.shape_measures import open_measures, shape_measures, speed_distance
from avd_trainer.evaluation.shape_tracking import track_shapes

VERSION = 3
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

    def distance(self, value: float, real: float) -> float:
        """How far a value is from real clips', at least 0, in the measure's unit.

        Where higher or lower is better, whoever is beyond the real clips is as near as can be: 0.
        """
        above = value - real
        return {"higher": max(0.0, -above), "lower": max(0.0, above), "as real": abs(above)}[self.better]


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
        Measure("color_error", "colour against the caption, RGB distance", "as real", needs_captions=True),
        Measure("placed", "shapes on the captioned half of the frame, share", "higher", needs_captions=True),
        Measure("direction", "shapes that follow the captioned direction, share", "higher", needs_captions=True),
        Measure("moves", "dynamic degree: shapes that move, share", "higher", headline=False, needs_captions=True),
        Measure(
            "speed_error",
            "speed against the caption, pixels per frame",
            "lower",
            headline=False,
            needs_captions=True,
        ),
        Measure("speed_distance", "speeds against real ones, share of the captioned", "lower", needs_captions=True),
        Measure("jerk", "jerk of shapes, pixels per frame cubed", "as real", needs_captions=True),
        Measure("saturation", "HSV saturation of pixels, 0 to 1", "as real", headline=False),
        Measure("saturation_error", "HSV saturation of single clips against real ones", "lower"),
        Measure("channel_spread", "spread of the channel farthest off, log ratio to real", "lower", headline=False),
        Measure("spatial_frequency", "mean spatial frequency, cycles per pixel", "as real"),
        Measure("temporal_frequency", "mean temporal frequency, cycles per frame", "as real"),
        Measure("autocorrelation", "correlation of neighbouring latent frames", "as real", headline=False),
        Measure("motion_distance", "energy distance of frame differences to real", "lower"),
        Measure("temporal_loss", "temporal loss, nats; lower is more motion", "as real", headline=False),
    )
}
"""All measures of clips, in the order in which tables show them."""

IMAGE_MEASURES: dict[str, Measure] = {
    each.name: each
    for each in (
        Measure("subject_consistency", "shapes that keep the image's colour, kind and start, share", "higher"),
        Measure("start_error", "start of shapes against the image, pixels", "lower", headline=False),
        Measure("first_frame_error", "first frame against the image, RMS of pixels", "lower", headline=False),
    )
}
"""Further ones, of clips of moving shapes that were to begin with an image."""

OPEN_MEASURES: dict[str, Measure] = {
    each.name: each
    for each in (
        Measure("variety", "clips of one caption that differ in what it leaves open, share of pairs", "higher"),
        Measure("repetition", "clips of one caption that show one scene, share of pairs", "lower"),
        Measure("background_error", "background against the nearest real one, RGB distance", "lower"),
        Measure("saturation_shift", "HSV saturation above that of the scene shown", "as real", headline=False),
    )
}
"""Further ones, of clips of moving shapes whose captions name the two shapes alone."""

ALL_MEASURES = MEASURES | IMAGE_MEASURES | OPEN_MEASURES
"""Every one."""


def measure(
    latents: Tensor, video: Tensor, captions: Sequence[str] | None, real: Encoded, images: Tensor | None = None
) -> dict[str, float]:
    """Measure a set of clips.

    No clip is left out of a mean: a shape that cannot be found has the worst value of each measure
    (:func:`~avd_trainer.evaluation.shape_measures.shape_measures`), and a clip without motion a defined one.

    Args:
        latents: ``[N, C, F, h, w]`` floating, on any device, as all of these.
        video: ``[N, 3, F', H, W]`` the same clips decoded, RGB; values outside [0, 1] are clamped, as a screen does.
        captions: Of the N clips, which are then :class:`~avd_trainer.data.moving_shapes.MovingShapes`; None for any
            other clips, which get the measures without ``needs_captions``.
        real: Real clips that are not among ``latents``: with captions as many, of the same captions in their order;
            without, of any number, drawn independently. Where captions name the subjects alone, clip and real clip of a
            caption may show different scenes, so the two sets are compared as wholes.
        images: ``[N, 3, H, W]`` what each clip was to begin with, in pixels, where they are captioned clips of image to
            video; None for text to video.

    Returns:
        A finite number for each of ``MEASURES``, by name and in its order; with images also of ``IMAGE_MEASURES``, and
        with captions of the subjects alone of ``OPEN_MEASURES``.

    Raises:
        ValueError: If shapes do not fit each other, values are not finite, or a caption is of other clips.
    """
    _check(latents, video, captions, real, images)
    latents, video, real_latents, real_video = (x.detach().float().cpu() for x in (latents, video, *real))
    tracks = None if captions is None else track_shapes(video, captions)
    paired = tracks is not None and not tracks.open
    values = clip_measures(latents, video, real_latents, real_video, paired=paired)
    if captions is not None and tracks is not None:
        values |= {name: float(each.mean()) for name, each in shape_measures(tracks).items()}
        values["speed_distance"] = speed_distance(tracks, track_shapes(real_video, captions))
        if tracks.open:
            values |= open_measures(video.clamp(0, 1), tracks, captions)
        if images is not None:
            values |= image_measures(video, captions, images.detach().float().cpu())
    return {name: values[name] for name in ALL_MEASURES if name in values}


def headlines(values: Mapping[str, object]) -> list[str]:
    """The names among ``values`` that are headline measures, in the order of ``ALL_MEASURES``."""
    return [name for name, each in ALL_MEASURES.items() if each.headline and name in values]


def _check(
    latents: Tensor, video: Tensor, captions: Sequence[str] | None, real: Encoded, images: Tensor | None
) -> None:
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
    if real.latents.ndim != 5 or len(real.latents) < 2 or real.latents.shape[1:] != latents.shape[1:]:
        raise ValueError(
            f"real latents of at least 2 clips are expected, [M, {', '.join(map(str, latents.shape[1:]))}], got "
            f"{list(real.latents.shape)}. Encode real clips of the same size and number of frames."
        )
    if real.video.shape != (len(real.latents), *video.shape[1:]):
        raise ValueError(
            f"video of the {len(real.latents)} real clips is expected, {[len(real.latents), *video.shape[1:]]}, got "
            f"{list(real.video.shape)}. Decode all of their latents."
        )
    if images is not None and captions is None:
        raise ValueError("captions of clips with images are expected, got none. Leave the images out, or pass them.")
    if captions is not None and len(real.latents) != len(latents):
        raise ValueError(
            f"a real clip for each of {len(latents)} captioned clips is expected, got {len(real.latents)}. Pass those "
            "of the same captions."
        )
    everything = (("latents", latents), ("video", video), ("real latents", real.latents), ("real video", real.video))
    for name, values in everything:
        broken = int((~values.isfinite()).flatten(1).any(1).sum())
        if broken:
            raise ValueError(
                f"finite {name} are expected, got {broken} of {len(values)} clips with NaN or infinity. What made "
                "them has diverged; there is nothing to measure."
            )
