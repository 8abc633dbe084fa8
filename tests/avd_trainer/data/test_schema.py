from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from avd_trainer.data.schema import SCHEMA, Encoding, Layout, check_alike
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.runtime.errors import UserError
from small_shards import DIM, LENGTH, SHAPE, latent_of, rewrite, text_of, write

WAN = Encoding("wan", "someone/a-pipeline", 16.0)


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


@pytest.mark.parametrize("encoding", [WAN, Encoding("wan", None, 12.5), Encoding("block-dct-4"), None])
def test_a_data_set_says_how_its_clips_became_latents(tmp_path: Path, encoding: Encoding | None) -> None:
    assert ShardDataset(write(tmp_path / "data", encoding=encoding)).encoding == encoding


def test_the_codec_stands_in_each_shard_for_other_programs(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", encoding=WAN)
    for path in folder.glob("*.parquet"):
        metadata = pq.read_schema(path).metadata
        found = [metadata[key] for key in (b"latent_space", b"codec", b"fps")]
        assert found == [b"wan", b"someone/a-pipeline", b"16.0"]


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
        (with_metadata(latent_space="ltx"), "latents of the space 'ltx', this release knows wan, block-dct-4"),
        (with_metadata(latent_space="wan", fps="fast"), "expected a positive number as fps .*, got 'fast'"),
        (with_metadata(latent_space="wan", fps="-1"), "expected a positive number as fps .*, got '-1'"),
        (
            replaced("caption", pa.field("words", pa.string())),
            "expected the column caption: string not null, found none of that name",
        ),
        (
            replaced("shape", pa.field("shape", pa.string())),
            "expected the column shape: list<.*int32>, found shape: string",
        ),
        (
            replaced("source", pa.field("source", pa.string())),
            "expected the column source: string not null, found source: string. Copy it",
        ),
        (with_metadata(text_length="6"), r"text embeddings of 6 tokens x 3, .*data-00000-of-00003.parquet of 5 x 3"),
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
    ("first", "other", "message"),
    [
        (
            WAN,
            Encoding("block-dct-4"),
            "is encoded by the tiny preset's block DCT; .* by Wan's VAE of someone/a-pipeline",
        ),
        (WAN, WAN._replace(fps=24.0), "clips of 24 frames per second, .* of 16: .* --fps 16"),
        # Two pipelines share a VAE, and what is not known is no difference.
        (WAN, WAN._replace(codec="someone/else"), None),
        (WAN, Encoding("wan"), None),
        (None, WAN, None),
        (WAN, None, None),
    ],
)
def test_what_is_read_together_has_one_codec(
    first: Encoding | None, other: Encoding | None, message: str | None
) -> None:
    layouts = [Layout(SHAPE, LENGTH, DIM, encoding) for encoding in (first, other)]
    if message is None:
        check_alike(layouts[0], "a", layouts[1], "b")
    else:
        with pytest.raises(UserError, match=f"^b .*{message}"):
            check_alike(layouts[0], "a", layouts[1], "b")
