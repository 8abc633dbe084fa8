"""Videos that are cut and captioned already, encoded: the preparation of data with a recipe that hardly chooses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from avd_trainer.data.encode import ClipFormat
from avd_trainer.data.preparation.journal import Journal
from avd_trainer.data.preparation.needs import HUB_ID
from avd_trainer.data.preparation.prepare import DATA, RECIPE, Prepared, Workers, prepare
from avd_trainer.data.preparation.recipe import Recipe, load_recipe
from avd_trainer.data.preparation.selection import select
from avd_trainer.data.preparation.summary import LEFT_OUT, Advice, all_left_out, summarise
from avd_trainer.data.schema import UNCONDITIONAL, UNFINISHED
from avd_trainer.data.shard_writing import expect_no_shards, writable
from avd_trainer.models.codecs.latent_space import LatentSpace
from avd_trainer.models.pipeline_parts import TINY
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import write_json

WORK = f"encoding{UNFINISHED}"
"""Folder within that of the data set, with what is done already; removed when the shards are there."""
REMOVED = "encoding.removed"
"""The name under which it is removed: whatever a kill leaves of it is never taken for what can be gone on with."""
DETAIL = 0.4
"""A picture that was enlarged k times holds no less than this share, divided by k, of its size in detail; see the stage
``detail``."""
ADVICE = Advice(
    "--frames {}",
    "Choose other limits by --max-repeats and --max-enlargement, or another length of clips by --frames.",
)


def encode_recipe(
    model: str,
    clip_format: ClipFormat,
    *,
    negative_prompt: str | None = None,
    image: bool = False,
    max_repeats: float = 4.0,
    max_enlargement: float = 4.0,
) -> Recipe:
    """The bundled recipe ``encode`` for a model.

    Args:
        model: A Wan pipeline in diffusers' layout (folder or hub id), or ``tiny``.
        clip_format: Of all clips.
        negative_prompt: Embedded for the unconditional prediction of classifier-free guidance; None for the model's.
        image: Also encode each clip's first frame, for image to video.
        max_repeats: Clips that show each picture more often, in a row, are left out.
        max_enlargement: Clips whose pictures are enlarged more, by this or before, are left out.

    Raises:
        UserError: If the model cannot take the format.
    """
    frames, height, width, fps = clip_format
    space: LatentSpace = "block-dct-4" if model == TINY else "wan"
    clip_format.check(space)
    if min(max_repeats, max_enlargement) <= 0:
        raise UserError(
            f"--max-repeats and --max-enlargement must be above 0, got {max_repeats:g} and {max_enlargement:g}. A "
            "large number leaves nothing out."
        )
    values: dict[str, Any] = {
        "clip": {"frames": frames, "fps": fps},
        "framing": {"sizes": [[height, width]]},
        "enlargement": {"max": max_enlargement},
        "repeats": {"min": fps / max_repeats},
        "detail": {
            "short_side": max(16, min(height, width)),
            "min": DETAIL / max_enlargement,
        },
        "latents": {"model": model},
        "text": {"model": model, "negative_prompt": negative_prompt},
    }
    if image:
        values["first_frame"] = {"model": model}
    return load_recipe("encode", values)


def encode_videos(videos: Path, output: Path, recipe: Recipe, workers: Workers) -> Prepared:
    """Encode a folder of videos; the same call goes on where an earlier one stopped.

    Args:
        videos: Searched recursively.
        output: Folder of the new data set.
        recipe: That of :func:`encode_recipe`.
        workers: Who does it.

    Returns:
        What was written, and what was left out.

    Raises:
        UserError: If there is no video or none gave a clip, if the output holds a data set or cannot be written, or if
            the model cannot be loaded.
        StoppedError: On Ctrl-C.
    """
    work, removed = output / WORK, output / REMOVED
    shutil.rmtree(removed, ignore_errors=True)
    if not _is_moving(output, recipe):
        expect_no_shards(output)
        _fetch_weights(recipe)
        prepare(videos, work, recipe, workers, advice=ADVICE)
    with Journal(work) as journal:
        selection = select(journal, recipe, finished=True)
        summary = summarise(journal, recipe, selection, videos)
    with writable(output):
        write_json(output / LEFT_OUT, all_left_out(selection))
        for path in sorted((work / DATA).iterdir()):
            if path.suffix == ".parquet" or path.name == UNCONDITIONAL:
                path.replace(output / path.name)
        work.replace(removed)
        shutil.rmtree(removed)
    return Prepared(selection, summary, {output: summary.kept})


def _is_moving(output: Path, recipe: Recipe) -> bool:
    """Whether an earlier call with this recipe had written all shards, and was killed while it moved them."""
    whole, journal = output / WORK / DATA / RECIPE, Journal(output / WORK).path
    # Without the journal nobody knows what was left out, and an empty one would say that nothing was.
    there = any(output.glob("*.parquet")) and whole.is_file() and journal.is_file()
    return there and whole.read_text(encoding="utf-8") == recipe.to_yaml()


def _fetch_weights(recipe: Recipe) -> None:
    """Get weights from the hub that are not on this machine: here, and not in each of the processes."""
    from avd_trainer.data.encoders import fetch_encoders

    model = str(getattr(recipe.stages["latents"].settings, "model", TINY))
    lacking = any(
        chosen.stage(chosen.settings, recipe.head.clip).missing() is not None for chosen in recipe.stages.values()
    )
    if lacking and not Path(model).is_dir() and HUB_ID.fullmatch(model):
        fetch_encoders(model)
