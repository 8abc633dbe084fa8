import logging
import os
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

from avd_trainer.data.encode import HashTextEncoder
from avd_trainer.data.lmdb_import import count_rows, import_lmdb
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.runtime.errors import UserError

TEXT = HashTextEncoder(6, 4)
FRAMES, CHANNELS, HEIGHT, WIDTH = 3, 2, 4, 5


def latents_of(rows: int, steps: int | None = None) -> np.ndarray:
    shape = (FRAMES, CHANNELS, HEIGHT, WIDTH) if steps is None else (steps, FRAMES, CHANNELS, HEIGHT, WIDTH)
    return np.random.default_rng(rows).standard_normal((rows, *shape)).astype(np.float16)


def write_lmdb(path: Path, latents: np.ndarray, shape: str | None = "", first: int = 0) -> Path:
    """As the scripts of CausVid and Self-Forcing write it: raw rows, UTF-8 prompts, the shape as text."""
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for row, latent in enumerate(latents):
            transaction.put(f"latents_{row}_data".encode(), latent.tobytes())
            transaction.put(f"prompts_{row}_data".encode(), f"a café, number {first + row}".encode())
        if shape is not None:
            stored = shape or " ".join(map(str, latents.shape))
            transaction.put(b"latents_shape", stored.encode())
    (path / "lock.mdb").unlink()
    return path


def convert(path: Path, output: Path, width: int | None = None) -> ShardDataset:
    import_lmdb(path, output, text=TEXT, negative_prompt="static", width=width)
    return ShardDataset(output)


def test_frames_and_channels_change_places(tmp_path: Path) -> None:
    latents = latents_of(11)
    dataset = convert(write_lmdb(tmp_path / "lmdb", latents), tmp_path / "data")
    assert len(dataset) == count_rows(tmp_path / "lmdb") == 11
    assert dataset.latent_shape == (CHANNELS, FRAMES, HEIGHT, WIDTH)
    assert set(dataset.column("dtype")) == {"float16"}
    for row in range(11):
        latent, text, caption, source, *_ = dataset[row]
        assert latent is not None
        for frame in range(FRAMES):
            for channel in range(CHANNELS):
                assert latent[channel, frame].tolist() == latents[row, frame, channel].tolist()
        assert caption == f"a café, number {row}"
        torch.testing.assert_close(text[:4], TEXT([caption])[0])
        assert source == f"lmdb/{row}"
    torch.testing.assert_close(dataset.unconditional()[:1], TEXT(["static"])[0])
    assert dataset.unconditional_prompt() == "static"


def test_the_clean_end_of_a_trajectory_is_taken(tmp_path: Path) -> None:
    latents = latents_of(2, steps=5)
    latent = convert(write_lmdb(tmp_path / "lmdb", latents), tmp_path / "data")[1].latent
    assert latent is not None
    assert latent.transpose(0, 1).tolist() == latents[1, -1].tolist()


def test_a_sharded_lmdb_is_one_data_set(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "all" / "shard_0", latents_of(2))
    write_lmdb(tmp_path / "all" / "shard_1", latents_of(3), first=2)
    dataset = convert(tmp_path / "all", tmp_path / "data")
    assert count_rows(tmp_path / "all") == 5
    assert [dataset[row].caption[-1] for row in range(5)] == ["0", "1", "2", "3", "4"]
    assert list(dataset.column("source")) == ["shard_0/0", "shard_0/1", "shard_1/0", "shard_1/1", "shard_1/2"]


def test_a_database_in_a_file_of_its_own_is_read(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "lmdb", latents_of(2))
    assert count_rows(tmp_path / "lmdb" / "data.mdb") == 2


def test_columns_can_be_cut_as_the_released_code_does(tmp_path: Path) -> None:
    latents = latents_of(1)
    latent = convert(write_lmdb(tmp_path / "lmdb", latents), tmp_path / "data", width=4)[0].latent
    assert latent is not None
    assert latent.transpose(0, 1).tolist() == latents[0][..., :4].tolist()


def test_nothing_is_written_beside_the_lmdb(tmp_path: Path) -> None:
    source = write_lmdb(tmp_path / "lmdb", latents_of(1))
    before = (source / "data.mdb").read_bytes()
    convert(source, tmp_path / "data")
    assert [path.name for path in source.iterdir()] == ["data.mdb"]
    assert (source / "data.mdb").read_bytes() == before


def test_a_row_that_is_not_finite_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    latents = latents_of(3)
    latents[1, 0, 0, 0, 0] = np.inf
    with caplog.at_level(logging.WARNING):
        dataset = convert(write_lmdb(tmp_path / "lmdb", latents), tmp_path / "data")
    assert list(dataset.column("source")) == ["lmdb/0", "lmdb/2"]
    assert "Left out row 1" in caplog.text


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_an_error(tmp_path: Path, share: float) -> None:
    """A read behind the end of a mapped file would kill the process."""
    data = write_lmdb(tmp_path / "lmdb", latents_of(40)) / "data.mdb"
    os.truncate(data, int(share * data.stat().st_size))
    with pytest.raises(UserError, match=r"(is truncated|cannot be read as LMDB).*Copy it again"):
        convert(tmp_path / "lmdb", tmp_path / "data")


def test_a_foreign_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"no database" * 5000)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read as LMDB"):
        count_rows(tmp_path)
    with pytest.raises(UserError, match=r"is no LMDB: expected a folder with data.mdb"):
        count_rows(tmp_path / "missing")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, "no key latents_shape"),
        ("4", "latents_shape should be 'N F C H W' or 'N S F C H W', got '4'"),
        ("2 3 2 0 5", "latents_shape should be"),
        ("2 3 2 x 5", "latents_shape should be"),
        ("3 3 2 4 5", "no key prompts_2_data"),
        ("2 3 2 4 6", r"latents_0_data has 240 bytes, float16 of shape \[3, 2, 4, 6\] takes 288"),
    ],
)
def test_a_foreign_layout_is_an_error_that_leaves_nothing(tmp_path: Path, shape: str | None, message: str) -> None:
    source = write_lmdb(tmp_path / "lmdb", latents_of(2), shape)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "data")
    assert not list((tmp_path / "data").glob("*"))


def test_parts_of_two_shapes_are_an_error(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "all" / "a", latents_of(1))
    write_lmdb(tmp_path / "all" / "b", latents_of(1)[..., :4])
    with pytest.raises(UserError, match="b/0: all rows of a data set have the same latent shape"):
        convert(tmp_path / "all", tmp_path / "data")


def test_without_the_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lmdb(tmp_path / "lmdb", latents_of(1))
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match=r'pip install "avd-core\[lmdb\]"'):
        count_rows(source)
