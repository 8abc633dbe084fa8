import os
import shutil

import pytest
import torch

from avd_core import CollapseFinding, NonFiniteError, SpectralStatistics
from avd_trainer.data.in_memory import CaptionedLatents
from avd_trainer.models.condition import Condition
from avd_trainer.runtime.draws import Draws
from runs import LATENT_SHAPE, MakeTrainer, first_step, step_gradients, weights

CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
ROLES = ("student", "teacher", "online")


def test_student_and_online_model_learn_and_the_teacher_does_not(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    before = {name: weights(trainer.models[name]) for name in ROLES}
    first_step(trainer)
    changed = {name: not torch.equal(weights(trainer.models[name]), before[name]) for name in ROLES}
    assert changed == {"student": True, "teacher": False, "online": True}


def test_all_models_start_from_the_teacher(make_trainer: MakeTrainer) -> None:
    models = make_trainer().models
    assert torch.equal(weights(models["student"]), weights(models["teacher"]))
    assert torch.equal(weights(models["online"]), weights(models["teacher"]))


def test_a_seed_makes_a_run_reproducible(make_trainer: MakeTrainer) -> None:
    losses = {
        name: [metrics["loss"].item() for metrics in make_trainer(seed=seed).run()]
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    }
    assert losses["first"] == losses["again"]
    assert losses["first"] != losses["other"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of the compiler's own making
@pytest.mark.skipif(not CXX, reason="needs a C++ compiler: torch.compile's default backend writes and builds C++")
def test_compiled_blocks_compute_the_same(make_trainer: MakeTrainer) -> None:
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        student = make_trainer(parallel={"compile": compiled, "activation_checkpointing": False}).models["student"]
        draws = Draws((0, "student"), range(2), torch.device("cpu"))
        x_t, text = draws.normal("x_t", (16, 3, 4, 4)), draws.normal("text", (4, 6))
        velocity = student(x_t, torch.tensor([1000.0, 522.0]), Condition(text))
        velocity.square().mean().backward()
        results.append((velocity, [p.grad.full_tensor() for p in dict(student.named_parameters()).values()]))
    torch.compiler.reset()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_the_monitor_names_a_student_that_jitters(make_trainer: MakeTrainer, clips: CaptionedLatents) -> None:
    clips.latents.mul_(0.1)  # beside these, the samples of an untrained student are wild
    trainer = make_trainer("dmd", method={"online_updates": 1}, max_steps=120)
    list(trainer.run())
    assert trainer.monitor is not None
    assert {"jitter", "oversaturated"} <= {finding.kind for finding in trainer.monitor.findings}


@pytest.mark.parametrize(
    ("max_steps", "asked", "grace"),
    [(3, None, 1), (99, None, 49), (200, None, 100), (1000, None, 100), (99, 70, 70), (1000, 0, 0)],
)
def test_the_monitors_grace_is_at_most_half_of_the_run_unless_it_is_asked_for(
    make_trainer: MakeTrainer, max_steps: int, asked: int | None, grace: int
) -> None:
    trainer = make_trainer("dmd", max_steps=max_steps, monitor_grace=asked)
    assert trainer.monitor is not None
    assert trainer.spectrum is not None
    assert (trainer.monitor.grace, trainer.spectrum.grace) == (grace, grace)


@pytest.mark.parametrize(
    ("max_steps", "asked", "patience"), [(3, None, 0), (200, None, 25), (1500, None, 100), (200, 60, 60)]
)
def test_a_discriminator_has_an_eighth_of_a_short_run_to_learn_unless_another_patience_is_asked_for(
    make_trainer: MakeTrainer, max_steps: int, asked: int | None, patience: int
) -> None:
    trainer = make_trainer("dmd", max_steps=max_steps, monitor_patience=asked)
    assert trainer.monitor is not None
    assert trainer.monitor.patience == patience


def test_the_spectrum_of_the_samples_is_watched_beside(make_trainer: MakeTrainer, clips: CaptionedLatents) -> None:
    trainer = make_trainer("dmd", method={"online_updates": 1})
    assert trainer.spectrum is not None
    assert trainer.spectrum.reference == SpectralStatistics.measure(clips.latents)
    blurred = torch.linspace(0, 1, 4).expand(2, *LATENT_SHAPE)
    trainer.spectrum.window = 2
    for step in range(110):
        trainer.callbacks["student"].after_step(step, {"x_0": blurred})
    assert [finding.kind for finding in trainer.spectrum.findings] == ["blurred"]


def test_findings_of_all_monitors_come_in_the_order_of_steps(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    assert trainer.monitor is not None
    assert trainer.spectrum is not None
    for step, monitor in ((3, trainer.spectrum), (2, trainer.monitor), (1, trainer.spectrum)):
        monitor.findings.append(CollapseFinding(step, "frozen", 0.1, 0.2, "It stands still."))
    assert [finding.step for finding in trainer.findings] == [1, 2, 3]


def test_a_run_from_before_a_monitor_came_to_be_goes_on(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    trainer.callbacks["student"].after_step(1, {"x_0": torch.randn(2, *trainer.latent_shape)})
    state = trainer.state()
    del state["callbacks"]["student"]["spectrum"]
    later = make_trainer()
    later.load_state(state)
    assert later.monitor is not None
    assert trainer.monitor is not None
    assert later.monitor.signals() == trainer.monitor.signals()


def test_a_step_with_a_bad_clip_is_skipped_and_nothing_is_poisoned(
    make_trainer: MakeTrainer, clips: CaptionedLatents
) -> None:
    trainer = make_trainer(max_steps=10)
    clips.latents.fill_(torch.nan)
    before = weights(trainer.models["student"])
    assert first_step(trainer)["skipped"] == 1
    assert torch.equal(weights(trainer.models["student"]), before)
    assert not trainer.method.objective.regression.cache.seen.any()  # type: ignore[attr-defined]
    with trainer.averages["ema"].average_parameters():
        assert torch.equal(weights(trainer.models["student"]), before)


def test_a_run_that_stays_non_finite_stops(make_trainer: MakeTrainer, clips: CaptionedLatents) -> None:
    trainer = make_trainer(max_steps=10, max_skipped_steps=3)
    clips.latents.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"of the student is not finite.*3 in a row"):
        list(trainer.run())
    assert trainer.step == 3


def test_an_online_model_that_stays_non_finite_stops_the_run_after_as_many_steps(make_trainer: MakeTrainer) -> None:
    """Whatever the number of its turns in a step."""
    trainer = make_trainer("dmd", method={"online_updates": 2}, max_steps=10, max_skipped_steps=2)
    with torch.no_grad():
        for parameter in dict(trainer.models["online"].named_parameters()).values():
            parameter.fill_(torch.nan)
    # The student's guard sees two bad steps before the online model's sees four bad turns.
    trainer.callbacks["student"].callbacks["guard"].max_consecutive = 100  # type: ignore[attr-defined]
    with pytest.raises(NonFiniteError, match=r"of the online model is not finite.*4 in a row"):
        list(trainer.run())
    assert trainer.step == 2


def test_gradients_are_clipped(make_trainer: MakeTrainer) -> None:
    clipped, free = (step_gradients(make_trainer(max_gradient_norm=norm)).norm() for norm in (1e-3, 1e6))
    assert clipped <= 1.01e-3 < free
    assert torch.equal(
        step_gradients(make_trainer(max_gradient_norm=None)), step_gradients(make_trainer(max_gradient_norm=1e6))
    )
