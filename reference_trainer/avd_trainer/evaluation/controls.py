"""Real clips that were spoiled in a known way: a measure that does not see it cannot be trusted with a model.

Each control spoils pixels or latents by a strength, and the result goes through the codec, so that its latents and its
video are of one thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from avd_trainer.data.moving_shapes import MovingShapes, ShapeClip


class Codec(Protocol):
    """Between pixels and latents; :class:`~avd_trainer.models.codecs.block_dct.BlockDCTCodec` is one."""

    def encode(self, video: Tensor, /) -> Tensor:
        """``[N, 3, F', H, W]`` in [0, 1] to ``[N, C, F, h, w]``."""

    def decode(self, latents: Tensor, /) -> Tensor:
        """Latents to video of the same shape."""


class RealClips(NamedTuple):
    """Clips to spoil.

    Attributes:
        video: ``[N, 3, F', H, W]`` in [0, 1].
        without: The same clips without one of their objects; None where nobody can take it out.
        first_alike: ``[N]`` int64: by clip the place of the first one of the same caption; None where captions leave
            nothing open, or there are none.
    """

    video: Tensor
    without: Tensor | None = None
    first_alike: Tensor | None = None

    @classmethod
    def of_shapes(cls, clips: Sequence[ShapeClip]) -> RealClips:
        """Clips of moving shapes; without the second of the two."""
        captions = [clip.caption for clip in clips]
        is_open = all(clip.captions == "subjects" for clip in clips)
        return cls(
            torch.stack([clip.video for clip in clips]),
            torch.stack([clip.alone(0) for clip in clips]),
            torch.tensor([captions.index(caption) for caption in captions]) if is_open else None,
        )


class Encoded(NamedTuple):
    """Spoiled clips.

    Attributes:
        latents: ``[N, C, F, h, w]``.
        video: ``[N, 3, F', H, W]``, what they decode to.
    """

    latents: Tensor
    video: Tensor


@dataclass(frozen=True)
class Control:
    """One way to spoil clips.

    Attributes:
        title: What is done at the usual strength.
        strength_of: What the strength is.
        strength: The usual one.
        unspoiled: The strength that changes nothing.
        spoil: From clips, strength and codec to what is measured.
    """

    title: str
    strength_of: str
    strength: float
    unspoiled: float
    spoil: Callable[[RealClips, float, Codec], Encoded]


RENDERING = 1
"""Of the shapes that controls are made from."""


def controls_of_shapes(shapes: MovingShapes, codec: Codec) -> dict[str, Encoded]:
    """All controls at their usual strength, by name, of another rendering than the one that clips are compared with."""
    return make_controls(RealClips.of_shapes([shapes.render(i, RENDERING) for i in range(len(shapes))]), codec)


def make_controls(clips: RealClips, codec: Codec) -> dict[str, Encoded]:
    """All controls at their usual strength, by name; ``erased`` only where ``clips.without`` is there, and ``repeated``
    where ``clips.first_alike`` is."""
    absent = {ERASED: clips.without is None, REPEATED: clips.first_alike is None}
    return {
        name: control.spoil(clips, control.strength, codec)
        for name, control in CONTROLS.items()
        if not absent.get(name, False)
    }


def _add_noise(clips: RealClips, share: float, codec: Codec) -> Encoded:
    """A share of the latents' variance becomes Gaussian noise of unit variance."""
    latents = codec.encode(clips.video)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    # Twice through the codec: noise may lie outside what clips are encoded to.
    return _encode(codec.decode(math.sqrt(1 - share) * latents + math.sqrt(share) * noise), codec)


def _freeze(clips: RealClips, share: float, codec: Codec) -> Encoded:
    """The last share of the frames repeat the one before them; at 1, all are the first."""
    frames = clips.video.shape[2]
    last = round((1 - share) * (frames - 1))
    return _encode(clips.video[:, :, torch.arange(frames).clamp_max(last)], codec)


def _shuffle(clips: RealClips, share: float, codec: Codec) -> Encoded:
    """A share of the frames, drawn for each clip, change places among each other."""
    draws = torch.Generator().manual_seed(0)
    frames = clips.video.shape[2]
    order = torch.arange(frames).repeat(len(clips.video), 1)
    for row in order:
        chosen = torch.randperm(frames, generator=draws)[: round(share * frames)]
        row[chosen] = chosen.roll(1)
    return _encode(torch.stack([clip[:, own] for clip, own in zip(clips.video, order, strict=True)]), codec)


def _saturate(clips: RealClips, factor: float, codec: Codec) -> Encoded:
    """Each pixel's distance from the gray of the same brightness grows by a factor."""
    gray = clips.video.mean(dim=1, keepdim=True)
    return _encode((gray + factor * (clips.video - gray)).clamp(0, 1), codec)


def _erase(clips: RealClips, share: float, codec: Codec) -> Encoded:
    """In a share of the clips, one object is not there."""
    if clips.without is None:
        raise ValueError("clips without one of their objects are expected, got none. Use RealClips.of_shapes.")
    count = round(share * len(clips.video))
    return _encode(torch.cat([clips.without[:count], clips.video[count:]]), codec)


def _repeat(clips: RealClips, share: float, codec: Codec) -> Encoded:
    """In a share of the clips, each is the first one of its caption."""
    if clips.first_alike is None:
        raise ValueError("clips whose captions leave something open are expected, got others. Use captions='subjects'.")
    count = round(share * len(clips.video))
    return _encode(torch.cat([clips.video[clips.first_alike[:count]], clips.video[count:]]), codec)


def _blur(clips: RealClips, sigma: float, codec: Codec) -> Encoded:
    """Frames are smoothed by a Gaussian of that many pixels; 0.8 is about a box of 3 x 3 pixels."""
    if sigma == 0:
        return _encode(clips.video, codec)
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    kernel = kernel / kernel.sum()
    frames = clips.video.transpose(1, 2).flatten(0, 2).unsqueeze(1)  # [N F 3, 1, H, W]
    padded = F.pad(frames, (reach, reach, reach, reach), mode="replicate")
    smooth = F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return _encode(smooth.view_as(clips.video.transpose(1, 2)).transpose(1, 2), codec)


def _encode(video: Tensor, codec: Codec) -> Encoded:
    latents = codec.encode(video)
    return Encoded(latents, codec.decode(latents))


ERASED, REPEATED = "erased", "repeated"
OF_SHAPES = (ERASED, REPEATED)
"""Those that only clips of moving shapes have."""
CONTROLS: Mapping[str, Control] = {
    "noise": Control("white noise", "share of noise in the variance", 1.0, 0.0, _add_noise),
    "frozen": Control("a frozen real frame", "share of frames", 1.0, 0.0, _freeze),
    "shuffled": Control("real frames shuffled", "share of frames", 1.0, 0.0, _shuffle),
    "saturated": Control("real clips, saturation x 1.3", "factor", 1.3, 1.0, _saturate),
    ERASED: Control("real clips, one object erased", "share of clips", 1.0, 0.0, _erase),
    REPEATED: Control("one real clip for each caption", "share of clips", 1.0, 0.0, _repeat),
    "blurred": Control("real clips, blurred", "standard deviation, pixels", 0.8, 0.0, _blur),
}
"""Every control by its name."""
