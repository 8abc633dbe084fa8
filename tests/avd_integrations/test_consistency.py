import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from avd_core import AVDConfig, AVDObjective, LossOutput, MotionConfig, RegressionConfig
from avd_integrations import HostTerms, Parametrisation, rectified_flow, variance_preserving
from avd_integrations.consistency import PhasedConsistencyTerms, dcm_terms, lcm_terms, pcm_terms
from references import reference_motion

ALPHAS = torch.linspace(0.9999, 0.005, 1000)
DDIM_TIMESTEPS = torch.tensor([249, 499, 749, 999])
SIGMAS = torch.linspace(0.02, 1.0, 50)


def ddpm(prediction_type: str = "epsilon") -> types.SimpleNamespace:
    return types.SimpleNamespace(alphas_cumprod=ALPHAS, config=types.SimpleNamespace(prediction_type=prediction_type))


def ddim_solver() -> types.SimpleNamespace:
    return types.SimpleNamespace(ddim_timesteps=DDIM_TIMESTEPS)


def euler_solver() -> types.SimpleNamespace:
    return types.SimpleNamespace(sigmas=SIGMAS, sigmas_prev=torch.cat([torch.zeros(1), SIGMAS[:-1]]))


def noised(parametrisation: Parametrisation, times: Tensor, *shape: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    clips, noise, velocity = (torch.randn(len(times), *shape, generator=generator) for _ in range(3))
    velocity.requires_grad_()
    x_t = parametrisation.add_noise(clips, noise, times)
    alpha, sigma = (c.float().view(-1, *[1] * len(shape)) for c in parametrisation.coefficients(times))
    x_0 = (x_t - sigma * velocity) / (alpha + sigma)
    return clips, noise, x_t, velocity, x_0


def expected_regression(velocity: Tensor, clips: Tensor, noise: Tensor, times: Tensor, grid: Tensor) -> LossOutput:
    config = AVDConfig(timesteps=tuple(float(t) for t in grid), motion=None)
    return AVDObjective(config).on_clips(velocity, noise - clips, times)


def test_lcm_reads_the_clean_prediction_of_its_consistency_function() -> None:
    times = torch.tensor([999, 249, 499])
    clips, noise, x_t, velocity, x_0 = noised(variance_preserving(ALPHAS), times, 4, 8, 8)
    loss, metrics = lcm_terms(ddpm(), DDIM_TIMESTEPS).from_prediction(
        prediction=x_0, x_t=x_t, clips=clips, noise=noise, times=times
    )
    expected = expected_regression(velocity, clips, noise, times, DDIM_TIMESTEPS)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-5)
    assert set(metrics) == set(expected.metrics)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_pcm_with_ddim_reads_the_output_of_the_model(prediction: str) -> None:
    times = torch.tensor([999, 249, 499])
    clips, noise, x_t, velocity, x_0 = noised(variance_preserving(ALPHAS), times, 4, 8, 8)
    name = {"epsilon": "noise", "v_prediction": "v", "sample": "x_0"}[prediction]
    output = variance_preserving(ALPHAS, name).exact_prediction(x_0, x_0 + velocity, times)
    loss, _ = pcm_terms(ddpm(prediction), ddim_solver()).from_prediction(
        prediction=output, x_t=x_t, clips=clips, noise=noise, times=times
    )
    expected = expected_regression(velocity, clips, noise, times, DDIM_TIMESTEPS)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-3, atol=1e-4)


def test_pcm_with_euler_goes_back_from_the_end_of_the_phase() -> None:
    index, end_index = torch.tensor([49, 30, 3]), torch.tensor([25, 25, 0])
    sigma, end = SIGMAS[index], torch.tensor([SIGMAS[24], SIGMAS[24], 0.0])
    clips, noise, x_t, velocity, _ = noised(rectified_flow(1), sigma, 4, 8, 8)
    x_end = x_t + (end - sigma).view(-1, 1, 1, 1) * velocity
    loss, _ = pcm_terms(None, euler_solver()).from_prediction(
        prediction=x_end, x_t=x_t, clips=clips, noise=noise, index=index, end_index=end_index
    )
    expected = expected_regression(velocity, clips, noise, sigma, SIGMAS)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("first", [35, 40])
def test_dcm_goes_one_step_where_the_script_does(first: int) -> None:
    """With its first clip at the lowest index, the script takes the whole batch down one step."""
    index, end_index = torch.tensor([first, 48]), torch.full((2,), 35)
    end = SIGMAS[index - 1] if first == 35 else SIGMAS[end_index - 1]
    clips, noise, x_t, velocity, _ = noised(rectified_flow(1), SIGMAS[index], 4, 5, 3, 3)
    x_end = x_t + (end - SIGMAS[index]).view(-1, 1, 1, 1, 1) * velocity
    terms = dcm_terms(euler_solver(), motion=None, sp_size=1)
    loss, _ = terms.from_prediction(
        prediction=x_end, x_t=x_t, clips=clips, noise=noise, index=index, end_index=end_index
    )
    expected = expected_regression(velocity, clips, noise, SIGMAS[index], SIGMAS[35:])
    torch.testing.assert_close(loss, expected.loss, rtol=1e-3, atol=1e-4)


def test_dcms_detail_experts_go_to_the_phases_end_from_every_index() -> None:
    """Theirs is 0 the lowest, and an index like the others."""
    index, end_index = torch.tensor([0, 30]), torch.tensor([0, 25])
    end = torch.tensor([0.0, SIGMAS[24]])
    clips, noise, x_t, velocity, _ = noised(rectified_flow(1), SIGMAS[index], 4, 5, 3, 3)
    x_end = x_t + (end - SIGMAS[index]).view(-1, 1, 1, 1, 1) * velocity
    terms = dcm_terms(euler_solver(), motion=None, sp_size=1, first_index=0)
    loss, _ = terms.from_prediction(
        prediction=x_end, x_t=x_t, clips=clips, noise=noise, index=index, end_index=end_index
    )
    expected = expected_regression(velocity, clips, noise, SIGMAS[index], SIGMAS)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-3, atol=1e-4)


def test_the_motion_term_sees_clean_predictions_and_not_phase_ends() -> None:
    index, end_index = torch.tensor([45]), torch.tensor([35])
    clips, noise, x_t, velocity, x_0 = noised(rectified_flow(1), SIGMAS[index], 4, 5, 3, 3)
    x_0 = x_0.detach()
    x_end = x_t + (SIGMAS[34] - SIGMAS[45]) * velocity
    terms = dcm_terms(euler_solver(), regression=None, motion=MotionConfig(floor=-9), sp_size=1)
    loss, metrics = terms.from_prediction(
        prediction=x_end, x_t=x_t, clips=clips, noise=noise, index=index, end_index=end_index
    )
    torch.testing.assert_close(metrics["motion/variance"], x_0.var(dim=2, correction=0).mean(), rtol=1e-3, atol=1e-4)
    assert loss.item() == pytest.approx(reference_motion(x_0.tolist(), floor=-9), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, velocity)
    # By x_0 = x_t - sigma velocity; the variance is a mean of squares, which moves by 2 / n of a value's deviation.
    deviation = x_0 - x_0.mean(dim=2, keepdim=True)
    expected = SIGMAS[45] * 0.05 * 2 * deviation / x_0.numel() / (deviation**2).mean()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-7)


def test_both_terms_are_added() -> None:
    index, end_index = torch.tensor([45]), torch.tensor([35])
    clips, noise, x_t, velocity, _ = noised(rectified_flow(1), SIGMAS[index], 4, 5, 3, 3)
    x_end = x_t + (SIGMAS[34] - SIGMAS[45]) * velocity
    both, regression, motion = (
        dcm_terms(euler_solver(), *options, sp_size=1).from_prediction(
            prediction=x_end, x_t=x_t, clips=clips, noise=noise, index=index, end_index=end_index
        )
        for options in [(), (RegressionConfig(), None), (None, MotionConfig())]
    )
    torch.testing.assert_close(both.loss, regression.loss + motion.loss)
    assert both.metrics.keys() == regression.metrics.keys() | motion.metrics.keys()


def test_the_gradient_is_that_of_the_velocity() -> None:
    """Dividing by the length of a phase undoes what multiplied the student's output, and scales nothing."""
    index, end_index = torch.tensor([45, 36]), torch.tensor([35, 35])
    clips, noise, x_t, velocity, _ = noised(rectified_flow(1), SIGMAS[index], 4, 5, 3, 3)
    gradients = []
    for through_end in (True, False):
        leaf = velocity.detach().clone().requires_grad_()
        if through_end:
            x_end = x_t + (SIGMAS[34] - SIGMAS[index]).view(-1, 1, 1, 1, 1) * leaf
            terms = dcm_terms(euler_solver(), motion=None, sp_size=1)
            loss = terms.from_prediction(
                prediction=x_end, x_t=x_t, clips=clips, noise=noise, index=index, end_index=end_index
            ).loss
        else:
            loss = expected_regression(leaf, clips, noise, SIGMAS[index], SIGMAS[35:]).loss
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-5)


def test_images_have_no_motion_term() -> None:
    for make in (
        lambda m: lcm_terms(ddpm(), DDIM_TIMESTEPS, motion=m),
        lambda m: pcm_terms(None, euler_solver(), motion=m),
    ):
        with pytest.raises(ValueError, match=r"images have none\. Leave it out with motion=None, or .*layout="):
            make(MotionConfig())


@pytest.mark.parametrize(
    "make",
    [
        lambda: lcm_terms(ddpm(), DDIM_TIMESTEPS, None),
        lambda: pcm_terms(ddpm(), ddim_solver(), None),
        lambda: pcm_terms(None, euler_solver(), None),
        lambda: dcm_terms(euler_solver(), None, None, sp_size=1),
    ],
)
def test_nothing_to_compute_is_refused_when_the_terms_are_made(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="regression and motion are both None: there is nothing to compute"):
        make()


def test_a_solver_in_place_of_its_timesteps_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got SimpleNamespace\. Pass solver\.ddim_timesteps"):
        lcm_terms(ddpm(), ddim_solver())


def test_what_would_be_broadcast_is_refused() -> None:
    index, end_index = torch.tensor([45, 40]), torch.tensor([35, 35])
    clips, noise, x_t, velocity, _ = noised(rectified_flow(1), SIGMAS[index], 4, 5, 3, 3)
    terms = dcm_terms(euler_solver(), sp_size=1)
    with pytest.raises(ValueError, match=r"prediction must have the shape of x_t, \[2, 4, 5, 3, 3\], got \[1, 4"):
        terms.from_prediction(
            prediction=velocity[:1], x_t=x_t, clips=clips, noise=noise, index=index, end_index=end_index
        )


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: lcm_terms(object(), DDIM_TIMESTEPS), ["alphas_cumprod", "LCM", "58eb52c"]),
        (lambda: pcm_terms(ddpm(), object()), ["ddim_timesteps", "PCM", "b127277"]),
        (lambda: pcm_terms(ddpm("flow"), ddim_solver()), ["prediction_type", "'flow'", "PCM"]),
        (lambda: pcm_terms(ddpm(), types.SimpleNamespace(sigmas=SIGMAS)), ["sigmas_prev", "PCM"]),
        (lambda: dcm_terms(object(), sp_size=1), ["sigmas", "DCM", "c7039e8"]),
    ],
)
def test_a_host_that_has_moved_is_named(make: Callable[..., Any], names: list[str]) -> None:
    with pytest.raises(RuntimeError) as error:
        make()
    assert all(name in str(error.value) for name in names)


def test_an_index_that_the_solver_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="50 points"):
        dcm_terms(euler_solver(), sp_size=1, first_index=50)


def test_the_motion_term_is_refused_where_a_rank_has_some_of_the_frames() -> None:
    with pytest.raises(ValueError, match=r"a rank has 1/2 of a clip's frames.*Use motion=None.*--sp_size 1"):
        dcm_terms(euler_solver(), sp_size=2)
    assert dcm_terms(euler_solver(), motion=None, sp_size=2).terms.objective.motion is None
    with pytest.raises(ValueError, match="at least 1, got 0"):
        dcm_terms(euler_solver(), motion=None, sp_size=0)


def test_the_state_is_the_cache_alone() -> None:
    terms = dcm_terms(euler_solver(), sp_size=1)
    index = torch.tensor([45, 36])
    clips, noise, x_t, velocity, _ = noised(rectified_flow(1), SIGMAS[index], 4, 5, 3, 3)
    for _ in range(3):
        terms.from_prediction(
            prediction=x_t + velocity, x_t=x_t, clips=clips, noise=noise, index=index, end_index=torch.full((2,), 35)
        )
    other = dcm_terms(euler_solver(), sp_size=1)
    other.load_state_dict(terms.state_dict())
    cache = other.terms.objective.regression.cache
    prefix = "terms.objective.regression.cache."
    saved = {name for name in terms.state_dict() if not name.startswith("terms.objective.balance.")}
    assert saved == {prefix + name for name in cache.state_dict()}
    assert cache.seen.tolist() == [i in (36, 45) for i in range(35, 50)]


def test_accumulated_gradients_are_one_iteration() -> None:
    terms = pcm_terms(None, euler_solver(), RegressionConfig(auto_update=False))
    cache = terms.terms.objective.regression.cache
    index = torch.tensor([45])
    for seed in range(2):
        clips, noise, x_t, velocity, _ = noised(rectified_flow(1), SIGMAS[index], 4, 3, 3, seed=seed)
        terms.from_prediction(
            prediction=x_t + velocity, x_t=x_t, clips=clips, noise=noise, index=index, end_index=torch.tensor([25])
        )
        assert not cache.seen.any()
    terms.update()
    assert cache.seen.sum() == 1
    dcm_terms(euler_solver(), regression=None, sp_size=1).update()


def of_a_nearly_right_student(dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments for DCM in which the regression's loss is a small difference, as it is in training."""
    index, end_index = torch.tensor([45, 36]), torch.tensor([35, 35])
    clips, noise, x_t, error, _ = (
        tensor.detach().to(dtype) for tensor in noised(rectified_flow(1), SIGMAS[index], 4, 5, 3, 3)
    )
    step = (SIGMAS[34].double() - SIGMAS[index].double()).view(-1, 1, 1, 1, 1)
    x_end = (x_t.double() + step * (noise.double() - clips.double() + 0.01 * error.double())).to(dtype)
    given = {"prediction": x_end.requires_grad_(), "x_t": x_t, "clips": clips, "noise": noise}
    return given | {"index": index, "end_index": end_index}


def losses(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    loss, metrics = dcm_terms(euler_solver(), sp_size=1).from_prediction(**given)
    return loss, metrics["regression/sample_losses"], metrics["motion/variance"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents_are_compared_in_float32(dtype: torch.dtype) -> None:
    given = of_a_nearly_right_student(dtype)
    float32 = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    for value, expected in zip(losses(given), losses(float32), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def test_latents_in_float64_stay_so() -> None:
    given = of_a_nearly_right_student(torch.float64)
    x_end, x_t, clips, noise, index, _ = (tensor.detach().numpy() for tensor in given.values())
    sigma, end = (s.reshape(-1, 1, 1, 1, 1) for s in (SIGMAS.double().numpy()[index], SIGMAS[34].double().numpy()))
    velocity = (x_end - x_t) / (end - sigma).astype(np.float64)
    _, sample_losses, variance = losses(given)
    assert sample_losses.dtype == torch.float64
    np.testing.assert_allclose(sample_losses, ((velocity - noise + clips) ** 2).mean(axis=(1, 2, 3, 4)), rtol=1e-9)
    np.testing.assert_allclose(variance, (x_t - sigma * velocity).var(axis=2).mean(), rtol=1e-9)


def test_neither_noises_nor_runs_anything_itself() -> None:
    index = torch.tensor([45])
    clips, noise, x_t, velocity, x_0 = noised(rectified_flow(1), SIGMAS[index], 4, 3, 3)
    state = torch.get_rng_state()
    terms = pcm_terms(None, euler_solver())
    terms.from_prediction(
        prediction=x_t + velocity, x_t=x_t, clips=clips, noise=noise, index=index, end_index=torch.tensor([25])
    )
    lcm = lcm_terms(ddpm(), DDIM_TIMESTEPS)
    clips, noise, x_t, _, x_0 = noised(variance_preserving(ALPHAS), DDIM_TIMESTEPS[:1], 4, 3, 3)
    lcm.from_prediction(prediction=x_0, x_t=x_t, clips=clips, noise=noise, times=DDIM_TIMESTEPS[:1])
    assert torch.equal(state, torch.get_rng_state())
    for made in (terms.terms, lcm):
        with pytest.raises(ValueError, match="without predict and clips"):
            made({})


def test_a_loop_of_diffusers_parts_learns_with_it_and_resumes(tmp_path: Path) -> None:
    """LCM's step without its teacher, on diffusers' scheduler and U-Net, saved by accelerate as the script saves."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    terms = lcm_terms(scheduler, DDIM_TIMESTEPS)
    accelerator.register_for_checkpointing(terms)
    optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    latents, text = torch.randn(4, 4, 8, 8), torch.zeros(4, 3, 8)
    losses = []
    for _ in range(8):
        times, noise = DDIM_TIMESTEPS, torch.randn_like(latents)
        x_t = scheduler.add_noise(latents, noise, times)
        noise_pred = unet(x_t, times, encoder_hidden_states=text).sample
        alpha = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
        x_0 = (x_t - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()
        loss, metrics = terms.from_prediction(prediction=x_0, x_t=x_t, clips=latents, noise=noise, times=times)
        # For a noise prediction the velocity's error is that of the noise, (alpha + sigma) / alpha times.
        factor = (1 + ((1 - alpha) / alpha).sqrt()).flatten()
        by_hand = factor**2 * ((noise_pred - noise) ** 2).mean(dim=(1, 2, 3))
        np.testing.assert_allclose(metrics["regression/sample_losses"], by_hand.detach(), rtol=1e-3)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(by_hand.sum().item())
    assert losses[-1] < losses[0]
    accelerator.save_state(tmp_path)
    state = {name: value.clone() for name, value in terms.state_dict().items()}
    terms.objective.regression.cache.reset()
    accelerator.load_state(tmp_path)
    for name, value in terms.state_dict().items():
        torch.testing.assert_close(value, state[name])


def test_the_modules_follow_a_device_move() -> None:
    terms = dcm_terms(euler_solver(), sp_size=1).to("meta")
    assert terms.sigmas.device.type == terms.ends.device.type == "meta"
    assert isinstance(terms, PhasedConsistencyTerms)
    assert terms.terms.objective.regression.cache.means.device.type == "meta"


def test_what_the_scripts_register_is_a_module_of_one_kind_or_the_other() -> None:
    for terms, kind in [
        (lcm_terms(ddpm(), DDIM_TIMESTEPS), HostTerms),
        (pcm_terms(ddpm(), ddim_solver()), HostTerms),
        (pcm_terms(None, euler_solver()), PhasedConsistencyTerms),
    ]:
        assert isinstance(terms, kind)
        assert isinstance(terms, nn.Module)
        assert callable(terms.from_prediction)
