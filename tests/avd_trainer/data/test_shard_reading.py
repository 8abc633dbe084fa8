import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from avd_trainer.data.examples import Example
from avd_trainer.data.schema import Encoding
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.runtime.errors import UserError
from small_shards import DIM, LENGTH, SHAPE, latent_of, rewrite, text_of, write, writer_of


def as_list(examples: list[Example]) -> list[Example]:
    return examples


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_come_back_in_order(tmp_path: Path, dtype: torch.dtype) -> None:
    dataset = ShardDataset(write(tmp_path / "data", rows=11, rows_per_shard=4, dtype=dtype))
    assert len(dataset) == 11
    assert (dataset.latent_shape, dataset.text_length, dataset.text_dim) == (SHAPE, LENGTH, DIM)
    assert dataset.has_latents
    for row in (0, 7, 10, 3, 2, 5, 6, 1, 9, 4, 8):
        latent, text, caption, source, *image = dataset[row]
        assert image == [None, None]
        assert latent is not None
        assert latent.dtype == text.dtype == torch.float32
        torch.testing.assert_close(latent, latent_of(row, dtype).float(), rtol=0, atol=0)
        used = row % (LENGTH + 1)
        torch.testing.assert_close(text[:used], text_of(row), rtol=0, atol=0)
        assert not text[used:].any()
        assert text.shape == (LENGTH, DIM)
        assert (caption, source) == (f"caption {row}", f"file {row}")


def test_prompts_have_no_latents(tmp_path: Path) -> None:
    dataset = ShardDataset(write(tmp_path / "data", dtype=None))
    assert dataset.latent_shape is None
    assert not dataset.has_latents
    assert dataset[4].latent is None
    assert dataset[4].caption == "caption 4"


def test_an_index_beyond_the_data_is_an_index_error(tmp_path: Path) -> None:
    dataset = ShardDataset(write(tmp_path / "data"))
    for index in (8, -1):
        with pytest.raises(IndexError, match="of a data set of 8 rows"):
            dataset[index]


def test_a_row_is_read_from_within_its_row_group(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data", text_length=LENGTH, text_dim=DIM, rows_per_shard=20) as writer:
        for row in range(9):
            writer.add(torch.full((16, 4, 64, 16), float(row)), text_of(row), str(row), "")  # 256 KiB: 4 to a group
    dataset = ShardDataset(tmp_path / "data")
    for row in range(9):
        latent = dataset[row].latent
        assert latent is not None
        assert (latent == row).all()
        assert dataset[row].caption == str(row)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same(tmp_path: Path, context: str) -> None:
    dataset = ShardDataset(write(tmp_path / "data"))
    assert dataset[0].caption == "caption 0"  # the parent has files open when the workers start
    loader = DataLoader(dataset, batch_size=3, num_workers=2, multiprocessing_context=context, collate_fn=as_list)
    read = [example for batch in loader for example in batch]
    assert [example.caption for example in read] == [f"caption {row}" for row in range(8)]
    for row, example in enumerate(read):
        torch.testing.assert_close(example.latent, latent_of(row), rtol=0, atol=0)


def test_a_copy_opens_files_of_its_own(tmp_path: Path) -> None:
    dataset = ShardDataset(write(tmp_path / "data"))
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[7].caption == dataset[7].caption


def test_a_column_is_read_over_all_shards(tmp_path: Path) -> None:
    assert list(ShardDataset(write(tmp_path / "data")).column("source")) == [f"file {row}" for row in range(8)]


# --- Unconditional text embedding.


def test_the_unconditional_embedding_belongs_to_the_data(tmp_path: Path) -> None:
    with writer_of(tmp_path / "data") as writer:
        writer.add(None, text_of(1), "", "")
        writer.set_unconditional(text_of(2), "blurred, static")
    dataset = ShardDataset(tmp_path / "data")
    assert dataset.has_unconditional
    assert dataset.unconditional_prompt() == "blurred, static"
    assert dataset.unconditional().shape == (LENGTH, DIM)
    torch.testing.assert_close(dataset.unconditional()[:2], text_of(2), rtol=0, atol=0)
    assert not dataset.unconditional()[2:].any()


def test_a_missing_or_foreign_unconditional_embedding_is_an_error(tmp_path: Path) -> None:
    dataset = ShardDataset(write(tmp_path / "data"))
    path = tmp_path / "data" / "unconditional.safetensors"
    assert not dataset.has_unconditional
    with pytest.raises(UserError, match=r"unconditional.safetensors is missing.*avd data encode-prompts"):
        dataset.unconditional()
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"unconditional.safetensors cannot be read"):
        dataset.unconditional()
    save_file({"text": torch.zeros(2, DIM)}, path)
    with pytest.raises(UserError, match=r"unconditional.safetensors cannot be read"):
        dataset.unconditional()
    save_file({"text_embedding": torch.zeros(2, DIM + 1)}, path)
    with pytest.raises(UserError, match=r"shape \[2, 4\], the data set has at most 5 tokens of width 3"):
        dataset.unconditional()


# --- Damage, named with its file.


def test_a_folder_without_shards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        ShardDataset(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no shards"):
        ShardDataset(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    (folder / "data-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00003.parquet is missing. Copy it again"):
        ShardDataset(folder)


def test_a_truncated_or_foreign_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    shard = folder / "data-00001-of-00003.parquet"
    whole = shard.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"", b"no Parquet at all"):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=r"data-00001-of-00003.parquet cannot be read"):
            ShardDataset(folder)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", rows=3)
    shard = folder / "data-00000-of-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[content.index(latent_of(1).numpy().tobytes()) + 10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"data-00000-of-00001.parquet cannot be read, it may be truncated or damaged"):
        ShardDataset(folder)[1]


def test_files_with_other_names_are_not_mixed_in(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    (folder / "more.parquet").touch()
    with pytest.raises(UserError, match=r"more.parquet is not named as a shard"):
        ShardDataset(folder)
    (folder / "more.parquet").rename(folder / "data-00000-of-00009.parquet")
    with pytest.raises(UserError, match="several data sets"):
        ShardDataset(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.clear(), "holds no rows"),
        (lambda rows: rows[1].update(shape=[2, 3, 4, 5]), r"row 0 has .*\[2, 3, 4, 4\], row 1 has .*\[2, 3, 4, 5\]"),
        (lambda rows: rows[1].update(shape=None), "row 1 has no latents"),
        (lambda rows: [row.update(shape=[3, 4, 4]) for row in rows], r"must have a shape \[C, F, H, W\]"),
        (
            lambda rows: [row.update(shape=[2, 3, 4, 6]) for row in rows],
            r"\[2, 3, 4, 6\], .*data-00000-of-00003",
        ),
        (lambda rows: [row.update(shape=None) for row in rows], "has no latents, .*data-00000-of-00003.parquet has"),
    ],
)
def test_shapes_that_disagree_are_found_on_opening(
    tmp_path: Path, change: Callable[[list[dict[str, Any]]], None], message: str
) -> None:
    folder = write(tmp_path / "data")
    rewrite(folder / "data-00001-of-00003.parquet", change)
    with pytest.raises(UserError, match=f"data-00001-of-00003.parquet.*{message}"):
        ShardDataset(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latent": b"short"}, "latent has 5 bytes, float32 of shape .* takes 384"),
        ({"latent": None}, "latent has 0 bytes"),
        ({"dtype": "float16"}, "latent has 384 bytes, float16 of shape .* takes 192"),
        ({"dtype": "int8"}, "latent has dtype 'int8', known are float32"),
        ({"dtype": None}, "latent has dtype None"),
        ({"text_tokens": 3}, "text_embedding has 48 bytes, float32 of shape .* takes 36"),
        ({"text_tokens": 6}, "expected 0 to 5 text tokens, got 6"),
        ({"text_tokens": -1}, "expected 0 to 5 text tokens, got -1"),
        ({"text_dtype": "float64"}, "text_embedding has dtype 'float64'"),
    ],
)
def test_a_damaged_row_is_named_with_its_file(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    folder = write(tmp_path / "data")
    rewrite(folder / "data-00001-of-00003.parquet", lambda rows: rows[1].update(values))
    dataset = ShardDataset(folder)
    assert dataset[3].caption == "caption 3"
    with pytest.raises(UserError, match=f"data-00001-of-00003.parquet, row 1: {message}"):
        dataset[4]


# --- Fingerprint.


def test_a_fingerprint_survives_json_and_moving(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    saved = json.loads(json.dumps(ShardDataset(folder).fingerprint()))
    folder = folder.rename(tmp_path / "moved")
    ShardDataset(folder).check_fingerprint(saved)
    assert [[entry["rows"] for entry in files] for files in saved] == [[3, 3, 2]]


@pytest.mark.parametrize(
    ("rows", "rows_per_shard", "message"),
    [
        (6, 3, "data-00000-of-00002.parquet is not of the data"),
        (7, 3, "data-00002-of-00003.parquet is not the file .* that had 2 rows .* this has 1 in"),
        (8, 8, "data-00000-of-00001.parquet is not of the data"),
    ],
)
def test_another_data_set_in_its_place_is_named(tmp_path: Path, rows: int, rows_per_shard: int, message: str) -> None:
    saved = ShardDataset(write(tmp_path / "data")).fingerprint()
    other = ShardDataset(write(tmp_path / "other", rows, rows_per_shard))
    with pytest.raises(UserError, match=message):
        other.check_fingerprint(saved)


def test_a_shard_that_the_run_read_and_is_gone_is_named(tmp_path: Path) -> None:
    dataset = ShardDataset(write(tmp_path / "data"))
    (files,) = dataset.fingerprint()
    saved = [[*files, {"file": "other-00000-of-00001.parquet", "rows": 1, "bytes": 1}]]
    with pytest.raises(UserError, match=r"other-00000-of-00001.parquet is missing: the run to be resumed read it"):
        dataset.check_fingerprint(saved)


# --- Several folders.


def test_folders_are_read_in_a_row(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, rows=rows) for name, rows in (("a", 4), ("b", 1), ("c", 7))]
    dataset = ShardDataset(*folders)
    captions = [f"caption {row}" for rows in (4, 1, 7) for row in range(rows)]
    assert len(dataset) == 12
    assert [dataset[row].caption for row in range(12)] == list(dataset.column("caption")) == captions
    torch.testing.assert_close(dataset[6].latent, latent_of(1), rtol=0, atol=0)
    assert pickle.loads(pickle.dumps(dataset))[11].caption == "caption 6"


def test_folders_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    folders = [write(tmp_path / "clips"), write(tmp_path / "prompts", dtype=None)]
    with pytest.raises(UserError, match=r"prompts/data-.* has no latents, .*clips/data-.* has latents of shape"):
        ShardDataset(*folders)


def test_folders_that_say_nothing_hide_no_difference(tmp_path: Path) -> None:
    encodings = (None, Encoding("wan"), Encoding("wan", "a/b", 16.0), Encoding("wan", "a/b", 8.0))
    old, imported, new, slow = (
        write(tmp_path / str(number), encoding=encoding) for number, encoding in enumerate(encodings)
    )
    assert ShardDataset(old, imported, new).encoding == encodings[2]
    with pytest.raises(UserError, match=f"{slow}/.* 8 frames per second, {new}/"):
        ShardDataset(old, imported, new, slow)


def test_each_folder_has_its_fingerprint(tmp_path: Path) -> None:
    first, second, third = (write(tmp_path / name, rows=rows) for name, rows in (("a", 4), ("b", 1), ("c", 2)))
    saved = json.loads(json.dumps(ShardDataset(first, second).fingerprint()))
    ShardDataset(first, second).check_fingerprint(saved)
    for folders, message in (
        ((first,), "read 2 data set.*, this one 1 .*Pass the same ones in the same order"),
        ((second, first), f"{second}/data-00000-of-00001.parquet is not of the data"),
        ((first, third), f"{third}/data-00000-of-00001.parquet is not the file"),
    ):
        with pytest.raises(UserError, match=message):
            ShardDataset(*folders).check_fingerprint(saved)


def test_one_negative_prompt_is_enough_and_two_are_too_many(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("none", "one", "same", "other")]
    for folder, row in zip(folders, (None, 2, 2, 3), strict=True):
        with writer_of(folder) as writer:
            writer.add(None, text_of(1), "", "")
            if row is not None:
                writer.set_unconditional(text_of(row), f"prompt {row}")
    dataset = ShardDataset(*folders[:3])
    assert dataset.has_unconditional
    assert dataset.unconditional_prompt() == "prompt 2"
    torch.testing.assert_close(dataset.unconditional()[:2], text_of(2), rtol=0, atol=0)
    with pytest.raises(UserError, match=r"other/uncond.* and .*one/uncond.* embed different negative prompts"):
        ShardDataset(*folders).unconditional()
