"""V-PAE: which turn trains what, what it costs, and what its losses are made of; the rest is in the contract."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from avd_core import CollapseMonitor, SpatioTemporalR1Loss
from avd_trainer.config.sections import ScoreTimestepsConfig
from avd_trainer.data.in_memory import encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.methods.base import Batches, Turn
from avd_trainer.methods.vpae import VPAE, VPAEMethodConfig
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.condition import Condition
from avd_trainer.models.discriminators.discriminator import Discriminator
from avd_trainer.models.discriminators.light import LightHead
from avd_trainer.models.roles import Average, Trained
from avd_trainer.models.samplers import FewStepSampler, schedule
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.planning.plan import make_plan
from avd_trainer.runtime.draws import Draws
from avd_trainer.training.trainer import Trainer
from runs import LORA, MakeConfig, MakeTrainer, first_step, weights

PHASE_2 = {"priming_steps": 0}


def of(trainer: Trainer) -> VPAE:
    assert isinstance(trainer.method, VPAE)
    return trainer.method


def batch_of(trainer: Trainer, name: str) -> Batches:
    """The batch of that name that the first step reads."""
    return {name: next(trainer._streams()[name])}


def draws_of(trainer: Trainer, role: str) -> Draws:
    """The draws of that role's turn in the first step."""
    return Draws((trainer.config.seed, role, 1, 0), range(trainer.config.batch_size), torch.device("cpu"))


# --- Configuration


def test_defaults_are_the_papers() -> None:
    config = VPAEMethodConfig()
    assert config.few_steps == (1000,)
    assert (config.priming_steps, config.priming_rate * config.student.optimizer.lr) == (500, 1e-6)
    assert (config.student.optimizer.lr, config.ema_decay, config.csds_weight) == (2e-6, 0.995, 10)
    assert config.online.lora is not None
    assert config.roles()["ema"] == Average("student", 0.995, asked=True, warmup=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"few_steps": [1000, 500]}, r"few_steps must be \[1000\], one step from pure noise, got \[1000.0, 500.0\]"),
        ({"few_steps": [900]}, "few_steps must be"),
        ({"motion": {"frame_dim": 1}}, "motion.frame_dim must be 2"),
        ({"motion": {"sync_ranks": False}}, "motion.sync_ranks true"),
    ],
)
def test_what_contradicts_the_method_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VPAEMethodConfig.model_validate(changes)


def test_a_run_in_float32_does_not_ask_for_str1_in_float32(make_config: MakeConfig) -> None:
    method = {"r1_precision": "float32"}
    assert make_config("vpae", precision="bfloat16", method=method).method.r1_precision == "float32"
    with pytest.raises(ValueError, match=r"precision=float32 and method.r1_precision=float32 exclude each other"):
        make_config("vpae", precision="float32", method=method)


def test_blocks_that_are_not_there_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"blocks must rise within 0 to 0, the blocks of this transformer, got \[3\]"):
        make_trainer("vpae", method={"head": {"blocks": [3]}})


# --- Cost


def equivalents(config: VPAEMethodConfig, max_steps: int = 1) -> float:
    """Forwards per example and step, a backward pass counted as two."""
    return sum(call.forwards * (3 if call.backward else 1) for call in config.calls(max_steps))


def test_a_step_of_the_second_phase_costs_twelve_forwards() -> None:
    """Against the 32.5 of distribution matching in four steps; the contract counts the calls in a trainer."""
    config = VPAEMethodConfig(priming_steps=0, guidance_scale=5.0)
    assert equivalents(config) == 12
    assert equivalents(config.model_copy(update={"r1_weight": 0.0})) == 10
    assert equivalents(config.model_copy(update={"r1_precision": "float32"})) == 13
    assert equivalents(config.model_copy(update={"csds_weight": 0.0})) == 11
    assert equivalents(config.model_copy(update={"csds_guidance": 3.0})) == 13


def test_what_is_planned_is_the_mean_over_both_phases() -> None:
    config = VPAEMethodConfig(priming_steps=500, guidance_scale=5.0)
    primed, equilibrium = equivalents(config, 500), equivalents(config.model_copy(update={"priming_steps": 0}))
    assert primed == 4 + 3 + 2 + 1 + 15
    assert equivalents(config, 1500) == pytest.approx((primed + 2 * equilibrium) / 3)


# --- Turns


def test_phases_follow_the_step_alone(make_trainer: MakeTrainer) -> None:
    method = of(make_trainer("vpae", method={"priming_steps": 2, "priming_rate": 0.5, "online_updates": 2}))
    primed = [Turn("student", ("clips",), rate=0.5), Turn("online"), Turn("online", ("clips",))]
    judged = [Turn("discriminator", ("clips",), "equilibrium"), Turn("student", ("prompts",), "equilibrium")]
    assert [list(method.turns(step)) for step in (1, 2, 3, 4)] == [primed, primed, judged, judged]
    assert method.sampler == FewStepSampler((1000.0,))


def test_the_student_is_primed_at_its_share_of_the_learning_rate(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("vpae", max_steps=4, method={"priming_steps": 2, "priming_rate": 0.25})
    rates = []
    for _ in trainer.run():
        rates.append(trainer.optimizers["student", ""].param_groups[0]["lr"])
    assert rates == [0.25e-3, 0.25e-3, 1e-3, 1e-3]


@pytest.mark.parametrize(
    ("critic", "moving"),
    [
        ("average", {"student", "discriminator", "ema"}),
        ("frozen", {"student", "discriminator"}),
        ("separate", {"student", "discriminator", "critic"}),
    ],
)
def test_phase_two_trains_student_and_head_and_a_separate_critic_with_it(
    make_trainer: MakeTrainer, critic: str, moving: set[str]
) -> None:
    trainer = make_trainer("vpae", max_steps=1, method={**PHASE_2, "critic": critic})
    before = {name: weights(model) for name, model in trainer.models.items()}
    first_step(trainer)
    assert {name for name, model in trainer.models.items() if not torch.equal(weights(model), before[name])} == moving


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_critic_is_the_students_average(make_trainer: MakeTrainer, lora: dict[str, Any] | None) -> None:
    trainer = make_trainer("vpae", max_steps=3, method={"priming_steps": 1, "student": {"lora": lora}})
    list(trainer.run())
    student, critic = trainer.models["student"], trainer.models["ema"]
    assert isinstance(student, VelocityModel)
    assert isinstance(critic, VelocityModel)
    assert of(trainer).equilibrium.discriminator.backbone is critic
    last = [parameter.detach().clone() for parameter in student.parameters()]
    found = [parameter.detach() for parameter in critic.own_parameters().values()]
    with trainer.averages["ema"].average_parameters():
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), found, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(last, found, strict=True))
    assert (critic.module is student.module) == (lora is not None)  # adapters share one base


@pytest.mark.parametrize("critic", ["average", "frozen"])
def test_the_average_has_its_plain_decay_from_the_first_step(make_trainer: MakeTrainer, critic: str) -> None:
    """theta- <- 0.9 theta- + 0.1 theta: no warm-up, which would make the critic follow more closely."""
    trainer = make_trainer("vpae", max_steps=3, method={"priming_steps": 1, "ema_decay": 0.9, "critic": critic})
    student = trainer.models["student"]
    assert isinstance(student, VelocityModel)
    expected = [parameter.detach().clone() for parameter in student.parameters()]
    for _ in trainer.run():
        expected = [0.9 * a + 0.1 * p.detach() for a, p in zip(expected, student.parameters(), strict=True)]
    with trainer.averages["ema"].average_parameters():
        for found, wanted in zip(student.parameters(), expected, strict=True):
            torch.testing.assert_close(found.detach(), wanted)


@pytest.mark.parametrize(
    ("method", "asked"), [(PHASE_2, False), ({"priming": "consistency"}, False), ({"priming_steps": 1}, True)]
)
def test_an_online_model_takes_part_only_where_distributions_are_matched(
    make_trainer: MakeTrainer, make_config: MakeConfig, method: dict[str, Any], asked: bool
) -> None:
    """It is neither built, nor stepped on, nor saved, nor planned."""
    trainer = make_trainer("vpae", method=method)
    plan = make_plan(make_config("vpae", method=method))
    stepped_on = {role for role, _ in trainer.optimizers}
    for names in (trainer.models, stepped_on, trainer.state_tensors(), {role.name for role in plan.run.roles}):
        assert ("online" in names) == asked


def test_the_average_is_asked_where_something_asks_it() -> None:
    def asked(**options: Any) -> bool:
        role = VPAEMethodConfig.model_validate(options).roles()["ema"]
        assert isinstance(role, Average)
        return role.asked

    assert asked()
    assert not asked(critic="frozen")
    assert asked(critic="frozen", priming="consistency")
    assert not asked(critic="frozen", priming="consistency", priming_steps=0)


# --- Phase I


def test_samples_of_phase_one_start_from_clips_at_high_noise(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("vpae", batch_size=8, method={"priming_low": 900})
    batch = batch_of(trainer, "clips")
    with torch.no_grad():
        rollout = of(trainer).generate(batch, draws_of(trainer, "student"))
    assert ((rollout.timesteps >= 900) & (rollout.timesteps <= 1000)).all()
    assert rollout.timesteps.std() > 10
    assert rollout.finished
    noise = draws_of(trainer, "student").normal("input_noise", batch["clips"].latents.shape[1:])
    s = (rollout.timesteps / 1000).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(rollout.x_t, (1 - s) * batch["clips"].latents + s * noise)


def test_at_the_highest_noise_nothing_is_seen_of_the_clips(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("vpae", method={"priming_low": 1000})
    batch = batch_of(trainer, "clips")
    rollout = of(trainer).generate(batch, draws_of(trainer, "student"))
    assert torch.equal(
        rollout.x_t, draws_of(trainer, "student").normal("input_noise", batch["clips"].latents.shape[1:])
    )


def test_consistency_priming_has_nothing_to_learn_where_the_trajectory_ends(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose clean prediction is always the same clip is consistent; one whose prediction moves is not."""
    trainer = make_trainer("vpae", max_steps=1, method={"priming": "consistency", "guidance_scale": 1.0})
    method, batch = of(trainer), batch_of(trainer, "clips")
    goal = torch.randn_like(batch["clips"].latents)

    def knows_the_goal(x_t: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        return (x_t - goal) / (timesteps / 1000).clamp(min=1e-6).view(-1, 1, 1, 1, 1) + 0.0 * zero

    zero = torch.zeros((), requires_grad=True)
    monkeypatch.setattr(method, "student", knows_the_goal)
    monkeypatch.setattr(method, "teacher", knows_the_goal)
    method.models = {**method.models, "ema": knows_the_goal}  # type: ignore[dict-item]
    loss = method._stay_consistent(batch, draws_of(trainer, "student"))
    assert float(loss.value.detach()) == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(method, "student", lambda *inputs: knows_the_goal(*inputs) + 0.5)
    assert float(method._stay_consistent(batch, draws_of(trainer, "student")).value.detach()) > 0.01


# --- Phase II


def asked_of(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, turn: str
) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """What the discriminator is asked in the first step's turn of that role, ``(x_t, timesteps)``, and its metrics."""
    seen: list[tuple[Tensor, Tensor]] = []
    equilibrium = of(trainer).equilibrium
    asked = equilibrium.discriminator

    def note(x_t: Tensor, timesteps: Tensor, condition: Any) -> Tensor:
        seen.append((x_t.detach(), timesteps))
        return asked(x_t, timesteps, condition)

    monkeypatch.setattr(equilibrium, "discriminator", note)
    if turn == "discriminator":
        loss = equilibrium.judge(batch_of(trainer, "clips"), draws_of(trainer, turn))
    else:
        loss = equilibrium.be_judged(batch_of(trainer, "prompts"), draws_of(trainer, turn))
    return seen, dict(loss.metrics)


def test_clips_and_samples_are_judged_at_the_same_times_and_perturbed_after_noising(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer("vpae", method=PHASE_2)
    seen, metrics = asked_of(trainer, monkeypatch, "discriminator")
    (clips, t), (samples, _), (spatial, _), (temporal, _) = seen
    assert all(torch.equal(times, t) for _, times in seen)
    batch, draws = batch_of(trainer, "clips")["clips"], draws_of(trainer, "discriminator")
    s = (t / 1000).view(-1, 1, 1, 1, 1)
    noise = draws.normal("critic_noise", clips.shape[1:])
    torch.testing.assert_close(clips, (1 - s) * batch.latents + s * noise)
    assert not torch.allclose(samples - (1 - s) * batch.latents, s * noise)
    start, high = draws.normal("trajectory", clips.shape[1:]), torch.full((len(clips),), 1000.0)
    with torch.no_grad():
        x = start - trainer.models["student"](start, high, batch.condition)
    torch.testing.assert_close(samples, (1 - s) * x + s * draws.normal("sample_noise", clips.shape[1:]))
    # In space all frames alike, in time around the mean frame.
    moved = spatial - clips
    torch.testing.assert_close(moved, moved[:, :, :1].expand_as(moved), atol=1e-6, rtol=0)
    assert moved.std() == pytest.approx(0.01, rel=0.2)
    moved = temporal - clips
    torch.testing.assert_close(moved.mean(dim=2), torch.zeros_like(moved[:, :, 0]), atol=1e-6, rtol=0)
    assert moved.std() == pytest.approx(0.1, rel=0.2)
    assert {"hinge_loss", "logit_gap", "r1/loss"} <= metrics.keys()


def test_in_bfloat16_a_larger_step_or_float32_measures_str1s_spatial_term() -> None:
    """At 0.01 the backbone's rounding alone changes logits more; in float32 both steps measure the same slope."""
    torch.manual_seed(0)
    clips = encode_shapes(MovingShapes(12, 0), BlockDCTCodec()).latents
    x_t = schedule.add_noise(clips, torch.randn_like(clips), torch.full((12,), 300.0))
    condition = Condition(torch.zeros(12, 4, 32))
    noise, head = torch.randn_like(clips[:, :, :1]), LightHead(96, 2, width=32)

    def spatial(dtype: torch.dtype, step: float | None, seen_in: torch.dtype | None = None) -> float:
        backbone = VelocityModel(load_transformer("bundled:tiny", dtype=dtype), dtype=dtype)
        discriminator = Discriminator(backbone, head, (3, 5))
        asked = partial(discriminator, timesteps=torch.full((12,), 300.0), condition=condition, dtype=seen_in)
        with torch.no_grad():
            r1 = SpatioTemporalR1Loss(step_spatial=step).eval()
            return float(r1(asked, x_t, asked(x_t), spatial_noise=noise).metrics["spatial"])

    exact = spatial(torch.float32, None)
    assert spatial(torch.float32, 0.1) == pytest.approx(exact, rel=0.2)
    assert spatial(torch.bfloat16, None) > 1.25 * exact  # 6 times, where the head was trained for 60 steps
    assert spatial(torch.bfloat16, 0.1) == pytest.approx(exact, rel=0.25)
    # The bundled weights are those of bfloat16, so that what is left is what lies between the layers.
    assert spatial(torch.bfloat16, None, torch.float32) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(
    "method",
    [{}, {"student": {"lora": LORA}}, {"critic": "frozen"}, {"critic": "separate"}],
    ids=["average", "adapters", "frozen", "separate"],
)
def test_str1_in_float32_is_that_of_a_run_in_float32(
    make_trainer: MakeTrainer, teacher_folder: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Of one first step; the weights, which are rounded for any bfloat16, are rounded for both."""
    rounded = load_transformer(str(teacher_folder), dtype=torch.bfloat16).float()
    rounded.save_pretrained(tmp_path / "teacher")
    terms, losses = {}, {}
    for precision, of_r1 in (("float32", "run"), ("bfloat16", "run"), ("bfloat16", "float32")):
        trainer = make_trainer(
            "vpae", max_steps=1, teacher=tmp_path / "teacher", precision=precision,
            parallel={"activation_checkpointing": True}, method={**PHASE_2, **method, "r1_precision": of_r1},
        )  # fmt: skip
        metrics = first_step(trainer)
        terms[precision, of_r1] = float(metrics["discriminator/r1/spatial"])
        losses[precision, of_r1] = float(metrics["discriminator/hinge_loss"])
    exact = terms["float32", "run"]
    assert terms["bfloat16", "float32"] == pytest.approx(exact, rel=1e-3)
    assert abs(terms["bfloat16", "run"] / exact - 1) > 5e-3  # of one block, and a head that has learned nothing
    assert losses["bfloat16", "float32"] == losses["bfloat16", "run"]


def test_the_gradient_of_l_g_is_that_of_its_terms(make_trainer: MakeTrainer) -> None:
    """Held against L_G as written, differentiated through student and critic at once."""
    times = {
        "critic": ScoreTimestepsConfig(shift=1.0, low=20, high=500),
        "csds": ScoreTimestepsConfig(shift=3.0, low=600, high=980),
    }
    options = {f"{name}_timesteps": each.model_dump() for name, each in times.items()}
    trainer = make_trainer("vpae", method={**PHASE_2, **options, "motion": {"weight": 0.1, "floor": -100.0}})
    equilibrium, batch = of(trainer).equilibrium, batch_of(trainer, "prompts")
    student = trainer.models["student"]
    assert isinstance(student, VelocityModel)

    def gradient() -> Tensor:
        found = torch.cat([p.grad.full_tensor().flatten() for p in student.parameters() if p.grad is not None])
        for parameter in student.parameters():
            parameter.grad = None
        return found

    equilibrium.be_judged(batch, draws_of(trainer, "student")).backward(1)
    found = gradient()

    draws = draws_of(trainer, "student")
    condition = batch["prompts"].condition
    noise = draws.normal("trajectory", trainer.latent_shape)
    high = torch.full((len(noise),), 1000.0)
    x = noise - student(noise, high, condition)

    def noised(clean: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        u, (shift, low, high) = draws.uniform(f"{name}_timesteps"), times[name].model_dump().values()
        t = (1000 * shift * u / (1 + (shift - 1) * u)).clamp(low, high)
        s = (t / 1000).view(-1, 1, 1, 1, 1)
        return (1 - s) * clean + s * draws.normal(f"{name}_noise", trainer.latent_shape), t, s

    with torch.no_grad():
        x_t, t, s = noised(x, "csds")
        real = x_t - s * trainer.models["teacher"](x_t, t, condition)
    csds = 10 * (x - real).square().mean()
    motion = 0.1 * -(x.var(dim=2, unbiased=False).mean() + 1e-6).log()
    x_t, t, _ = noised(x, "critic")
    (csds + motion - equilibrium.discriminator(x_t, t, condition).mean()).backward()
    torch.testing.assert_close(found, gradient(), rtol=1e-4, atol=1e-6)


def test_shares_of_the_generators_gradient_add_up(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("vpae", method={**PHASE_2, "motion": {"weight": 0.1, "floor": -100.0}})
    metrics = first_step(trainer)
    shares = [metrics[f"{name}/share"] for name in ("adversarial", "csds", "motion")]
    assert float(torch.stack(shares).sum()) == pytest.approx(1)
    assert all(share > 0 for share in shares)
    assert float(metrics["loss"]) == pytest.approx(
        float(sum(metrics[f"{name}/loss"] for name in ("adversarial", "csds", "motion"))), rel=1e-5
    )


@pytest.mark.parametrize(
    ("method", "left_out", "judged"),
    [({"r1_weight": 0}, "discriminator/r1/loss", 2), ({"csds_weight": 0}, "csds/loss", 4)],
)
def test_a_term_of_weight_zero_is_left_out_and_costs_nothing(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any], left_out: str, judged: int
) -> None:
    trainer = make_trainer("vpae", method={**PHASE_2, **method})
    assert len(asked_of(trainer, monkeypatch, "discriminator")[0]) == judged
    metrics = first_step(make_trainer("vpae", method={**PHASE_2, **method}))
    assert left_out not in metrics
    assert {"discriminator/r1/loss", "csds/loss"} - {left_out} <= metrics.keys()


def test_the_monitor_sees_how_the_discriminator_ranks(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("vpae", max_steps=2, method={"priming_steps": 1})
    assert isinstance(trainer.monitor, CollapseMonitor)
    run = trainer.run()
    next(run)
    assert "ranked" not in trainer.monitor.signals()
    metrics = next(run)
    assert trainer.monitor.signals()["ranked"] == float(metrics["discriminator/ranked"])


def test_the_discriminator_learns_to_tell_clips_from_samples(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        "vpae",
        max_steps=40,
        batch_size=8,
        method={
            **PHASE_2,
            "student": {"optimizer": {"lr": 1e-9}},
            "r1_weight": 1.0,
            "head": {"optimizer": {"lr": 3e-3}},
        },
    )
    gaps = [float(metrics["discriminator/logit_gap"]) for metrics in trainer.run()]
    assert sum(gaps[-5:]) / 5 > sum(gaps[:5]) / 5 + 0.2


def test_image_to_video_shows_the_head_the_image() -> None:
    """The head's tokens of the image have the width that the teacher's architecture says."""
    roles = VPAEMethodConfig().roles()
    head: Any = roles["discriminator"]
    architecture = {
        "num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 12, "text_dim": 6,
        "in_channels": 36, "out_channels": 16, "image_dim": None,
    }  # fmt: skip
    assert head.build((16, 3, 4, 4), architecture).see_image[1].in_features == 20
    assert head.build((16, 3, 4, 4), {**architecture, "in_channels": 16}).see_image is None


def test_a_separate_critic_is_trained_as_the_student_is() -> None:
    config = VPAEMethodConfig.model_validate({"critic": "separate", "student": {"lora": LORA}})
    assert config.roles()["critic"] == Trained(config.student.optimizer, config.student.lora)
    assert config.roles()["ema"] == Average("student", 0.995, asked=False, warmup=False)
    assert config.backbone == "critic"
