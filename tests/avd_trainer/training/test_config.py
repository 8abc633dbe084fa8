"""What a run's configuration refuses, and what it is without a word."""

from typing import Any

import pytest

from avd_core import AVDConfig
from avd_trainer.config.loading import ConfigError, load_config
from avd_trainer.config.sections import ShapesData
from avd_trainer.training.config import TrainConfig


def test_defaults_are_the_papers() -> None:
    config = TrainConfig(teacher="x", data=ShapesData(), max_steps=1, batch_size=1, method={"kind": "avd"})
    method: Any = config.method
    assert method.objective.model_copy(update={"regression": method.regression}) == AVDConfig.paper()
    assert (method.guidance_scale, method.online_updates, config.max_gradient_norm) == (5.0, 5, 10.0)
    assert (method.score_timesteps.shift, method.score_timesteps.low, method.score_timesteps.high) == (5, 20, 980)
    for optimizer in (method.student.optimizer, method.online.optimizer):
        assert (optimizer.lr, optimizer.betas) == (2e-6, (0.9, 0.999))


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("avd", "method.few_steps=[1000,1000]", r"  method: few_steps must fall from at most 1000"),
        ("avd", "method.few_steps=[522,757,900]", r"  method: few_steps must fall from at most 1000"),
        ("dmd", "method.few_steps=[1001,500]", r"  method: few_steps must fall from at most 1000"),
        ("dmd", "method.few_steps=[1000,0]", r"  method: few_steps must fall from at most 1000 to above 0"),
        ("avd", "method.motion.frame_dim=1", r"  method: motion\.frame_dim must be 2"),
        (
            "avd",
            "method.regression.order=update_first method.regression.auto_update=false",
            r"  method\.regression: order='update_first'",
        ),
        ("avd", "method.regression.sync_ranks=false", r"  method: regression\.sync_ranks .*must be true"),
        ("avd", "method.balance.sync_ranks=false", r"  method: .* balance\.sync_ranks must be true"),
        ("avd", "method.regression=null method.gradient_ratio=1", r"  method: gradient_ratio needs a regression"),
        ("avd", "method.regression=null method.motion=null", r"  method: .*both left out, which is method dmd"),
        ("avd", "method.score_timesteps.low=990", r"  method\.score_timesteps: low must be below high"),
        ("avd", "teacher=null", r"method avd needs a teacher, such as bundled:tiny"),
        (
            "flow_matching",
            "teacher=bundled:tiny",
            r"method flow_matching starts from random weights: leave teacher and",
        ),
        ("flow_matching", "student_weights=a", r"method flow_matching starts from random weights"),
        (
            "dmd",
            "student_weights=a method.student.lora.rank=2",
            r"student_weights and method\.student\.lora exclude each other: the adapters' base is the teacher",
        ),
        (
            "avd",
            "micro_batch_size=1 method.regression.order=update_first",
            r"micro_batch_size and method\.regression\.order=update_first exclude each other",
        ),
        (
            "dmd",
            "micro_batch_size=1 method.avd.regression.order=update_first",
            r"micro_batch_size and method\.avd\.regression\.order=update_first exclude each other",
        ),
        (
            "dmd",
            "method.avd.regression=null method.avd.motion=null",
            r"  method\.avd: .*left out, which adds nothing\. Leave method\.avd out",
        ),
        ("dmd", "method.avd.motion.frame_dim=1", r"  method\.avd: motion\.frame_dim must be 2"),
        (
            "avd",
            "method.avd.motion.floor=1",
            r"  method\.avd: method avd has the terms itself\. Set method\.regression",
        ),
        ("vpae", "method.avd.motion.floor=1 method.motion.floor=1", r"  method: .*the same term: it would count twice"),
        (
            "scm",
            "precision=bfloat16",
            r"precision=bfloat16 and method\.derivative=differences .* Set method\.derivative=forward",
        ),
        ("rcm", "precision=bfloat16", r"Set method\.derivative=forward"),
        ("dmd", "prompts.path=prompts", r"prompts need data of kind shards"),
    ],
)
def test_what_does_not_fit_together_is_refused(kind: str, overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, "tiny", overrides.split(" "), method=kind)


def test_the_few_steps_are_those_of_the_method() -> None:
    assert load_config(TrainConfig, "tiny", ["method.few_steps=[900,300]"]).few_steps == (900.0, 300.0)
    assert load_config(TrainConfig, "tiny", method="flow_matching").few_steps is None
