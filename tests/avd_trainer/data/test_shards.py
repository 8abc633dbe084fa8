import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from avd_trainer.data.order import ShuffledOrder
from avd_trainer.data.shards import SCHEMA, Example, ShardDataset, ShardWriter
from avd_trainer.runtime.errors import UserError
from helpers import disk_with_room_for

SHAPE = (2, 3, 4, 4)
LENGTH, DIM = 5, 3


def latent_of(row: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(row)).to(dtype)


def text_of(row: int) -> Tensor:
    return torch.randn(row % (LENGTH + 1), DIM, generator=torch.Generator().manual_seed(1000 + row))


def writer_of(folder: Path, rows_per_shard: int = 3) -> ShardWriter:
    return ShardWriter(folder, text_length=LENGTH, text_dim=DIM, rows_per_shard=rows_per_shard)


def write(folder: Path, rows: int = 8, rows_per_shard: int = 3, dtype: torch.dtype | None = torch.float32) -> Path:
    with writer_of(folder, rows_per_shard) as writer:
        for row in range(rows):
            latent = None if dtype is None else latent_of(row, dtype)
            writer.add(latent, text_of(row), f"caption {row}", f"file {row}")
    return folder


def as_list(samples: list[Example]) -> list[Example]:
    return samples


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], None], schema: pa.Schema | None = None) -> None:
    """Put a shard in another's place, as a program that knows less would write it."""
    schema = pq.read_schema(path) if schema is None else schema
    rows = pq.read_table(path).to_pylist()
    change(rows)
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    pq.write_table(pa.table(columns, schema=schema), path)


# --- What is written is read.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_come_back_in_order(tmp_path: Path, dtype: torch.dtype) -> None:
    dataset = ShardDataset(write(tmp_path / "data", rows=11, rows_per_shard=4, dtype=dtype))
    assert len(dataset) == 11
    assert (dataset.latent_shape, dataset.text_length, dataset.text_dim) == (SHAPE, LENGTH, DIM)
    assert dataset.has_latents
    for row in (0, 7, 10, 3, 2, 5, 6, 1, 9, 4, 8):
        latent, text, caption, source = dataset[row]
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


def test_files_are_as_documented(tmp_path: Path) -> None:
    """The schema is a promise to those who read the files with other programs."""
    folder = write(tmp_path / "data", dtype=torch.float16)
    names = [f"data-{index:05d}-of-00003.parquet" for index in range(3)]
    assert sorted(path.name for path in folder.iterdir()) == names
    schema = pq.read_schema(folder / names[0])
    assert schema.remove_metadata() == SCHEMA
    stored = {key: schema.metadata[key] for key in (b"avd_schema_version", b"text_length", b"text_dim")}
    assert stored == {b"avd_schema_version": b"1", b"text_length": b"5", b"text_dim": b"3"}
    row = pq.read_table(folder / names[1]).to_pylist()[1]
    assert row["latent"] == latent_of(4, torch.float16).numpy().tobytes()
    assert row["text_embedding"] == text_of(4).numpy().tobytes()
    del row["latent"], row["text_embedding"]
    assert row == {
        "shape": list(SHAPE),
        "dtype": "float16",
        "text_dtype": "float32",
        "text_tokens": 4,
        "caption": "caption 4",
        "source": "file 4",
    }


def test_big_columns_are_plain_and_row_groups_are_small(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data", text_length=LENGTH, text_dim=DIM) as writer:
        for row in range(10):
            writer.add(torch.zeros(16, 4, 64, 32), text_of(row), "", "")  # 512 KiB
    footer = pq.ParquetFile(tmp_path / "data" / "data-00000-of-00001.parquet").metadata
    assert [footer.row_group(group).num_rows for group in range(footer.num_row_groups)] == [2] * 5
    for number, name in enumerate(("latent", "text_embedding")):
        column = footer.row_group(0).column((0, 3)[number])
        assert column.path_in_schema == name
        assert column.compression == "UNCOMPRESSED"
        assert "DICTIONARY" not in " ".join(column.encodings)
        assert column.statistics is None


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


def test_text_is_stored_in_bfloat16_where_that_loses_nothing(tmp_path: Path) -> None:
    with writer_of(tmp_path / "data") as writer:
        writer.add(None, text_of(2).bfloat16().float(), "narrow", "")
        writer.add(None, text_of(2), "wide", "")
    assert list(ShardDataset(tmp_path / "data").column("text_dtype")) == ["bfloat16", "float32"]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same(tmp_path: Path, context: str) -> None:
    dataset = ShardDataset(write(tmp_path / "data"))
    assert dataset[0].caption == "caption 0"  # the parent has files open when the workers start
    loader = DataLoader(dataset, batch_size=3, num_workers=2, multiprocessing_context=context, collate_fn=as_list)
    read = [sample for batch in loader for sample in batch]
    assert [sample.caption for sample in read] == [f"caption {row}" for row in range(8)]
    for row, sample in enumerate(read):
        torch.testing.assert_close(sample.latent, latent_of(row), rtol=0, atol=0)


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


# --- Writing.


def test_a_folder_with_shards_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data")
    before = ShardDataset(tmp_path / "data").fingerprint()
    with pytest.raises(UserError, match="holds shards already"), writer_of(tmp_path / "data") as writer:
        writer.add(None, text_of(1), "", "")
    assert ShardDataset(tmp_path / "data").fingerprint() == before


def test_an_error_leaves_no_data_set(tmp_path: Path) -> None:
    def fail() -> None:
        with writer_of(tmp_path / "data") as writer:
            writer.set_unconditional(text_of(1), "")
            for row in range(8):
                writer.add(latent_of(row), text_of(row), "", "")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list((tmp_path / "data").iterdir()) == []
    write(tmp_path / "data")


def test_an_error_while_renaming_leaves_no_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "data"

    def fail() -> None:
        with writer_of(folder) as writer:
            for row in range(8):
                writer.add(None, text_of(row), "", "")
            (folder / "data-00001-of-00003.parquet").mkdir()  # what the second shard is to be called

    with pytest.raises(UserError, match="cannot be written"):
        fail()
    assert [path.name for path in folder.iterdir()] == ["data-00001-of-00003.parquet"]


def test_what_a_killed_writer_left_is_no_data_set_and_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    writer = writer_of(folder)
    writer.__enter__()
    for row in range(8):
        writer.add(None, text_of(row), "", "")
    with pytest.raises(UserError, match=r"holds no shards; data-0000.* was left by a command that did not finish"):
        ShardDataset(folder)
    write(folder, rows=1)
    assert [path.name for path in folder.iterdir()] == ["data-00000-of-00001.parquet"]


def test_nothing_added_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there was nothing to write"), writer_of(tmp_path / "data"):
        pass


def test_latents_of_two_shapes_are_an_error(tmp_path: Path) -> None:
    with writer_of(tmp_path / "data") as writer:
        writer.add(latent_of(0), text_of(0), "", "cat.mp4")
        with pytest.raises(UserError, match=r"dog.mp4: .*\[2, 3, 4, 4\].*\[2, 3, 4, 5\]"):
            writer.add(torch.zeros(2, 3, 4, 5), text_of(0), "", "dog.mp4")
        with pytest.raises(UserError, match=r"dog.mp4: .*\[2, 3, 4, 4\], this one has no latents"):
            writer.add(None, text_of(0), "", "dog.mp4")


@pytest.mark.parametrize(
    ("latent", "text"),
    [
        (torch.zeros(3, 4, 4), torch.zeros(1, DIM)),
        (torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(1, DIM)),
        (None, torch.zeros(LENGTH + 1, DIM)),
        (None, torch.zeros(1, DIM + 1)),
        (None, torch.zeros(1, 1, DIM)),
        (None, torch.zeros(1, DIM, dtype=torch.int64)),
    ],
)
def test_tensors_of_another_form_are_refused(tmp_path: Path, latent: Tensor | None, text: Tensor) -> None:
    with pytest.raises(ValueError, match="must be"), writer_of(tmp_path / "data") as writer:
        writer.add(latent, text, "", "")


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with disk_with_room_for(100_000), pytest.raises(UserError, match=f"{folder} cannot be written: .*Free some space"):
        write(folder, rows=2000, rows_per_shard=2000)
    assert list(folder.iterdir()) == []


def test_an_output_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(UserError, match=f"{folder} cannot be written"):
            write(folder)


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


def with_metadata(**changes: str | None) -> pa.Schema:
    values = {"avd_schema_version": "1", "text_length": str(LENGTH), "text_dim": str(DIM)} | changes
    return SCHEMA.with_metadata({key: value for key, value in values.items() if value is not None})


def replaced(name: str, field: pa.Field) -> pa.Schema:
    schema = with_metadata()
    return schema.set(schema.get_field_index(name), field)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (with_metadata(avd_schema_version=None), "no shard of training data"),
        (with_metadata(text_dim="wide"), "no shard of training data"),
        (with_metadata(avd_schema_version="2"), "version 2 of the schema, this release reads version 1"),
        (replaced("caption", pa.field("words", pa.string())), "expected a column .*caption.*, found None"),
        (replaced("shape", pa.field("shape", pa.string())), r"expected a column .*shape: list.*found .*string"),
        (replaced("source", pa.field("source", pa.string())), "expected a column .*source: string not null"),
        (with_metadata(text_length="6"), r"text embeddings of 6 tokens x 3, data-00000-of-00003.parquet of 5 x 3"),
    ],
)
def test_a_shard_of_another_schema_is_named(tmp_path: Path, schema: pa.Schema, message: str) -> None:
    folder = write(tmp_path / "data")

    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if schema.field("shape" if "shape" in schema.names else 0).type == pa.string():
                row["shape"] = "2 3 4 4"
            row["words"] = row["caption"]

    rewrite(folder / "data-00001-of-00003.parquet", change, schema)
    with pytest.raises(UserError, match=f"data-00001-of-00003.parquet.*{message}"):
        ShardDataset(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.clear(), "holds no rows"),
        (lambda rows: rows[1].update(shape=[2, 3, 4, 5]), r"row 0 has .*\[2, 3, 4, 4\], row 1 has .*\[2, 3, 4, 5\]"),
        (lambda rows: rows[1].update(shape=None), "row 1 has no latents"),
        (lambda rows: [row.update(shape=[3, 4, 4]) for row in rows], r"must have a shape \[C, F, H, W\]"),
        (lambda rows: [row.update(shape=[2, 3, 4, 6]) for row in rows], r"\[2, 3, 4, 6\], data-00000-of-00003.parquet"),
        (lambda rows: [row.update(shape=None) for row in rows], "has no latents, data-00000-of-00003.parquet has"),
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
    assert [entry["rows"] for entry in saved] == [3, 3, 2]


@pytest.mark.parametrize(
    ("rows", "rows_per_shard", "message"),
    [
        (6, 3, "data-00000-of-00002.parquet is not of the data"),
        (7, 3, "data-00002-of-00003.parquet has changed .* it had 2 rows .* now 1 rows"),
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
    saved = [*dataset.fingerprint(), {"file": "other-00000-of-00001.parquet", "rows": 1, "bytes": 1}]
    with pytest.raises(UserError, match=r"other-00000-of-00001.parquet is missing: the run to be resumed read it"):
        dataset.check_fingerprint(saved)


# --- Order.


@given(
    length=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    steps=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=12),
)
def test_within_an_epoch_each_index_comes_once(length: int, seed: int, steps: list[tuple[int, int]]) -> None:
    """Whatever the number of ranks and the batch size, also when they change in mid-epoch."""
    seen: list[int] = []
    for ranks, batch in steps:
        position = len(seen)
        for rank in range(ranks):
            seen += ShuffledOrder(length, seed).batch(position + rank * batch, batch)
    for start in range(0, len(seen) - length + 1, length):
        assert sorted(seen[start : start + length]) == list(range(length))
    rest = seen[len(seen) // length * length :]
    assert len(set(rest)) == len(rest)


def read_as(order: ShuffledOrder, positions: Sequence[int]) -> list[int]:
    return [order[position] for position in positions]


def test_an_order_has_no_memory() -> None:
    order = ShuffledOrder(7, 3)
    forwards = read_as(order, range(35))
    assert read_as(order, range(34, -1, -1)) == forwards[::-1]
    assert read_as(ShuffledOrder(7, 3), [20]) == [forwards[20]]
    assert order.batch(5, 20) == forwards[5:25]


def test_epochs_and_seeds_differ() -> None:
    epochs = [tuple(ShuffledOrder(50, seed).batch(50 * epoch, 50)) for seed in range(5) for epoch in range(5)]
    assert len(set(epochs)) == 25


def test_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A permutation of a large data set takes time: positions that go forth, and back by an epoch, share it."""
    drawn: list[int] = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: drawn.append(1) or randperm(*args, **kwargs))
    order = ShuffledOrder(10, 0)
    for position in (0, 5, 9, 12, 8, 19, 9, 10):
        order[position]
    assert len(drawn) == 2
    order.batch(20, 10)
    assert len(order._permutations) == 2


def test_positions_and_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match="length >= 1"):
        ShuffledOrder(0, 0)
    with pytest.raises(IndexError, match="start at 0"):
        ShuffledOrder(3, 0)[-1]
