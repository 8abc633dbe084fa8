from pathlib import Path

import pytest
from avd_trainer.config.run import TeacherConfig

from avd_core import AVDConfig, MotionConfig
from avd_trainer.config.loading import ConfigError, load_config, presets, save_config
from avd_trainer.config.sections import ShapesData
from avd_trainer.data.sources import HELD_OUT
from avd_trainer.training.config import TrainConfig


@pytest.mark.parametrize("name", presets(TrainConfig))
def test_every_training_preset_is_valid(name: str) -> None:
    data = {} if name == "tiny" else {"data": {"kind": "shards", "path": "clips"}}
    assert load_config(TrainConfig, name, replace=data).max_steps > 0


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.1-14b"])
def test_the_wan_presets_have_the_papers_values(name: str) -> None:
    """Sec. 4.1 of You et al. 2026, and the released code where the paper is silent."""
    config = load_config(TrainConfig, name, replace={"data": {"kind": "shards", "path": "clips"}})
    assert config.teacher == f"Wan-AI/Wan2.1-T2V-{name.removeprefix('wan2.1-').upper()}-Diffusers"
    assert config.objective == AVDConfig(motion=MotionConfig(sync_ranks=False))
    assert (config.guidance_scale, config.matching_weight, config.online_updates) == (5, 1, 5)
    assert (config.batch_size, config.micro_batch_size, config.max_gradient_norm) == (24, 1, 10)
    assert (config.score_timesteps.shift, config.score_timesteps.low, config.score_timesteps.high) == (5, 20, 980)
    for optimizer in (config.student_optimizer, config.online_optimizer):
        assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (2e-6, (0.9, 0.999), 0.01)


def test_the_teacher_preset_does_not_train_on_what_the_demo_holds_out() -> None:
    teacher, student = load_config(TeacherConfig, "tiny"), load_config(TrainConfig, "tiny")
    assert isinstance(student.data, ShapesData)
    assert teacher.data.seed != student.data.seed
    assert max(teacher.data.seed, student.data.seed) < HELD_OUT


def test_defaults_are_the_papers() -> None:
    config = TrainConfig(teacher="x", data=ShapesData(), max_steps=1, batch_size=1)
    assert config.objective == AVDConfig.paper()
    assert (config.guidance_scale, config.online_updates, config.max_gradient_norm) == (5.0, 5, 10.0)
    assert (config.score_timesteps.shift, config.score_timesteps.low, config.score_timesteps.high) == (5, 20, 980)
    for optimizer in (config.student_optimizer, config.online_optimizer):
        assert (optimizer.lr, optimizer.betas) == (2e-6, (0.9, 0.999))


def test_overrides_reach_nested_fields() -> None:
    config = load_config(
        TrainConfig, "tiny", ["objective.regression.weight=0.25", "objective.motion=null", "student_optimizer.lr=3e-5"]
    )
    assert config.objective.regression is not None
    assert config.objective.regression.weight == 0.25
    assert config.objective.motion is None
    assert config.student_optimizer.lr == 3e-5


def test_a_saved_configuration_loads_as_the_same(tmp_path: Path) -> None:
    config = load_config(TrainConfig, "tiny", ["seed=7"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=0", r"batch_size: .*greater than or equal to 1, got 0"),
        ("objective.regression.sharpnes=3", r"objective\.regression\.sharpnes: there is no such field"),
        ("student_optimizer.lr=fast", r"student_optimizer\.lr: .*valid number.*got 'fast'"),
        ("data.clips=1", r"data\.clips: .*greater than or equal to 2, got 1"),
        ("data.kind=films", r"data: .*'films'"),
        ("objective.timesteps=[1000,1000]", r"objective: timesteps must be strictly"),
        ("objective.timesteps=[522,757,900]", r"objective\.timesteps must fall"),
        ("objective.motion.floor=.nan", r"objective\.motion\.floor: .*finite number"),
        ("objective.motion.frame_dim=1", r"objective\.motion\.frame_dim must be 2"),
        (
            "objective.regression={order: update_first, auto_update: false}",
            r"objective\.regression: order='update_first'",
        ),
        ("objective.regression.sync_ranks=false", r"objective\.regression\.sync_ranks .*must be true"),
        ("objective.balance.sync_ranks=false", r"objective\.balance\.sync_ranks must be true"),
        ("objective={regression: null, gradient_ratio: 1}", r"objective: gradient_ratio needs a regression"),
        ("score_timesteps.low=990", r"score_timesteps: low must be below high"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, "tiny", [override])


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)batch_size.*seed|seed.*batch_size"):
        load_config(TrainConfig, "tiny", ["batch_size=0", "seed=-1"])


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'huge' is neither a preset \(tiny, .*\) nor a YAML file"):
        load_config(TrainConfig, "huge")


@pytest.mark.parametrize("text", ["max_steps: [", "- a\n- list\n", "just words", ""])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(TrainConfig, str(path))
