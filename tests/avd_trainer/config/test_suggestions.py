"""A mistyped key or value is answered with what it may have been meant for."""

import pytest

from avd_trainer.config.loading import ConfigError, load_config
from avd_trainer.training.config import TrainConfig


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.regresion.weight=1", "method.regresion: there is no such field: did you mean method.regression?"),
        ("method.motion.flor=1", "method.motion.flor: there is no such field: did you mean method.motion.floor?"),
        ("btch_size=1", "btch_size: there is no such field: did you mean batch_size?"),
        ("data.clip=4", "data.clip: there is no such field: did you mean data.clips?"),
        ("lr=1", "lr: there is no such field: did you mean method.student.optimizer.lr or method.online.optimizer.lr?"),
        ("checkpoint.zzz=1", "checkpoint.zzz: there is no such field. There are: every, keep_every, keep_latest"),
        # Of videos, not of these shapes.
        (
            "data.path=x",
            "data.path: there is no such field. There are: captions, clips, held_out, kind, saturation, seed",
        ),
        ("data.kind=films", "data.kind: expected one of shapes, videos, shards, got 'films'"),
        ("seed", "--set seed: expected KEY=VALUE, such as --set max_steps=100."),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("teacher=[", "--set teacher=[: [ is no value in YAML"),
        ("seed=", "seed: Input should be a valid integer, got nothing (null)"),
    ],
)
def test_a_mistake_is_answered_with_a_suggestion(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(TrainConfig, "tiny", [override])
    assert message in str(raised.value)


@pytest.mark.parametrize("kind", ["light", "semantic"])
def test_a_section_whose_kind_is_no_choice_of_sections_is_searched_whatever_it_is(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"head\.widht: there is no such field: did you mean method\.head\.width\?"):
        load_config(TrainConfig, "tiny", [f"method.head.kind={kind}", "method.head.widht=64"], method="dmd2")
