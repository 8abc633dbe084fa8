"""What of the adapter of CausVid's family needs none of its hosts. The hosts themselves: tests/hosts."""

import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avd_core import AVDConfig, MotionConfig, RegressionConfig
from avd_integrations.self_forcing import with_avd

STEPS = (1000, 757, 522)
SHAPE = (2, 5, 3, 4, 4)


class Scheduler:
    """Shifted, as the hosts': its timesteps are dense at the top."""

    def __init__(self) -> None:
        u = torch.linspace(1, 0, 1001)[:-1]
        self.sigmas = 5 * u / (1 + 4 * u)
        self.timesteps = 1000 * self.sigmas


class Generator(nn.Module):
    """Its velocity is a multiple of what it sees, returned as one of the hosts does."""

    def __init__(self, scheduler: Scheduler, returns: str) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.3))
        self.scheduler, self.returns, self.timestep = scheduler, returns, None

    def forward(
        self, noisy_image_or_video: Tensor, conditional_dict: dict[str, Tensor], timestep: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        self.timestep = timestep
        flow = self.factor * noisy_image_or_video + conditional_dict["prompt_embeds"].mean()
        nearest = (self.scheduler.timesteps - timestep[..., None]).abs().argmin(-1)
        x_0 = noisy_image_or_video - self.scheduler.sigmas[nearest][..., None, None, None] * flow
        x_0 = x_0.type_as(noisy_image_or_video)
        return x_0 if self.returns == "x_0" else (flow, x_0)


class TextEncoder(nn.Module):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told = []

    def forward(self, text_prompts: list[str]) -> dict[str, Tensor]:
        self.told.append(text_prompts)
        return {"prompt_embeds": torch.tensor([[float(len(prompt))] for prompt in text_prompts])}


def host_class(
    returns: str = "x_0",
    steps: tuple[int, ...] = (*STEPS, 0),
    change: Callable[[Any], None] = lambda self: None,
    **methods: Callable[..., Any],
) -> type[nn.Module]:
    class DMD(nn.Module):
        def __init__(self, args: types.SimpleNamespace, device: torch.device) -> None:
            super().__init__()
            self.device, self.dtype, self.args = device, torch.float32, args
            self.scheduler = Scheduler()
            self.generator, self.text_encoder = Generator(self.scheduler, returns), TextEncoder()
            self.denoising_step_list = torch.tensor(steps)
            change(self)

        def compute_distribution_matching_loss(
            self,
            image_or_video: Tensor,
            conditional_dict: dict[str, Tensor],
            unconditional_dict: dict[str, Tensor],
            gradient_mask: Tensor | None = None,
        ) -> tuple[Tensor, dict[str, Tensor]]:
            return 0 * image_or_video.double().sum(), {"timestep": torch.zeros(1)}

        def generator_loss(
            self,
            image_or_video_shape: tuple[int, ...],
            conditional_dict: dict[str, Tensor],
            unconditional_dict: dict[str, Tensor],
            clean_latent: Tensor | None,
        ) -> tuple[Tensor, dict[str, Tensor]]:
            video = self.generator.factor * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
            return self.compute_distribution_matching_loss(
                image_or_video=video, conditional_dict=conditional_dict, unconditional_dict=unconditional_dict
            )

    for name, method in methods.items():
        setattr(DMD, name, method)
    return DMD


def build(
    config: AVDConfig | None = None,
    clips: list[tuple[Tensor, list[str]]] | None = None,
    checkpoint: Path | None = None,
    **host: Any,
) -> Any:
    args = types.SimpleNamespace(generator_ckpt=checkpoint)
    return with_avd(host_class(**host), config, clips)(args, torch.device("cpu"))


def step(dmd: Any, clean_latent: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    text = {"prompt_embeds": torch.zeros(1, 1)}
    return dmd.generator_loss(
        image_or_video_shape=SHAPE, conditional_dict=text, unconditional_dict=text, clean_latent=clean_latent
    )


CLIPS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))  # no seed that a test's noise has


def test_both_kinds_of_wrappers_give_the_same_loss() -> None:
    losses = []
    for returns in ("x_0", "flow and x_0"):
        torch.manual_seed(3)
        dmd = build(returns=returns)
        losses.append(step(dmd, CLIPS)[0])
        assert dmd.generator.timestep.shape == SHAPE[:2]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("returns", ["x_0", "flow and x_0"])
def test_the_regressions_gradient_reaches_the_student(returns: str) -> None:
    def loss_at(factor: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)  # the same times and noise
        dmd = build(AVDConfig(motion=None), returns=returns)
        dmd.generator.factor.data.fill_(factor)
        return step(dmd, CLIPS)[0], dmd.generator.factor

    loss, factor = loss_at(0.3)
    loss.backward()
    # The first weights are 1, so the loss is a parabola in the factor, whose central differences are exact.
    expected = (loss_at(0.4)[0] - loss_at(0.2)[0]).item() / 0.2
    assert abs(expected) > 0.1
    assert factor.grad.item() == pytest.approx(expected, rel=1e-4)


def test_noise_levels_are_those_of_the_hosts_table() -> None:
    path = build().avd.parametrisation
    noise = torch.randn_like(CLIPS)
    times = torch.tensor([1000.0, 757.0, 522.0])
    entries = [5 * u / (1 + 4 * u) for u in (1.0, 0.384, 0.179)]  # the nearest ones
    alpha, sigma = path.coefficients(times)
    assert sigma.tolist() == pytest.approx(entries, rel=1e-6)
    assert alpha.tolist() == pytest.approx([1 - entry for entry in entries], rel=1e-6)
    assert abs(entries[1] - 0.757) > 5e-5  # and not the times themselves
    x_t = path.add_noise(CLIPS, noise, times[1:])
    first, second = entries[1:]
    expected = torch.stack([(1 - first) * CLIPS[0] + first * noise[0], (1 - second) * CLIPS[1] + second * noise[1]])
    torch.testing.assert_close(x_t, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(path.x_0(noise - CLIPS, x_t, times[1:]), CLIPS, rtol=1e-5, atol=1e-5)


def in_bfloat16(dmd: Any) -> None:
    dmd.dtype = torch.bfloat16


def test_velocities_out_of_half_precision_are_in_float32() -> None:
    dmd = build(change=in_bfloat16)
    outputs = []
    dmd.generator.register_forward_hook(lambda generator, given, output: outputs.append(output))
    times = torch.tensor([757.0, 522.0])
    clips, noise = CLIPS.bfloat16(), torch.randn_like(CLIPS).bfloat16()
    path = dmd.avd.parametrisation
    x_t = path.add_noise(clips, noise, times)
    velocity = dmd._avd_velocity(x_t, times, {"text": {"prompt_embeds": torch.zeros(2, 1)}})
    (x_0,) = outputs
    assert x_t.dtype == x_0.dtype == torch.bfloat16
    sigma = path.coefficients(times)[1].view(2, 1, 1, 1, 1)
    torch.testing.assert_close(velocity, (x_t.float() - x_0.float()) / sigma, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own", [True, False], ids=["clips", "clean_latent"])
def test_clips_come_to_the_hosts_device_and_precision(own: bool) -> None:
    dmd = build(clips=[(CLIPS, ["a", "b"])] if own else None, change=in_bfloat16)
    dmd.device = "meta"
    clips = dmd._avd_batch(SHAPE, {}, None if own else CLIPS)["clips"]
    assert clips.device.type == "meta"
    assert clips.dtype == torch.bfloat16


def test_the_steps_are_the_hosts() -> None:
    dmd = build()
    assert dmd.avd.objective.config.timesteps == STEPS  # without its final 0
    assert build(AVDConfig(timesteps=STEPS)).avd.objective.config.timesteps == STEPS
    with pytest.raises(ValueError, match=r"denoising_step_list is \(1000.0, 757.0, 522.0\)"):
        build(AVDConfig(timesteps=(1000, 500)))
    assert build(AVDConfig.released_code()).avd.objective.config.regression.order == "update_first"


def test_the_cache_learns_though_the_trainer_calls_eval() -> None:
    dmd = build()
    dmd.eval()
    assert not dmd.training
    step(dmd, CLIPS)
    assert dmd.avd.objective.regression.cache.seen.any()


def test_clips_and_their_prompts_are_gone_through_again_and_again() -> None:
    batches = [(CLIPS, ["abc", "d"]), (0.1 * CLIPS, ["ef", "ghi"])]
    dmd = build(AVDConfig(motion=None), clips=batches)
    for _ in range(3):
        step(dmd)
    assert dmd.text_encoder.told == [["abc", "d"], ["ef", "ghi"], ["abc", "d"]]
    with pytest.raises(ValueError, match="gave no batch"):
        step(build(clips=[]))


@pytest.mark.parametrize(
    "batch", [(CLIPS[:, 1:], ["a", "b"]), (CLIPS[..., 1:], ["a", "b"]), (CLIPS, ["a"])], ids=["frames", "width", "text"]
)
def test_clips_of_another_shape_than_the_rollouts_are_refused(batch: tuple[Tensor, list[str]]) -> None:
    dmd = build(clips=[batch])
    with pytest.raises(ValueError, match=r"latents \[B, 5, 3, 4, 4\], as image_or_video_shape .* B prompts; got"):
        step(dmd)
    assert dmd.generator.timestep is None  # before anything was run
    step(build(clips=[(CLIPS[:1], ["another batch size"])]))


def test_without_clips_the_regression_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"reads prompts only.*clips=loader"):
        step(build())
    loss, log = step(build(AVDConfig(regression=None)))
    assert loss.isfinite()
    assert not any(name.startswith("avd/regression") for name in log)


@pytest.mark.parametrize("left_out", ["regression", "motion"])
def test_a_term_that_is_left_out_is_not_in_the_loss(left_out: str) -> None:
    loss, log = step(build(AVDConfig(**{left_out: None})), CLIPS)
    (other,) = {"regression", "motion"} - {left_out}
    torch.testing.assert_close(loss.float(), log[f"avd/{other}/loss"])  # the host's own is 0
    assert not any(name.startswith(f"avd/{left_out}") for name in log)
    with pytest.raises(ValueError, match="both None"):
        build(AVDConfig(regression=None, motion=None))


def test_frames_that_the_host_masks_get_no_gradient() -> None:
    dmd = build(AVDConfig(regression=None, motion=MotionConfig(floor=-10)))
    video = CLIPS.clone().requires_grad_()
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[:, :2] = False
    loss, _ = dmd.compute_distribution_matching_loss(video, {}, {}, gradient_mask=mask)
    loss.backward()
    assert not video.grad[:, :2].any()
    assert video.grad[:, 2:].all()


def test_the_cache_comes_from_the_trainers_checkpoint(tmp_path: Path) -> None:
    dmd = build()
    for _ in range(4):
        step(dmd, CLIPS)
    path = tmp_path / "model.pt"
    torch.save({"generator": {}, "avd": dmd.avd.state_dict()}, path)
    cache = dmd.avd.objective.regression.cache
    torch.testing.assert_close(build(checkpoint=path).avd.objective.regression.cache.means, cache.means)
    with pytest.raises(RuntimeError, match="is for the grid"):
        build(checkpoint=path, steps=(1000, 900, 500))


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        ({"generator": {}}, {}, "has no key 'avd'"),
        (
            {"generator": {}, "config": types.SimpleNamespace()},
            {},
            "cannot be read without unpickling classes, which is not done here",
        ),
        ({"generator": {}}, {"_use_new_zipfile_serialization": False}, "is no file in the zip format of torch.save"),
    ],
    ids=["no key", "classes", "not a zip"],
)
def test_a_checkpoint_without_a_cache_to_read_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path, **options)
    with caplog.at_level(logging.WARNING):
        dmd = build(checkpoint=path)
    assert not dmd.avd.objective.regression.cache.seen.any()
    assert [record.getMessage() for record in caplog.records] == [f"{path} {reason}: the cache starts empty."]


def test_other_classes_and_moved_versions_are_refused_by_name() -> None:
    with pytest.raises(
        RuntimeError, match=r"Module has no compute_distribution_matching_loss, generator_loss: .*CausVid ca21150"
    ):
        with_avd(nn.Module)
    moved = host_class(generator_loss=lambda self, shape, conditional_dict: None)
    with pytest.raises(
        RuntimeError, match=r"DMD.generator_loss takes no argument image_or_video_shape.*, clean_latent"
    ):
        with_avd(moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda self: delattr(self, "scheduler"), r"AVDDMD has no scheduler: "),
        (lambda self: delattr(self, "denoising_step_list"), r"AVDDMD has no denoising_step_list: "),
        (lambda self: delattr(self.scheduler, "sigmas"), r"Scheduler has no sigmas: "),
        (
            lambda self: setattr(self.generator, "forward", lambda x, conditional_dict, timestep: None),
            r"AVDDMD\.generator\.forward takes no argument noisy_image_or_video: ",
        ),
        (
            lambda self: setattr(self.text_encoder, "forward", lambda prompts: None),
            r"AVDDMD\.text_encoder\.forward takes no argument text_prompts: ",
        ),
    ],
    ids=["scheduler", "steps", "sigmas", "generator", "text encoder"],
)
def test_a_model_that_has_moved_is_refused_when_it_is_built(change: Callable[[Any], None], message: str) -> None:
    with pytest.raises(RuntimeError, match=message + r".*Self-Forcing 33593df"):
        build(change=change)


def test_the_released_code_has_a_motion_term_already() -> None:
    released = host_class(reg_loss=lambda self: None)
    with pytest.raises(ValueError, match=r"motion term of its own.*AVDConfig\(motion=None\)"):
        with_avd(released)
    with_avd(released, AVDConfig(motion=None))


def test_image_models_and_accumulation_are_refused() -> None:
    ddpm = types.SimpleNamespace(alphas_cumprod=torch.ones(1000))
    with pytest.raises(ValueError, match="only flow-matching models"):
        build(change=lambda self: setattr(self, "scheduler", ddpm))
    with pytest.raises(ValueError, match="at least 2 frames"):
        build(AVDConfig(regression=None)).compute_distribution_matching_loss(CLIPS[:, :1], {}, {})
    with pytest.raises(ValueError, match="do not accumulate"):
        with_avd(host_class(), AVDConfig(regression=RegressionConfig(auto_update=False)))
