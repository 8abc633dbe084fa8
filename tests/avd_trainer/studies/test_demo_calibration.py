"""A demo on the user's own clips: floor and sharpness by measurement, once, and not where they were set."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from avd_core import RegressionConfig
from avd_trainer.commands.demo import _to_calibrate
from avd_trainer.config.loading import load_config
from avd_trainer.data.in_memory import CaptionedLatents
from avd_trainer.evaluation.calibration import Calibration, LatentScale
from avd_trainer.evaluation.sharpness import SharpnessCalibration, StepWeights
from avd_trainer.methods.avd import AVDMethodConfig
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.studies import demo, demo_calibration
from avd_trainer.studies.demo import DemoConfig, run_demo
from avd_trainer.studies.demo_calibration import calibrated, choose, describe

BOTH = ("floor", "sharpness")
SMALL = [
    "max_steps=2", "batch_size=2", "data.clips=16", "data.held_out=8", "samples.every=null", "evaluation.samples=4",
    "evaluation.teacher_steps=2",
]  # fmt: skip


def method(**values: Any) -> AVDMethodConfig:
    return AVDMethodConfig(motion={"floor": 0.4}, regression={"sharpness": 2.0}, **values)


def scale(clip_mean: float) -> LatentScale:
    return LatentScale(samples=9, clip_mean=clip_mean, clip_std=0.1, temporal_loss=clip_mean, channel_std=(1.0,))


def measured(teacher: float, real: float) -> Calibration:
    """Clips and samples that move so much; a weight that is a switch at t = 1000."""
    common: dict[str, Any] = {
        "judged": (44.0,) * 49 + (94.0,), "mean": 45.0, "spread": 7.0, "weights": (0.0, 0.5, 1.0), "weight_spread": 0.4,
        "energy_correlation": None,
    }  # fmt: skip
    steps = tuple(
        StepWeights(timestep=t, at_the_ends=share, steepness=2 * 7.0, **common)
        for t, share in ((1000, 0.79), (522, 0.6))
    )
    regression = SharpnessCalibration(
        options=RegressionConfig(), samples=50, steps=steps, paper_sharpness=0.1, remarks=()
    )
    return Calibration(
        teacher=scale(teacher),
        real=scale(real),
        floor=teacher,
        paper_floor=teacher - 0.9,
        remarks=(),
        sharpness=regression,
    )


@pytest.mark.parametrize(("teacher", "real", "floor"), [(0.581, -2.3, 0.58), (0.581, 3.126, 3.13)])
def test_the_floor_is_that_of_what_moves_less_and_the_sharpness_in_units_of_the_spread(
    teacher: float, real: float, floor: float
) -> None:
    own = method()
    chosen = choose(own, BOTH, measured(teacher, real)).applied(own)
    assert chosen.motion is not None
    assert chosen.regression is not None
    assert chosen.motion.floor == floor
    assert (chosen.regression.deviation, chosen.regression.sharpness) == ("standardized", 3.0)
    # And nothing else.
    assert own.motion is not None
    again = chosen.model_copy(update={"motion": own.motion, "regression": own.regression})
    assert again == own
    assert chosen.regression.model_copy(update={"deviation": "absolute", "sharpness": 2.0}) == own.regression


def test_what_is_not_asked_for_or_left_out_stays_as_it_is() -> None:
    own, found = method(), measured(0.5, 0.2)
    floor, sharpness = (choose(own, [part], found).applied(own) for part in BOTH)
    assert floor.regression == own.regression
    assert floor.motion != own.motion
    assert sharpness.motion == own.motion
    assert sharpness.regression != own.regression
    for left_out in ({"motion": None}, {"regression": None}):
        less = own.model_copy(update=left_out)
        assert choose(less, BOTH, found).applied(less).model_copy(update=left_out) == choose(own, BOTH, found).applied(
            own
        ).model_copy(update=left_out)


def test_the_choice_is_told_in_a_line() -> None:
    own = method()
    said = describe(choose(own, BOTH, measured(0.58, -2.3)), own)
    assert said == (
        "Calibrated on your clips: method.motion.floor=0.58 (in place of 0.4); method.regression.deviation="
        "standardized, method.regression.sharpness=3, with which at most 2% of the weights are nearly on or off at any "
        "of the few steps (in place of absolute, 2, with which it would be 79% at t = 1000). See calibration.json."
    )


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ([], ["floor", "sharpness"]),
        (["seed=1", "method.regression.weight=0.5", "method.motion.weight=1"], ["floor", "sharpness"]),
        (["method.motion.floor=0.5"], ["sharpness"]),
        (["method.regression.sharpness=1"], ["floor"]),
        (["method.regression.deviation=standardized"], ["floor"]),
        (["method.motion=null"], ["sharpness"]),
        (["method.regression=null", "method.motion={floor: 0.5}"], []),
    ],
)
def test_what_the_user_has_set_is_not_chosen(given: list[str], parts: list[str]) -> None:
    assert _to_calibrate(given) == parts


def clips(count: int = 12) -> CaptionedLatents:
    """Latents that spread six times as much as the shapes', as natural footage does."""
    draws = torch.Generator().manual_seed(0)
    strength = 1 + torch.rand(count, 1, 1, 1, 1, generator=draws)
    return CaptionedLatents(4 * strength * torch.randn(count, 16, 3, 4, 4, generator=draws), ["a clip"] * count)


def test_clips_are_measured_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(
        DemoConfig, "tiny", [*SMALL, "method.regression.judged=loss", "method.regression.deviation=absolute"]
    )
    first = calibrated(config, BOTH, clips(), tmp_path, samples=12, steps=2)
    said = " ".join(capsys.readouterr().out.split())
    assert "Calibrated on your clips: method.motion.floor=" in said
    assert first.motion is not None
    assert first.regression is not None
    written = json.loads((tmp_path / "calibration.json").read_text())
    assert written["floor"] == first.motion.floor
    teacher, real = (written["measured"][name]["clip_mean"] for name in ("teacher", "real"))
    assert first.motion.floor == round(max(teacher, real), 2)
    assert first.regression.deviation == "standardized"
    before = [step["at_the_ends"] for step in written["measured"]["sharpness"]["steps"]]
    after = written["at_the_ends"]
    assert len(after) == len(before) == 4
    assert min(before) > 0.6
    assert max(after) < 0.1
    assert f"with which at most {max(after):.0%} of the weights are nearly on or off" in said
    assert f"with which it would be {max(before):.0%} at t = " in said
    assert written["measured"]["sharpness"]["options"]["deviation"] == config.method.regression.deviation  # type: ignore[attr-defined]
    # A demo that goes on measures nothing, and says nothing again.
    monkeypatch.setattr(demo_calibration, "calibrate_models", None)
    assert calibrated(config, BOTH, clips(), tmp_path, samples=12, steps=2) == first
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "calibration.json cannot be read"), ('{"floor": 1.0}', "calibration.json is none of this version.*Delete")],
)
def test_a_choice_that_cannot_be_read_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(UserError, match=message):
        calibrated(load_config(DemoConfig, "tiny", SMALL), BOTH, clips(), tmp_path, samples=12, steps=2)


def test_nothing_is_measured_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_calibration, "calibrate_models", None)
    config = load_config(DemoConfig, "tiny", SMALL)
    assert calibrated(config, config.calibrate, clips(), tmp_path, samples=4, steps=2) == config.method
    assert not list(tmp_path.iterdir())


def test_the_demos_runs_have_the_values_that_were_chosen(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a demo that was stopped goes on with them."""
    train, seen = demo.train, []

    def watched(run: Any, *args: Any, description: str, **options: Any) -> bool:
        seen.append((description, run.method))
        return description != "avd" and train(run, *args, description=description, **options)

    monkeypatch.setattr(demo, "train", watched)
    config = load_config(DemoConfig, "tiny", [*SMALL, "calibrate=[floor,sharpness]"])
    assert run_demo(config, tmp_path, ranks) is None
    assert run_demo(config, tmp_path, ranks) is None
    written = json.loads((tmp_path / "calibration.json").read_text())
    (first, dmd), (second, avd), *again = seen
    assert (first, second) == ("dmd", "avd")
    assert [own for _, own in again] == [dmd, avd]
    assert avd.motion.floor == written["floor"]
    assert avd.regression.deviation == "standardized"
