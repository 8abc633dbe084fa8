"""Near duplicates: the same clip again, in another file, size or compression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from avd_trainer.data.preparation.frames import luma, spread
from avd_trainer.data.preparation.needs import package_missing
from avd_trainer.data.preparation.stage import ClipStage, Done, FrameRequest, Frames, Row, Score, StageSettings

SIDE, LOW = 32, 8
"""Pixels a side that a frame is shrunk to, and frequencies a side that are kept of it."""
# Clips that are compared with all kept ones at once: against 100,000 that takes some 100 MB.
BLOCK = 256


def frame_hashes(frames: Frames) -> list[int]:
    """A hash of 64 bits for each frame that hardly changes with size, compression and brightness.

    The luma is shrunk to 32 x 32 pixels; each bit says whether one of the 8 x 8 lowest frequencies of its cosine
    transform is above their median.

    Args:
        frames: ``[F, H, W, 3]`` uint8, RGB.
    """
    import cv2

    hashes = []
    for grey in luma(frames):
        small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
        low = cv2.dct(small)[:LOW, :LOW].ravel()
        hashes.append(sum(1 << place for place, bit in enumerate(low > np.median(low)) if bit))
    return hashes


def near_duplicates(hashes: Mapping[str, Sequence[int]], distance: float, rank: Mapping[str, float]) -> dict[str, str]:
    """Clips that another one stands for.

    Clips are gone through from the best to the worst; a clip is kept unless it is near one that was kept before it.
    So what is kept depends on the clips alone, never on the order that they come in.

    Every clip is compared with every kept one: 10,000 clips take seconds, 100,000 minutes. A clip that begins half a
    second later in another file shows other frames, and is not found.

    Args:
        hashes: :func:`frame_hashes` of each clip by its id, equally many.
        distance: Bits of 64 that hashes of corresponding frames differ by, on average over the frames and at most, for
            clips to be near. Unrelated clips differ by about 32.
        rank: The higher, the better the clip; of equal ones the lesser id is the better.

    Returns:
        For each clip that is not kept, the one that is.
    """
    order = sorted(hashes, key=lambda clip: (-rank[clip], clip))
    counts = {len(hashes[clip]) for clip in order}
    if len(counts) > 1:
        raise ValueError(f"Clips need equally many hashes to be compared, got {sorted(counts)} of them.")
    table = np.array([hashes[clip] for clip in order], dtype=np.uint64)
    kept: list[int] = []
    stands_for: dict[str, str] = {}
    for start in range(0, len(order), BLOCK):
        block = table[start : start + BLOCK]
        most = distance * block.shape[1]
        near_kept = _distances(block, table[kept]) <= most
        near_block = _distances(block, block) <= most
        new: list[int] = []
        for row, clip in enumerate(order[start : start + BLOCK]):
            near = [kept[place] for place in np.flatnonzero(near_kept[row])[:1]]
            near += [start + other for other in new if near_block[row, other]]
            if near:
                stands_for[clip] = order[near[0]]
            else:
                new.append(row)
        kept += [start + row for row in new]
    return stands_for


def _distances(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """``[A, B]`` bits by which ``[A, F]`` and ``[B, F]`` differ, summed over the frames."""
    total = np.zeros((len(one), len(other)), np.uint16)
    for frame in range(one.shape[1]):
        total += np.bitwise_count(one[:, None, frame] ^ other[None, :, frame])
    return total


class DuplicatesSettings(StageSettings):
    """Of near duplicates. The paper has no such step."""

    DECIDES = StageSettings.DECIDES | {"distance"}

    frames: int = Field(default=8, ge=1)
    """Frames of a clip that are hashed, evenly spread."""
    distance: float | None = Field(default=6.0, ge=0, le=64)
    """Bits of 64 that hashes of corresponding frames differ by, on average and at most, for two clips to be one; None
    keeps all."""

    def reject(self, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        if self.distance is None:
            return {}
        hashes = {clip: [int(digits, 16) for digits in score["frames"]] for clip, score in scores.items()}
        rank = {clip: float(score["pixels"]) for clip, score in scores.items()}
        found = near_duplicates(hashes, self.distance, rank)
        return {clip: f"nearly the same as clip {other}" for clip, other in found.items()}


class Duplicates(ClipStage[DuplicatesSettings]):
    """Hashes by which near duplicates are found. Of these, the one from the largest picture is kept."""

    name = "duplicates"
    Settings = DuplicatesSettings
    reads = ("probe",)
    score = Score("hashes", "hashes of its frames, 64 bits each, and pixels of a frame of the file")

    def missing(self) -> str | None:
        return package_missing(self.name, "cv2", "prepare")

    def frames(self, row: Row) -> FrameRequest:
        return FrameRequest(spread(self.clip.frames, self.settings.frames), short_side=64)

    def run(self, row: Row, frames: Frames) -> Done:
        probed = row.results["probe"]
        digits = [f"{value:016x}" for value in frame_hashes(frames)]
        return Done({"hashes": {"frames": digits, "pixels": probed["width"] * probed["height"]}})


STAGE = Duplicates
