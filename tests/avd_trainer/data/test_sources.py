import json
from pathlib import Path

import pytest
import torch

from avd_trainer.config.sections import DataSection, ShapesData, ShardsData
from avd_trainer.data.moving_shapes import Scene, is_held_out
from avd_trainer.data.schema import Encoding
from avd_trainer.data.shard_writing import ShardWriter
from avd_trainer.data.sources import TrainingData, assumed_encoding, held_out_shapes, load_clips, load_data
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.codecs.latent_space import latent_space_of
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.run import train
from runs import order_of, tiny_config

BUNDLED = "bundled:tiny"


def write(folder: Path, *, channels: int = 16, text_dim: int = 6, encoding: Encoding | None = None) -> ShardsData:
    """Two clips that move; without channels two prompts."""
    with ShardWriter(folder, text_length=4, text_dim=text_dim, encoding=encoding) as writer:
        for row in range(2):
            latent = row + torch.arange(3.0).reshape(1, 3, 1, 1).expand(channels, 3, 4, 4) if channels else None
            writer.add(latent, torch.zeros(1, text_dim), f"{folder.name} {row}", "")
        writer.set_unconditional(torch.zeros(1, text_dim), "")
    return ShardsData(path=(folder,))


def load(data: DataSection, prompts: ShardsData | None = None, teacher: str = "someone/else") -> TrainingData:
    return load_data(data, prompts, teacher=teacher, architecture={"text_dim": 6, "in_channels": 16})


@pytest.fixture
def wan(tmp_path: Path) -> str:
    """As much of a pipeline as says whose latents its transformer makes."""
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    return str(tmp_path / "pipeline")


def test_a_section_takes_one_folder_or_several() -> None:
    assert ShardsData.model_validate({"path": "a"}).path == (Path("a"),)
    assert ShardsData.model_validate({"path": ["a", "b"]}).path == (Path("a"), Path("b"))
    with pytest.raises(ValueError, match="at least 1 item"):
        ShardsData.model_validate({"path": []})


def test_several_data_sets_of_clips_and_of_prompts_are_joined(tmp_path: Path) -> None:
    clips, prompts = (
        ShardsData(path=tuple(write(tmp_path / f"{kind}{n}", channels=channels).path[0] for n in range(2)))
        for kind, channels in (("clips", 16), ("prompts", 0))
    )
    data = load(clips, prompts)
    assert [data.clips[row].caption for row in range(4)] == ["clips0 0", "clips0 1", "clips1 0", "clips1 1"]
    assert [data.prompts[row].caption for row in (1, 2)] == ["prompts0 1", "prompts1 0"]
    assert data.fingerprint is not None
    assert [len(data.fingerprint[name]) for name in ("data", "prompts")] == [2, 2]


def test_held_out_clips_are_the_last_of_all_data_sets(tmp_path: Path) -> None:
    section = ShardsData(path=tuple(write(tmp_path / f"clips{n}").path[0] for n in range(3)))
    data = load_data(section, None, teacher=None, architecture={"text_dim": 6, "in_channels": 16}, held_out=3)
    assert [data.clips[row].caption for row in range(len(data.clips))] == ["clips0 0", "clips0 1", "clips1 0"]
    assert data.held_out is not None
    held_out = [data.held_out[row].caption for row in range(len(data.held_out))]
    assert held_out == ["clips1 1", "clips2 0", "clips2 1"]


def test_a_run_over_several_data_sets_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, teacher_folder: Path, ranks: Ranks
) -> None:
    section = ShardsData(path=tuple(write(tmp_path / f"clips{n}").path[0] for n in range(3)), workers=0)
    config = tiny_config(teacher_folder, "dmd", data=section.model_dump(), checkpoint={"every": 1}, max_steps=4)

    def losses(folder: Path) -> list[float]:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    train(config, tmp_path / "whole", ranks)
    train(config.model_copy(update={"max_steps": 1}), tmp_path / "again", ranks)
    train(config, tmp_path / "again", ranks)
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    # One permutation of all, and not one data set after another.
    order = order_of("clips", 6)
    assert sorted(order[place] // 2 for place in range(6)) == [0, 0, 1, 1, 2, 2]
    assert [order[place] // 2 for place in range(6)] != [0, 0, 1, 1, 2, 2]


def test_data_that_does_not_fit_the_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data has text embeddings of width 5, the teacher expects 6"):
        load(write(tmp_path / "narrow", text_dim=5))
    with pytest.raises(UserError, match="prompts has text embeddings of width 7"):
        load(write(tmp_path / "data"), write(tmp_path / "prompts", text_dim=7))
    with pytest.raises(UserError, match="data has 8 latent channels, the teacher expects 16"):
        load(write(tmp_path / "few", channels=8))
    with pytest.raises(UserError, match=r"none holds prompts only"):
        load(write(tmp_path / "none", channels=0))


def test_whose_latents_a_teacher_makes_is_known_by_what_lies_beside_it(wan: str, tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "Wan2.1_VAE.pth").touch()
    assert latent_space_of(BUNDLED) == "block-dct-4"
    assert latent_space_of(wan) == latent_space_of(str(tmp_path / "original")) == "wan"
    assert latent_space_of("someone/else") is None
    assert latent_space_of(str(tmp_path)) is None


def test_latents_of_another_space_are_refused_where_that_is_known(tmp_path: Path, wan: str) -> None:
    tiny = write(tmp_path / "tiny", encoding=Encoding("block-dct-4"))
    for data in (tiny, ShapesData(clips=2)):
        with pytest.raises(UserError, match=r"block DCT, and the teacher .*Wan's VAE.*--model TEACHER"):
            load(data, teacher=wan)
    assert load(tiny).encoding == load(tiny, teacher=BUNDLED).encoding == Encoding("block-dct-4")
    assert load(write(tmp_path / "old"), teacher=wan).encoding is None


def test_data_that_does_not_say_it_is_taken_for_the_teachers(wan: str) -> None:
    shards = ShardsData(path=(Path("data"),))
    for teacher, space in ((BUNDLED, "block-dct-4"), (wan, "wan"), ("someone/else", "wan")):
        assert assumed_encoding(shards, teacher).latent_space == space
        assert assumed_encoding(ShapesData(), teacher).latent_space == "block-dct-4"


def test_another_caption_seed_has_other_held_out_captions() -> None:
    config = ShapesData(seed=4)
    one, other = (held_out_shapes(config, 64, seed) for seed in (0, 1))
    assert all(is_held_out(each[0].caption) for each in (one, other))
    captions = [{shapes[index].caption for index in range(64)} for shapes in (one, other)]
    assert len(captions[0] & captions[1]) < 8
    # Nor are they those of another data seed.
    assert other.seed != held_out_shapes(ShapesData(seed=5), 64).seed


def test_captions_of_the_subjects_alone_are_those_of_both_sides() -> None:
    config = ShapesData(clips=4, held_out=4, captions="subjects")
    for part in load_clips(config, BlockDCTCodec()):
        assert all(Scene.from_subjects(caption) is not None for caption in part.captions)
