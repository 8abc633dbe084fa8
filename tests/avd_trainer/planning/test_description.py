"""What a plan knows of a run, against a trainer that runs it."""

from collections import Counter
from typing import Any

import pytest
from torch import Tensor

from avd_trainer.config.loading import load_config
from avd_trainer.models.codecs.wan import wan_latent_shape
from avd_trainer.planning.description import (
    architecture_of,
    describe,
    find_architecture,
    find_latent_shape,
    find_text_length,
)
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.trainer import Trainer
from planned_runs import SMALL_SHAPE, SMALL_TEXT, config, described, trainer_of

Asked = Counter[tuple[str, bool]]


@pytest.mark.parametrize(
    ("method", "forwards"),
    [
        ({"online_updates": 5}, 35.5),
        ({"online_updates": 5, "regression": None}, 32.5),
        ({"online_updates": 5, "regression": {"judged": "excess"}}, 36.5),
        ({"kind": "dmd", "online_updates": 5}, 32.5),
        ({"online_updates": 5, "guidance_scale": 1.0}, 34.5),
        ({"online_updates": 5, "few_steps": [1000]}, 28.0),
        ({"online_updates": 1}, 13.5),
    ],
)
def test_forward_equivalents_of_an_update(method: dict[str, Any], forwards: float) -> None:
    """A backward pass counted as two forwards; docs/method.md has the 35.5 part by part."""
    calls = described(method=method).calls
    assert sum(call.forwards * (3 if call.backward else 1) for call in calls) == forwards


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"online_updates": 3},
        {"kind": "dmd"},
        {"guidance_scale": 1.0},
        {"regression": None},
        {"regression": {"judged": "excess"}},
        {"regression": {"judged": "relative"}},
    ],
    ids=["avd", "more online updates", "dmd", "no guidance", "no regression", "excess", "relative loss"],
)
def test_calls_are_those_of_a_trainer(
    small_teacher: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    own = config(teacher=small_teacher, batch_size=2, method=method | {"few_steps": [1000, 500]})
    # Samples are finished at each of the two steps once.
    asked: Asked = Counter()
    for exit_step in range(2):
        monkeypatch.setattr(Draws, "shared_integer", lambda *_, exit_step=exit_step: exit_step)
        trainer = trainer_of(own, ranks, SMALL_SHAPE, SMALL_TEXT)
        count_examples(trainer, asked)
        next(trainer.run())
    run = describe(own, find_architecture(small_teacher), SMALL_SHAPE, gpus=1, text_length=SMALL_TEXT[0])
    planned: Counter[tuple[str, bool]] = Counter()
    for call in run.calls:
        planned[call.role, call.backward] += int(2 * own.batch_size * call.forwards)
    assert +planned == asked


def count_examples(trainer: Trainer, asked: Asked) -> None:
    """Examples run, by role and by whether a graph is kept."""
    for name, model in trainer.models.items():

        def counted(*inputs: Tensor, name: str = name, model: Any = model) -> Tensor:
            velocity: Tensor = model(*inputs)
            asked[name, velocity.requires_grad] += len(inputs[0])
            return velocity

        setattr(trainer.method, name, counted)


def test_roles_are_those_of_the_method() -> None:
    roles = {role.name: role for role in described(method={"online": {"lora": {"rank": 8}}}).roles}
    assert roles.keys() == {"teacher", "student", "online"}
    assert [name for name, role in roles.items() if role.trained] == ["student", "online"]
    assert [name for name, role in roles.items() if role.owns_weights] == ["student"]
    assert [name for name, role in roles.items() if role.averaged] == ["student"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 3}, "batch_size 8 cannot be shared out among 3"),
        ({"gpus": 2, "micro_batch_size": 3}, "batch_size 8 cannot be shared out among 2"),
        ({"gpus": 4, "parallel": {"replicate": 3}}, "replicate is 3"),
        ({"shape": (4, 3, 16, 16)}, "16 channels"),
        ({"shape": (16, 3, 15, 16)}, "patches of"),
    ],
)
def test_a_run_that_cannot_be_started_cannot_be_planned(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        described(**changes)


def test_a_method_that_builds_its_own_transformer_is_planned_by_it() -> None:
    own = load_config(TrainConfig, "tiny", method="flow_matching")
    run = describe(own, architecture_of(own), find_latent_shape(own), gpus=1, text_length=find_text_length(own))
    (role,) = run.trained
    assert (role.name, role.owns_weights, role.averaged) == ("teacher", True, True)
    assert architecture_of(own)["num_layers"] == own.method.architecture.num_layers


def test_a_method_without_transformers_cannot_be_planned() -> None:
    with pytest.raises(UserError, match="frame_interpolation trains its interpolator, which is no transformer"):
        architecture_of(load_config(TrainConfig, "tiny", method="frame_interpolation"))


def test_a_teacher_that_is_neither_here_nor_known_is_named() -> None:
    with pytest.raises(UserError, match="somebody/model is not on this machine"):
        find_architecture("somebody/model")


def test_architecture_and_clip_of_the_bundled_teacher_are_found() -> None:
    tiny = load_config(TrainConfig, "tiny")
    assert find_architecture(tiny.teacher)["num_layers"] == 4
    assert find_latent_shape(tiny) == (16, 9, 8, 8)
    missing = tiny.model_copy(update={"data": config(data={"kind": "shards", "path": "not/there"}).data})
    assert find_latent_shape(missing) == wan_latent_shape("832x480x81") == (16, 21, 60, 104)
    assert find_text_length(missing) == 512


@pytest.mark.parametrize("size", ["832x480", "832x480x80", "830x480x81", "832x0x81", "a x b x c"])
def test_a_size_that_wan_cannot_encode_is_refused(size: str) -> None:
    with pytest.raises(UserError, match="is no size for Wan"):
        wan_latent_shape(size)
