from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.runtime.errors import UserError
from disks import disk_with_room_for
from small_shards import DIM, LENGTH, SHAPE, latent_of, text_of, write, writer_of


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


def test_text_is_stored_in_bfloat16_where_that_loses_nothing(tmp_path: Path) -> None:
    with writer_of(tmp_path / "data") as writer:
        writer.add(None, text_of(2).bfloat16().float(), "narrow", "")
        writer.add(None, text_of(2), "wide", "")
    assert list(ShardDataset(tmp_path / "data").column("text_dtype")) == ["bfloat16", "float32"]


def test_rows_say_where_they_are_from_if_the_writer_was_told_so(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "told", text_length=LENGTH, text_dim=DIM, provenance=True) as writer:
        writer.add(latent_of(1), text_of(1), "", "", provenance='{"file": "a.mp4"}')
        with pytest.raises(ValueError, match="Either all rows"):
            writer.add(latent_of(2), text_of(2), "", "")
    write(tmp_path / "untold")
    told, untold = ShardDataset(tmp_path / "told"), ShardDataset(tmp_path / "untold")
    assert list(told.column("provenance")) == ['{"file": "a.mp4"}']
    assert (told.has_provenance, untold.has_provenance) == (True, False)
    # Others can read it, and read it together with data that does not say it.
    joined = ShardDataset(tmp_path / "told", tmp_path / "untold")
    assert not joined.has_provenance
    torch.testing.assert_close(joined[0].latent, told[0].latent)


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
