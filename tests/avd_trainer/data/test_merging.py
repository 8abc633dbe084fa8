"""Several data sets as one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from avd_trainer.data.merging import merge
from avd_trainer.data.schema import UNCONDITIONAL, Encoding, ImageTokens
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.runtime.errors import UserError
from disks import disk_with_room_for
from small_shards import DIM, LENGTH, SHAPE, latent_of, text_of, write


def write_clips(folder: Path, *clips: tuple[str, int], image: ImageTokens | None = None, prompt: str = "grey") -> Path:
    """Rows with a provenance: file and start of each clip."""
    with ShardWriter(
        folder, text_length=LENGTH, text_dim=DIM, image=image, provenance=True, rows_per_shard=2
    ) as writer:
        writer.set_unconditional(torch.full((1, DIM), float(len(prompt))), prompt)
        for name, start in clips:
            said = json.dumps({"sha256": name * 8, "span": [start, start + 500]})
            first = {} if image is None else {"image_latent": torch.zeros(SHAPE)}
            # Of other numbers in each data set, as of another run of an encoder.
            latent = latent_of(len(name) + start + len(folder.name))
            writer.add(latent, text_of(1), name, f"{name} at {start}", provenance=said, **first)
    return folder


def sources_of(folder: Path) -> list[str]:
    return list(ShardDataset(folder).column("source"))


def test_rows_stand_in_the_order_of_the_folders_and_shards_are_links(tmp_path: Path) -> None:
    one, two = write_clips(tmp_path / "one", ("a", 0), ("a", 1), ("b", 0)), write_clips(tmp_path / "other", ("c", 0))
    done = merge([one, two], tmp_path / "both")
    assert (done.rows, done.twice, done.linked, done.copied) == (4, (), 3, 0)
    assert sources_of(tmp_path / "both") == ["a at 0", "a at 1", "b at 0", "c at 0"]
    merged, parts = ShardDataset(tmp_path / "both"), ShardDataset(one, two)
    for row in range(4):
        for found, expected in zip(merged[row][:2], parts[row][:2], strict=True):
            assert found is not None
            assert expected is not None
            assert torch.equal(found, expected)
    assert merged.unconditional_prompt() == "grey"
    assert merged.has_provenance
    inodes = {path.stat().st_ino for folder in (one, two) for path in folder.glob("*.parquet")}
    assert {path.stat().st_ino for path in (tmp_path / "both").glob("*.parquet")} == inodes


def test_a_clip_is_kept_once_and_named(tmp_path: Path) -> None:
    one = write_clips(tmp_path / "one", ("a", 0), ("a", 1), ("b", 0))
    two = write_clips(tmp_path / "other", ("a", 1), ("c", 0), ("b", 0), ("a", 0))
    done = merge([one, two], tmp_path / "both")
    assert sources_of(tmp_path / "both") == ["a at 0", "a at 1", "b at 0", "c at 0"]
    assert (done.rows, done.linked, done.copied) == (4, 2, 1)
    assert done.twice == tuple(f"{name} ({two}), as {name} ({one})" for name in ("a at 1", "b at 0", "a at 0"))
    copied = ShardDataset(tmp_path / "both")[3].latent
    assert copied is not None
    assert torch.equal(copied, ShardDataset(two)[1].latent)  # type: ignore[arg-type]


def test_without_provenance_equal_latents_are_one_clip(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", rows=4), write(tmp_path / "two", rows=6)
    done = merge([one, two], tmp_path / "both")
    assert sources_of(tmp_path / "both") == [f"file {row}" for row in range(6)]
    assert len(done.twice) == 4


def test_prompts_are_joined_by_what_they_say(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, rows=rows, dtype=None) for name, rows in (("one", 3), ("two", 5)))
    merge([one, two], tmp_path / "both")
    assert list(ShardDataset(tmp_path / "both").column("caption")) == [f"caption {row}" for row in range(5)]


def test_data_sets_on_another_disk_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    one, two = write_clips(tmp_path / "one", ("a", 0)), write_clips(tmp_path / "other", ("b", 0))
    done = merge([one, two], tmp_path / "both")
    assert (done.linked, done.copied) == (0, 2)
    assert sources_of(tmp_path / "both") == ["a at 0", "b at 0"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"encoding": Encoding("block-dct-4")}, "two.*is encoded by the tiny preset's block DCT"),
        ({"encoding": Encoding("wan", None, 8.0)}, "clips of 8 frames per second"),
        ({"text_dim": DIM + 1}, rf"text embeddings of {LENGTH} tokens x {DIM + 1}"),
        ({"shape": (2, 3, 4, 8)}, r"latents of shape \[2, 3, 4, 8\]"),
        ({"image": ImageTokens()}, "two has first frames, .*one has nothing of first frames.* --image-condition"),
        ({"prompt": "blue"}, "embed different negative prompts"),
    ],
)
def test_data_sets_that_are_not_alike_are_refused(tmp_path: Path, other: dict[str, object], message: str) -> None:
    usual = {
        "encoding": Encoding("wan", None, 16.0), "text_dim": DIM, "shape": SHAPE, "image": None, "prompt": "grey"
    }  # fmt: skip
    for name, values in (("one", usual), ("two", usual | other)):
        dim, image, prompt = (values[key] for key in ("text_dim", "image", "prompt"))
        with ShardWriter(
            tmp_path / name,
            text_length=LENGTH,
            text_dim=dim,
            encoding=values["encoding"],
            image=image,  # type: ignore[arg-type]
        ) as writer:
            writer.set_unconditional(torch.full((1, dim), float(prompt == "grey")), str(prompt))  # type: ignore[call-overload]
            latent = torch.zeros(values["shape"])  # type: ignore[call-overload]
            first = {} if image is None else {"image_latent": latent}
            writer.add(latent, torch.zeros(1, dim), "", name, **first)  # type: ignore[call-overload]
    with pytest.raises(UserError, match=message):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_mistakes_leave_no_data_set(tmp_path: Path) -> None:
    one, two = write_clips(tmp_path / "one", ("a", 0)), write_clips(tmp_path / "other", ("a", 0), ("b", 0))
    with pytest.raises(UserError, match="two data sets or more"):
        merge([one], tmp_path / "both")
    with pytest.raises(UserError, match="holds shards already"):
        merge([one, two], one)
    with disk_with_room_for(2000), pytest.raises(UserError, match="both cannot be written: "):
        merge([one, two], tmp_path / "both")
    assert not list((tmp_path / "both").iterdir())


def test_one_negative_prompt_is_enough(tmp_path: Path) -> None:
    one, two = write_clips(tmp_path / "one", ("a", 0)), write_clips(tmp_path / "other", ("b", 0))
    (one / UNCONDITIONAL).unlink()
    merge([one, two], tmp_path / "both")
    assert ShardDataset(tmp_path / "both").unconditional_prompt() == "grey"
