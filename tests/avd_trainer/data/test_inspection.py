import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from avd_core import temporal_variance
from avd_trainer.data.examples import Example
from avd_trainer.data.inspection import DataReport, inspect
from avd_trainer.data.schema import Encoding
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.runtime.errors import UserError

SHAPE = (3, 4, 5, 6)
ENCODING = Encoding("wan", "someone/a-pipeline", 16.0)


def latents_of(rows: int) -> Tensor:
    """Channels of different mean and spread, around unit scale."""
    noise = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([0.5, 1.0, 1.5]).view(3, 1, 1, 1) + torch.tensor([-0.2, 0.0, 0.3]).view(3, 1, 1, 1)


def report_of(
    folder: Path,
    latents: Tensor | None,
    *,
    rows: int = 6,
    caption: Callable[[int], str] = lambda row: f"caption {row}",
    unconditional: bool = True,
    encoding: Encoding | None = ENCODING,
    read: int = 256,
) -> DataReport:
    encoding = None if latents is None else encoding
    with ShardWriter(folder, text_length=9, text_dim=2, encoding=encoding, rows_per_shard=4) as writer:
        for row in range(rows):
            latent = None if latents is None else latents[row]
            writer.add(latent, torch.zeros(row + 1, 2), caption(row), f"file {row // 2}")
        if unconditional:
            writer.set_unconditional(torch.zeros(1, 2), "blurred")
    return inspect(folder, read)


def test_counts_are_those_of_the_whole_data_set(tmp_path: Path) -> None:
    report = report_of(tmp_path / "data", latents_of(6).half(), read=2)
    assert (report.files, report.rows, report.measured) == (2, 6, 2)
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "data").glob("*.parquet"))
    assert (report.latent_shape, report.latent_dtypes) == (SHAPE, ("float16",))
    assert (report.text_length, report.text_dim, report.text_dtypes) == (9, 2, ("bfloat16",))
    assert (report.tokens_min, report.tokens_mean, report.tokens_max) == (1, 3.5, 6)
    assert (report.sources, report.empty_captions) == (3, 0)
    assert report.captions == ("caption 1", "caption 3", "caption 5")
    assert report.unconditional_prompt == "blurred"
    assert report.warnings == ()


def test_statistics_are_those_of_all_latents_at_once(tmp_path: Path) -> None:
    latents = latents_of(6)
    report = report_of(tmp_path / "data", latents)
    assert (report.measured, report.not_finite, report.standing_still) == (6, 0, 0)
    assert report.latent_mean == pytest.approx(float(latents.mean()), abs=1e-6)
    assert report.latent_std == pytest.approx(float(latents.std(correction=0)), rel=1e-5)
    assert report.channel_means == pytest.approx(latents.mean(dim=(0, 2, 3, 4)).tolist(), abs=1e-6)
    assert report.channel_stds == pytest.approx(latents.std(dim=(0, 2, 3, 4), correction=0).tolist(), rel=1e-5)
    assert report.temporal_loss == pytest.approx(-math.log(float(temporal_variance(latents))), rel=1e-5)


def test_sampled_rows_are_spread_and_no_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter(tmp_path / "data", text_length=1, text_dim=1) as writer:
        for row in range(60):
            writer.add(torch.full(SHAPE, float(row)), torch.zeros(1, 1), "", "")
    read: list[int] = []
    get = ShardDataset.__getitem__

    def note(dataset: ShardDataset, row: int) -> Example:
        read.append(row)
        return get(dataset, row)

    monkeypatch.setattr(ShardDataset, "__getitem__", note)
    report = inspect(tmp_path / "data", latents=4)
    assert read[:4] == [7, 22, 37, 52]
    assert len(read) == 4 + 3  # and a few captions
    assert report.latent_mean == pytest.approx((7 + 22 + 37 + 52) / 4)


def test_prompts_have_no_statistics(tmp_path: Path) -> None:
    report = report_of(tmp_path / "data", None)
    assert report.latent_shape is None
    assert (report.latent_mean, report.latent_std, report.channel_means, report.temporal_loss) == (None,) * 4
    assert (report.measured, report.latent_dtypes, report.warnings) == (0, (), ())


def test_latents_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    latents = latents_of(6)
    latents[1, 0, 0, 0, 0] = math.nan
    latents[4] = math.inf
    report = report_of(tmp_path / "data", latents)
    assert report.not_finite == 2
    assert report.latent_mean == pytest.approx(float(latents[[0, 2, 3, 5]].mean()), abs=1e-6)
    assert any("2 of 6 latents hold NaN" in warning for warning in report.warnings)
    report = report_of(tmp_path / "worse", torch.full((6, *SHAPE), math.nan))
    assert (report.latent_mean, report.channel_stds, report.temporal_loss) == (None,) * 3


@pytest.mark.parametrize(("scale", "warns"), [(0.3, True), (1.0, False), (2.3, True)])
def test_latents_that_are_not_normalised_are_told(tmp_path: Path, scale: float, warns: bool) -> None:
    report = report_of(tmp_path / "data", scale * latents_of(6))
    assert any("may not be normalised" in warning for warning in report.warnings) == warns
    tiny = report_of(tmp_path / "tiny", scale * latents_of(6), encoding=Encoding("block-dct-4"))
    assert tiny.warnings == ()


def test_the_codec_is_told_or_missed(tmp_path: Path) -> None:
    assert report_of(tmp_path / "data", latents_of(6)).encoding == ENCODING
    report = report_of(tmp_path / "old", latents_of(6), encoding=None)
    assert report.encoding is None
    assert any("does not say which codec" in warning for warning in report.warnings)


def test_clips_that_stand_still_are_told(tmp_path: Path) -> None:
    latents = latents_of(6)
    latents[1:3] = latents[1:3, :, :1] + 0.01 * latents[1:3]
    report = report_of(tmp_path / "data", latents)
    assert report.standing_still == 2
    assert any("2 of 6 clips stand still" in warning for warning in report.warnings)
    report = report_of(tmp_path / "frozen", latents[:, :, :1].expand_as(latents))
    assert (report.standing_still, report.temporal_loss) == (6, None)


def test_images_have_no_temporal_loss(tmp_path: Path) -> None:
    report = report_of(tmp_path / "data", latents_of(6)[:, :, :1])
    assert (report.temporal_loss, report.standing_still) == (None, 0)
    assert report.latent_mean is not None


def test_what_looks_wrong_with_captions_is_told(tmp_path: Path) -> None:
    report = report_of(
        tmp_path / "data", None, rows=9, caption=lambda row: " " if row == 2 else "x", unconditional=False
    )
    assert report.empty_captions == 1
    assert report.unconditional_prompt is None
    told = " ".join(report.warnings)
    assert "1 of 9 rows have an empty caption" in told
    assert "fill all 9 tokens" in told
    assert "avd data encode-prompts" in told


def test_damage_is_named(tmp_path: Path) -> None:
    report_of(tmp_path / "data", latents_of(6))
    (tmp_path / "data" / "data-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002.parquet is missing"):
        inspect(tmp_path / "data")
    with pytest.raises(ValueError, match="latents >= 1"):
        inspect(tmp_path / "data", 0)
