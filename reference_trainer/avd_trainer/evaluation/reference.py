"""What real clips score, and how much that varies: what generated clips are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.evaluation.controls import Encoded
from avd_trainer.evaluation.measures import ALL_MEASURES, headlines, measure
from avd_trainer.models.codecs.block_dct import BlockDCTCodec

SETS = 20
# Outside the spread: so many standard deviations off, and by so much of the mean. The latter is for shares that are 1
# in nearly every rendering.
LIMIT_STDS = 4.0
LIMIT_SHARE = 0.01


@dataclass(frozen=True)
class Spread:
    """One measure over sets of real clips.

    Attributes:
        mean: Over the sets.
        std: Sample standard deviation over the sets.
        low: The 2.5% quantile, interpolated.
        high: The 97.5% quantile, interpolated.
    """

    mean: float
    std: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """How far from the mean counts as outside: 4 standard deviations, or 1% of the mean where that is more."""
        return max(LIMIT_STDS * self.std, LIMIT_SHARE * abs(self.mean))

    @property
    def decimals(self) -> int:
        """How many a difference to real clips is told with: one more where their sets scatter by less than 0.001."""
        return 4 if 0 < self.std < 0.001 else 3


@dataclass(frozen=True)
class Reference:
    """Real clips to compare with.

    Attributes:
        spreads: By name of the measure, in the order of ``ALL_MEASURES``.
        sets: How many sets of clips were measured.
        clips: How many clips each of them has. Fewer clips spread more, so compare sets of as many.
        real: Real clips to compare generated ones with; see :func:`score`.
    """

    spreads: Mapping[str, Spread]
    sets: int
    clips: int
    real: Encoded


def reference_of_shapes(
    shapes: MovingShapes,
    codec: BlockDCTCodec,
    *,
    sets: int = SETS,
    images: bool = False,
    on_set: Callable[[], None] = lambda: None,
) -> Reference:
    """Render the same captions again and again, and measure each rendering as if a model had made it.

    Clips go through the codec once. Each rendering is compared with the next one as its real clips, the last one with
    the first; generated clips are to be compared with the first.

    Args:
        shapes: Whose captions; held-out ones, where trained models are compared.
        codec: Encodes and decodes.
        sets: How many renderings; at least 3.
        images: Whether they are compared with clips of image to video: a clip's image is then its own first frame.
        on_set: Called after each.

    Raises:
        ValueError: If there are fewer renderings, or a single clip.
    """
    _check_sets(sets)
    captions = [shapes[index].caption for index in range(len(shapes))]
    first = own = encode_rendering(shapes, 0, codec)
    scores = []
    for rendering in range(1, sets + 1):
        following = encode_rendering(shapes, rendering, codec) if rendering < sets else first
        scores.append(measure(*own, captions, following, own.video[:, :, 0] if images else None))
        own = following
        on_set()
    return Reference(_spreads(scores), sets, len(shapes), first)


def reference_of_clips(latents: Tensor, decode: Callable[[Tensor], Tensor], *, sets: int = SETS) -> Reference:
    """Split real clips at random, and measure each half as if a model had made it.

    For clips that exist once: nobody can render them again. A half is compared with the other half as its real clips.
    It has half as many clips as ``latents``, so the spread is wider than that of sets of ``len(latents)`` clips, and
    :func:`score` compares generated clips in sets of as many. Of an odd number, one is left out.

    Args:
        latents: ``[N, C, F, h, w]``, at least 4 clips.
        decode: From latents to video.
        sets: How many halves; at least 3.

    Raises:
        ValueError: If there are fewer halves or clips.
    """
    _check_sets(sets)
    if len(latents) < 4:
        raise ValueError(f"at least 4 real clips are expected, so that halves can be compared, got {len(latents)}.")
    video, half = decode(latents), len(latents) // 2
    draws = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(sets):
        order = torch.randperm(len(latents), generator=draws)
        own, other = order[:half], order[half : 2 * half]
        scores.append(measure(latents[own], video[own], None, Encoded(latents[other], video[other])))
    return Reference(_spreads(scores), sets, half, Encoded(latents[: 2 * half], video[: 2 * half]))


def score(clips: Encoded, captions: Sequence[str] | None, reference: Reference) -> dict[str, float]:
    """Measure generated clips as the reference's sets were measured.

    Captioned clips are compared with the real clips of their captions. Others are parted into sets of as many clips as
    the reference's (what is left over does not count), and measures are means over the sets: the first set is compared
    with the second half of the real clips, the second with the first, and so on. So clips that were made from the real
    ones, in their order, never meet themselves.

    Args:
        clips: Of the reference's captions, where there are any.
        captions: Of the clips, where they are of moving shapes.
        reference: Whose halves are alike where there are no captions: its clips are in random order.
    """
    if captions is not None:
        return measure(*clips, captions, reference.real)
    size = min(reference.clips, len(clips.latents))
    scores = []
    for number in range(len(clips.latents) // size):
        part = slice(number * size, (number + 1) * size)
        other = slice(reference.clips, None) if number % 2 == 0 else slice(reference.clips)
        real = Encoded(*(each[other] for each in reference.real))
        scores.append(measure(clips.latents[part], clips.video[part], None, real))
    return {name: fmean(each[name] for each in scores) for name in scores[0]}


def caught(values: Mapping[str, float], reference: Reference) -> list[str]:
    """The headline measures by which some clips are worse than real ones.

    A value counts where it lies farther from the reference's mean than :attr:`Spread.margin`, on the bad side: below
    where higher is better, above where lower is, on either side where real clips are the goal.

    Args:
        values: What :func:`score` returned of the clips.
        reference: What it compared them with.
    """
    return [name for name in headlines(values) if is_worse(name, values[name], reference.spreads[name])]


def is_worse(name: str, value: float, spread: Spread) -> bool:
    """Whether a value of a measure is worse than real clips', by the rule of :func:`caught`."""
    return ALL_MEASURES[name].distance(value, spread.mean) > spread.margin


def encode_rendering(shapes: MovingShapes, rendering: int, codec: BlockDCTCodec) -> Encoded:
    """One rendering of all captions, through the codec."""
    latents = codec.encode(torch.stack([shapes.render(index, rendering).video for index in range(len(shapes))]))
    return Encoded(latents, codec.decode(latents))


def _check_sets(sets: int) -> None:
    if sets < 3:
        raise ValueError(f"at least 3 sets are expected, so that their spread is known, got {sets}. Use 20.")


def spread_of(values: Sequence[float]) -> Spread:
    """Of the values of several sets of real clips."""
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return Spread(fmean(values), stdev(values), low, high)


def _spreads(scores: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    return {name: spread_of([score[name] for score in scores]) for name in scores[0]}
