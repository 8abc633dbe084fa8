import types
from typing import Any

import pytest
import torch

from avd_core import AVDConfig, RegressionConfig
from avd_integrations._host import Host, named, named_means, with_accumulation

HOST = Host("Some Trainer", "someone/trainer 0123abc", "Install it from somewhere.")


class Owner:
    there = None

    def method(self, wanted: Any, *, other: Any) -> None:
        pass


def test_an_absent_host_is_named_with_its_remedy_and_the_commit() -> None:
    with pytest.raises(ImportError) as error:
        HOST.load("no_such_package.part")
    for said in ("Some Trainer", "no_such_package.part", "Install it from somewhere.", "someone/trainer 0123abc"):
        assert said in str(error.value)


def test_a_host_that_fits_is_loaded() -> None:
    module = HOST.load("types", {"SimpleNamespace.__init__": (), "SimpleNamespace": ()})
    assert module is types
    HOST.check(Owner, {"there": (), "method": ("wanted", "other"), "method.__name__": ()})
    HOST.check(Owner(), {"method": ("wanted",)})


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"gone": (), "there": (), "lost.part": (), "lost.more": ()}, r"test_host\.Owner has no gone, lost: "),
        ({"there.part": ()}, r"test_host\.Owner has no there\.part: "),
        ({"method": ("wanted", "gone", "lost")}, r"test_host\.Owner\.method takes no argument gone, lost: "),
    ],
)
@pytest.mark.parametrize("owner", [Owner, Owner()], ids=["class", "object"])
def test_a_host_that_has_moved_is_named_with_what_is_missing(
    owner: object, members: dict[str, tuple[str, ...]], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message + r".*not the Some Trainer .*proven on someone/trainer 0123abc\."):
        HOST.check(owner, members)


def test_the_cache_waits_where_gradients_are_accumulated() -> None:
    config = AVDConfig(regression=RegressionConfig(weight=0.5))
    assert with_accumulation(config, 1) == config
    assert with_accumulation(config, 2).regression == RegressionConfig(weight=0.5, auto_update=False)
    assert with_accumulation(AVDConfig(regression=None), 2) == AVDConfig(regression=None)


def test_metrics_have_the_names_of_a_log() -> None:
    metrics = {"motion/loss": torch.tensor(1.0), "regression/weights": torch.tensor([1.0, 3.0])}
    assert named(metrics)["avd/regression/weights"] is metrics["regression/weights"]
    assert {name: value.item() for name, value in named_means(metrics).items()} == {
        "avd/motion/loss": 1.0,
        "avd/regression/weights": 2.0,
    }
