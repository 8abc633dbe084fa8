import math
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from avd_core import AVDConfig, AVDObjective, BalanceConfig, MotionConfig, RegressionConfig

PAPER = {
    "timesteps": (1000, 900, 757, 522),
    "regression": {
        "weight": 2.0,
        "sharpness": 3.0,
        "deviation": "absolute",
        "judged": "loss",
        "decay": 0.95,
        "order": "weight_first",
        "auto_update": True,
        "sync_ranks": True,
    },
    "motion": {"weight": 0.05, "floor": 0.6, "eps": 1e-6, "frame_dim": 2, "channels": None, "sync_ranks": True},
    "gradient_ratio": None,
    "balance": {"decay": 0.9, "sync_ranks": True},
}


def test_the_defaults_are_the_papers() -> None:
    assert AVDConfig().model_dump() == PAPER
    assert AVDConfig.paper() == AVDConfig()


def test_the_released_code_departs_in_four_values() -> None:
    expected = {
        **PAPER,
        "regression": {**PAPER["regression"], "weight": 1.0, "order": "update_first"},
        "motion": {**PAPER["motion"], "floor": 0.8, "sync_ranks": False},
    }
    assert AVDConfig.released_code().model_dump() == expected


@pytest.mark.parametrize("config", [AVDConfig(), AVDConfig.released_code(), AVDConfig(motion=None, gradient_ratio=0.3)])
def test_a_configuration_survives_json(config: AVDConfig) -> None:
    assert AVDConfig.model_validate_json(config.model_dump_json()) == config


def test_parts_may_be_given_as_dictionaries() -> None:
    config = AVDConfig(regression={"weight": 0.5}, motion=None)
    assert config.regression == RegressionConfig(weight=0.5)
    assert config.motion is None


@pytest.mark.parametrize("model", [AVDConfig, RegressionConfig, MotionConfig, BalanceConfig])
def test_every_field_is_described(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name} has no docstring"


@pytest.mark.parametrize(
    ("model", "values", "field"),
    [
        (RegressionConfig, {"weight": -1}, "weight"),
        (RegressionConfig, {"sharpness": -1}, "sharpness"),
        (RegressionConfig, {"sharpness": math.inf}, "sharpness"),
        (RegressionConfig, {"decay": 1}, "decay"),
        (RegressionConfig, {"decay": -0.5}, "decay"),
        (RegressionConfig, {"order": "last"}, "order"),
        (RegressionConfig, {"wieght": 1}, "wieght"),
        (MotionConfig, {"weight": -1}, "weight"),
        (MotionConfig, {"floor": math.nan}, "floor"),
        (MotionConfig, {"eps": 0}, "eps"),
        (MotionConfig, {"channels": 0}, "channels"),
        (MotionConfig, {"treshold": 0.6}, "treshold"),
        (BalanceConfig, {"decay": 1}, "decay"),
        (AVDConfig, {"timesteps": ()}, "timesteps"),
        (AVDConfig, {"timesteps": (1000, 522, 757)}, "strictly falling or strictly rising"),
        (AVDConfig, {"timesteps": (1000, 1000)}, "strictly falling or strictly rising"),
        (AVDConfig, {"timesteps": (1000, math.nan)}, "timesteps"),
        (AVDConfig, {"gradient_ratio": 0}, "gradient_ratio"),
        (AVDConfig, {"gradient_ratio": math.nan}, "gradient_ratio"),
        (AVDConfig, {"weight": 1}, "weight"),
        (AVDConfig, {"motion": {"flor": 1}}, "flor"),
    ],
)
def test_wrong_values_are_refused_by_name(model: type[BaseModel], values: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        model(**values)


def test_values_are_fixed_once_constructed() -> None:
    config = AVDConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.gradient_ratio = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        config.motion.floor = 1.0


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        RegressionConfig(2.0)


@pytest.mark.parametrize("timesteps", [(1000,), (0.25, 0.5, 1.0), (1000, 900)])
def test_what_the_configuration_accepts_the_objective_can_be_built_from(timesteps: tuple[float, ...]) -> None:
    assert AVDObjective(AVDConfig(timesteps=timesteps)).regression.cache.timesteps.tolist() == list(timesteps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        # The mean would be needed before the iteration's losses are known.
        (lambda: RegressionConfig(order="update_first", auto_update=False), "update_first.* needs auto_update=True"),
        (lambda: AVDConfig(regression=None, gradient_ratio=0.5), "gradient_ratio needs a regression"),
        (lambda: MotionConfig(frame_dim=0), "frame_dim"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(make: Callable[[], BaseModel], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()
