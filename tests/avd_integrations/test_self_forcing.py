"""What of the adapter of CausVid's family needs none of its hosts. The hosts themselves: tests/hosts."""

import types

import pytest
import torch
from torch import nn

from avd_core import AVDConfig, MotionConfig, RegressionConfig
from avd_integrations import rectified_flow
from avd_integrations.self_forcing import with_avd

STEPS = (1000, 757, 522)
SHAPE = (2, 5, 3, 4, 4)


class Scheduler:
    """Shifted, as the hosts': its timesteps are dense at the top."""

    def __init__(self):
        u = torch.linspace(1, 0, 1001)[:-1]
        self.sigmas = 5 * u / (1 + 4 * u)
        self.timesteps = 1000 * self.sigmas


class Generator(nn.Module):
    """Its velocity is a multiple of what it sees, returned as one of the hosts does."""

    def __init__(self, scheduler, returns):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.3))
        self.scheduler, self.returns, self.timestep = scheduler, returns, None

    def forward(self, noisy_image_or_video, conditional_dict, timestep):
        self.timestep = timestep
        flow = self.factor * noisy_image_or_video + conditional_dict["prompt_embeds"].mean()
        nearest = (self.scheduler.timesteps - timestep[..., None]).abs().argmin(-1)
        x_0 = noisy_image_or_video - self.scheduler.sigmas[nearest][..., None, None, None] * flow
        return x_0 if self.returns == "x_0" else (flow, x_0)


class TextEncoder(nn.Module):
    """Notes what it is told."""

    def __init__(self):
        super().__init__()
        self.told = []

    def forward(self, text_prompts):
        self.told.append(text_prompts)
        return {"prompt_embeds": torch.tensor([[float(len(prompt))] for prompt in text_prompts])}


def host_class(returns="x_0", steps=(*STEPS, 0), change=lambda self: None, **methods):
    class DMD(nn.Module):
        def __init__(self, args, device):
            super().__init__()
            self.device, self.dtype, self.args = device, torch.float32, args
            self.scheduler = Scheduler()
            self.generator, self.text_encoder = Generator(self.scheduler, returns), TextEncoder()
            self.denoising_step_list = torch.tensor(steps)
            change(self)

        def compute_distribution_matching_loss(
            self, image_or_video, conditional_dict, unconditional_dict, gradient_mask=None
        ):
            return 0 * image_or_video.double().sum(), {"timestep": torch.zeros(1)}

        def generator_loss(self, image_or_video_shape, conditional_dict, unconditional_dict, clean_latent):
            video = self.generator.factor * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
            return self.compute_distribution_matching_loss(
                image_or_video=video, conditional_dict=conditional_dict, unconditional_dict=unconditional_dict
            )

    for name, method in methods.items():
        setattr(DMD, name, method)
    return DMD


def build(config=None, clips=None, checkpoint=None, **host):
    args = types.SimpleNamespace(generator_ckpt=checkpoint)
    return with_avd(host_class(**host), config, clips)(args, torch.device("cpu"))


def step(dmd, clean_latent=None):
    text = {"prompt_embeds": torch.zeros(1, 1)}
    return dmd.generator_loss(
        image_or_video_shape=SHAPE, conditional_dict=text, unconditional_dict=text, clean_latent=clean_latent
    )


CLIPS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def test_both_kinds_of_wrappers_give_the_same_loss():
    losses = []
    for returns in ("x_0", "flow and x_0"):
        torch.manual_seed(3)
        dmd = build(returns=returns)
        losses.append(step(dmd, CLIPS)[0])
        assert dmd.generator.timestep.shape == SHAPE[:2]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_the_way_to_velocity_and_back_on_the_hosts_lookup_of_noise_levels():
    path = build().avd.parametrisation
    noise = torch.randn_like(CLIPS)
    for step_ in STEPS:
        times = torch.full((2,), float(step_))
        x_t = path.add_noise(CLIPS, noise, times)
        torch.testing.assert_close(path.x_0(noise - CLIPS, x_t, times), CLIPS, rtol=1e-5, atol=1e-5)
        # The nearest entry of the host's table, not t / 1000, which differs by up to half a gap of the table.
        gap = (path.flow_sigma(times) - rectified_flow().flow_sigma(times)).abs().max()
        assert gap < 2e-3


def test_the_steps_are_the_hosts():
    dmd = build()
    assert dmd.avd.objective.config.timesteps == STEPS  # without its final 0
    assert build(AVDConfig(timesteps=STEPS)).avd.objective.config.timesteps == STEPS
    with pytest.raises(ValueError, match=r"denoising_step_list is \(1000.0, 757.0, 522.0\)"):
        build(AVDConfig(timesteps=(1000, 500)))
    assert build(AVDConfig.released_code()).avd.objective.config.regression.order == "update_first"


def test_the_cache_learns_though_the_trainer_calls_eval():
    dmd = build()
    dmd.eval()
    assert not dmd.training
    step(dmd, CLIPS)
    assert dmd.avd.objective.regression.cache.seen.any()


def test_clips_and_their_prompts_are_gone_through_again_and_again():
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
def test_clips_of_another_shape_than_the_rollouts_are_refused(batch):
    dmd = build(clips=[batch])
    with pytest.raises(ValueError, match=r"latents \[B, 5, 3, 4, 4\], as image_or_video_shape .* B prompts; got"):
        step(dmd)
    assert dmd.generator.timestep is None  # before anything was run
    step(build(clips=[(CLIPS[:1], ["another batch size"])]))


def test_without_clips_the_regression_says_what_to_do():
    with pytest.raises(ValueError, match=r"reads prompts only.*clips=loader"):
        step(build())
    loss, log = step(build(AVDConfig(regression=None)))
    assert loss.isfinite()
    assert not any(name.startswith("avd/regression") for name in log)


def test_terms_that_are_left_out_leave_the_hosts_loss():
    loss, log = step(build(AVDConfig(regression=None, motion=None)), CLIPS)
    assert loss == 0
    assert set(log) == {"timestep"}


def test_frames_that_the_host_masks_get_no_gradient():
    dmd = build(AVDConfig(regression=None, motion=MotionConfig(floor=-10)))
    video = CLIPS.clone().requires_grad_()
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[:, :2] = False
    loss, _ = dmd.compute_distribution_matching_loss(video, {}, {}, gradient_mask=mask)
    loss.backward()
    assert not video.grad[:, :2].any()
    assert video.grad[:, 2:].all()


def test_the_cache_comes_from_the_trainers_checkpoint(tmp_path):
    dmd = build()
    for _ in range(4):
        step(dmd, CLIPS)
    path = tmp_path / "model.pt"
    torch.save({"generator": {}, "avd": dmd.avd.state_dict()}, path)
    cache = dmd.avd.objective.regression.cache
    torch.testing.assert_close(build(checkpoint=path).avd.objective.regression.cache.means, cache.means)
    torch.save({"generator": {}}, path)
    assert not build(checkpoint=path).avd.objective.regression.cache.seen.any()
    torch.save({"avd": dmd.avd.state_dict()}, path)
    with pytest.raises(RuntimeError, match="is for the grid"):
        build(checkpoint=path, steps=(1000, 900, 500))


def test_other_classes_and_moved_versions_are_refused_by_name():
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
def test_a_model_that_has_moved_is_refused_when_it_is_built(change, message):
    with pytest.raises(RuntimeError, match=message + r".*Self-Forcing 33593df"):
        build(change=change)


def test_the_released_code_has_a_motion_term_already():
    released = host_class(reg_loss=lambda self: None)
    with pytest.raises(ValueError, match=r"motion term of its own.*AVDConfig\(motion=None\)"):
        with_avd(released)
    with_avd(released, AVDConfig(motion=None))


def test_image_models_and_accumulation_are_refused():
    ddpm = types.SimpleNamespace(alphas_cumprod=torch.ones(1000))
    with pytest.raises(ValueError, match="only flow-matching models"):
        build(change=lambda self: setattr(self, "scheduler", ddpm))
    with pytest.raises(ValueError, match="at least 2 frames"):
        build(AVDConfig(regression=None)).compute_distribution_matching_loss(CLIPS[:, :1], {}, {})
    with pytest.raises(ValueError, match="do not accumulate"):
        with_avd(host_class(), AVDConfig(regression=RegressionConfig(auto_update=False)))
