import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from avd_core import FlowMatchingSchedule
from avd_integrations import (
    Parametrisation,
    phase_end_to_velocity,
    rectified_flow,
    trigflow,
    variance_preserving,
)
from avd_integrations._path_checks import check_times
from tensors import randn
from watchers import NoHostWait

# Stable Diffusion's schedule: linear in the root of beta.
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
PATHS = {
    "wan": (lambda p: rectified_flow(1000, p), (20.0, 980.0)),
    "unit": (lambda p: rectified_flow(1, p), (0.02, 0.98)),
    "trigflow": (trigflow, (0.05, 1.5)),
    "ddpm": (lambda p: variance_preserving(ALPHAS_CUMPROD, p), (20, 980)),
}
seeds = st.integers(0, 2**30)
paths = st.sampled_from(sorted(PATHS))
predictions = st.sampled_from(["velocity", "x_0", "noise", "v"])


def draw(seed: int, path: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x_0, noise = torch.randn(2, 3, 4, 5, generator=generator).unbind(0)
    low, high = PATHS[path][1]
    times = low + (high - low) * torch.rand(3, generator=generator, dtype=torch.float64)
    return x_0, noise, times.long() if path == "ddpm" else times


@settings(max_examples=200)
@given(seeds, paths, predictions)
def test_there_and_back_again_in_float32(seed: int, path: str, prediction: str) -> None:
    parametrisation = PATHS[path][0](prediction)
    x_0, noise, times = draw(seed, path)
    x_t = parametrisation.add_noise(x_0, noise, times)
    output = parametrisation.exact_prediction(x_0, noise, times)
    torch.testing.assert_close(parametrisation.x_0(output, x_t, times), x_0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parametrisation.noise(output, x_t, times), noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parametrisation.velocity(output, x_t, times), noise - x_0, rtol=1e-5, atol=1e-5)


@given(seeds)
def test_rectified_flow_is_that_of_the_core(seed: int) -> None:
    schedule, parametrisation = FlowMatchingSchedule(), rectified_flow()
    x_0, noise, times = draw(seed, "wan")
    x_t = parametrisation.add_noise(x_0, noise, times)
    torch.testing.assert_close(x_t, schedule.add_noise(x_0, noise, times))
    torch.testing.assert_close(
        parametrisation.x_0(noise - x_0, x_t, times), schedule.velocity_to_x_0(noise - x_0, x_t, times)
    )
    torch.testing.assert_close(parametrisation.flow_sigma(times), times / 1000)


def test_pure_noise_has_a_velocity_in_rectified_flow_and_trigflow() -> None:
    """At t = 1000, and at pi / 2: where the first step of a few-step student is."""
    noise = randn(0, 2, 3)
    for parametrisation, top in ((rectified_flow(), 1000.0), (trigflow(), math.pi / 2)):
        times = torch.full((2,), top, dtype=torch.float64)
        output = parametrisation.exact_prediction(0.5 * noise, noise, times)
        x_t = parametrisation.add_noise(0.5 * noise, noise, times)
        torch.testing.assert_close(x_t, noise)
        torch.testing.assert_close(parametrisation.velocity(output, x_t, times), 0.5 * noise)


@given(seeds)
def test_trigflow_and_rectified_flow_are_one_path_but_for_scale(seed: int) -> None:
    """x_t / (cos t + sin t) lies on rectified flow's line at sigma = sin t / (cos t + sin t)."""
    parametrisation = trigflow()
    x_0, noise, times = draw(seed, "trigflow")
    x_t = parametrisation.add_noise(x_0, noise, times)
    sigma = parametrisation.flow_sigma(times)
    scale = (times.cos() + times.sin()).view(-1, 1, 1).float()
    torch.testing.assert_close(x_t / scale, FlowMatchingSchedule(1).add_noise(x_0, noise, sigma))


@given(seeds, paths, st.sampled_from(["x_0", "noise", "v"]))
def test_an_error_of_the_prediction_scales_into_the_velocity_by_a_constant(
    seed: int, path: str, prediction: str
) -> None:
    """Known factors: 1 / sigma_flow for x_0, 1 / (1 - sigma_flow) for noise, (alpha + sigma) / n for v."""
    parametrisation = PATHS[path][0](prediction)
    x_0, noise, times = (t.double() for t in draw(seed, path))
    times = times.long() if path == "ddpm" else times
    x_t = parametrisation.add_noise(x_0, noise, times)
    output = parametrisation.exact_prediction(x_0, noise, times)
    error = randn(seed, *x_0.shape)
    change = parametrisation.velocity(output + error, x_t, times) - parametrisation.velocity(output, x_t, times)
    alpha, sigma = (c.view(-1, 1, 1) for c in parametrisation.coefficients(times.double()))
    flow = sigma / (alpha + sigma)
    factor = {"x_0": -1 / flow, "noise": 1 / (1 - flow), "v": (alpha + sigma) / (alpha**2 + sigma**2)}[prediction]
    torch.testing.assert_close(change, factor * error, rtol=1e-6, atol=1e-6)


@given(seeds, st.floats(0.0, 0.4))
def test_the_end_of_a_phase_leads_back_to_the_velocity(seed: int, end: float) -> None:
    x_0, noise, _ = draw(seed, "unit")
    sigma = torch.tensor([0.5, 0.8, 1.0])
    sigma_end = torch.full((3,), end)
    schedule = FlowMatchingSchedule(1)
    x_t, x_end = schedule.add_noise(x_0, noise, sigma), schedule.add_noise(x_0, noise, sigma_end)
    velocity = phase_end_to_velocity(x_end, x_t, sigma, sigma_end)
    torch.testing.assert_close(velocity, noise - x_0, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(schedule.velocity_to_x_0(velocity, x_t, sigma), x_0, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_have_the_dtype_of_the_samples(dtype: torch.dtype) -> None:
    parametrisation = trigflow()
    x_t = randn(0, 2, 3).to(dtype)
    times = torch.tensor([0.5, 1.0])
    for result in (
        parametrisation.add_noise(x_t, x_t, times),
        parametrisation.velocity(x_t, x_t, times),
        parametrisation.x_0(x_t, x_t, times),
        phase_end_to_velocity(x_t, 2 * x_t, times / 2, times / 4),
    ):
        assert result.dtype == dtype


class CopiesBetweenDevices(TorchDispatchMode):
    """Counts them; from host to device they wait, and the meta device, which has no values, does not refuse them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.count += result.device != args[0].device
        return result


@pytest.mark.parametrize("path", PATHS)
def test_no_path_waits_for_a_gpu(path: str) -> None:
    parametrisation = PATHS[path][0]("v")
    x, times = torch.ones(2, 3, device="meta"), torch.ones(2, device="meta")
    with NoHostWait(), CopiesBetweenDevices() as copies:
        for _ in range(3):
            assert parametrisation.velocity(x, parametrisation.add_noise(x, x, times), times).is_meta
            assert parametrisation.flow_sigma(times).is_meta
    # DDPM's table is brought to a device once.
    assert copies.count == (path == "ddpm")


def test_the_table_is_on_every_device_that_asks() -> None:
    parametrisation = variance_preserving(ALPHAS_CUMPROD)
    times = torch.tensor([3, 700])
    for device in ("meta", "cpu", "meta", "cpu"):
        alpha, sigma = parametrisation.coefficients(times.to(device))
        assert alpha.device.type == sigma.device.type == device
        assert alpha.dtype == sigma.dtype == torch.float64
    torch.testing.assert_close(alpha**2, ALPHAS_CUMPROD[times])


def test_what_makes_no_parametrisation_is_refused() -> None:
    with pytest.raises(ValueError, match=r'"noise" \(epsilon\) .* got \'epsilon\''):
        Parametrisation(lambda t: (1 - t, t), "epsilon")
    with pytest.raises(TypeError, match=r"coefficients must be a function .* got str"):
        Parametrisation("flow")
    with pytest.raises(TypeError, match="alphas_cumprod must be the scheduler's tensor of it, got list"):
        variance_preserving([0.9, 0.5])
    with pytest.raises(TypeError, match="num_train_timesteps must be a number, got 'x_0'"):
        rectified_flow("x_0")


ZERO_SNR = torch.linspace(0.999, 0.0, 1000, dtype=torch.float64)  # of zero terminal SNR


@pytest.mark.parametrize(
    ("parametrisation", "timesteps", "message"),
    [
        (rectified_flow(1), (1000, 500), r"alpha \[-999.0, -499.0\].*alpha and sigma must be at least 0"),
        (rectified_flow(), (1.0, 0.5), "clean clips, nearly"),
        (rectified_flow(), (1000, 500, 0), "a sampler's last time, 0, is no step"),
        (rectified_flow(prediction="x_0"), (1000, 0), "a sampler's last time, 0, is no step"),
        (trigflow(), (1000, 900, 757, 522), "alpha and sigma must be at least 0"),
        (trigflow(), (1.5, 0.0), "a sampler's last time"),
        (
            variance_preserving(ZERO_SNR, "v"),
            (0.999, 0.749, 0.5),
            r"whole numbers from 0 to 999, got \[0.999, .* unit that coefficients takes",
        ),
        (variance_preserving(ZERO_SNR, "v"), (1000, 500), "whole numbers from 0 to 999"),
        (variance_preserving(ZERO_SNR, "v"), (500, -1), "whole numbers from 0 to 999"),
        (Parametrisation(lambda t: (1 - t.round(), t.round())), (0.9, 0.8, 0.7), "noise must rise or fall"),
        (Parametrisation(lambda t: (t, t.to("meta") + t)), (0.9, 0.8), "tables be brought to times.device"),
        (variance_preserving(ZERO_SNR), (999, 499), "a prediction of the noise says nothing of the clip"),
        (Parametrisation(lambda t: (t, 1 - t)), (1.0, 0.5), "sigma must be above 0"),
    ],
)
def test_times_that_are_not_steps_on_the_path_are_refused(
    parametrisation: Parametrisation, timesteps: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_times(parametrisation, timesteps)


@pytest.mark.parametrize(
    ("parametrisation", "time_range", "message"),
    [
        (rectified_flow(prediction="noise"), (0, 1000), "a prediction of the noise says nothing of the clip"),
        (rectified_flow(prediction="x_0"), (0, 900), "a prediction of x_0 says nothing of the noise"),
        (rectified_flow(prediction="v"), (0, 1000), 'Say prediction="velocity"'),
        (rectified_flow(1), (0, 1000), "in the unit that coefficients takes"),
        (variance_preserving(ZERO_SNR, "v"), (0, 999), "whole numbers"),
    ],
)
def test_ranges_that_do_not_fit_the_path_are_refused(
    parametrisation: Parametrisation, time_range: tuple[float, float], message: str
) -> None:
    low, high = time_range
    middles = [low + (high - low) * part for part in (0.125, 0.375, 0.625, 0.875)]
    with pytest.raises(ValueError, match=message):
        check_times(parametrisation, middles, time_range)


@pytest.mark.parametrize("path", [rectified_flow(1), Parametrisation(lambda t: (1 - t, t))])
def test_v_on_the_path_of_flow_models_is_refused_with_the_hint(path: Parametrisation) -> None:
    for timesteps in ((1.0, 0.9, 0.5), (0.9,)):
        with pytest.raises(ValueError, match=r'whose hosts call their velocity "v". Say prediction="velocity"'):
            check_times(Parametrisation(path.coefficients, "v"), timesteps)
        check_times(path, timesteps)
    # Where pure noise is the only step, no path can be told from another.
    check_times(trigflow(), (math.pi / 2,))


def test_noise_predictions_near_pure_noise_are_said() -> None:
    times = (995.0, 500.0)
    with pytest.warns(UserWarning, match=r"at timestep 995 alpha is 0.005: its errors are 200 times as large"):
        check_times(rectified_flow(prediction="noise"), times)
    check_times(rectified_flow(prediction="noise"), (980.0, 500.0))
    check_times(rectified_flow(), times)


@pytest.mark.parametrize("coefficients", [lambda t: 1 - t, lambda t: (1.0, t), lambda t: torch.stack([1 - t, t])])
def test_coefficients_are_a_pair_of_tensors(coefficients: Callable[[Tensor], Any]) -> None:
    with pytest.raises(TypeError, match=r"must return \(alpha, sigma\), a tensor \[B\] each"):
        check_times(Parametrisation(coefficients), (1.0, 0.5))


@pytest.mark.parametrize(
    ("parametrisation", "timesteps"),
    [
        (rectified_flow(), (1000, 900, 757, 522)),
        (rectified_flow(1), (0.1, 0.5, 1.0)),
        (trigflow(), (float(torch.tensor(math.pi / 2)), 1.0)),  # above pi / 2 in float32
        (trigflow(), (math.atan(80), 1.5, 1.4, 1.0)),
        (variance_preserving(ZERO_SNR), (998, 399)),
        (variance_preserving(ZERO_SNR), (399,)),
        (Parametrisation(lambda t: (torch.ones_like(t), t), "x_0"), (80.0, 2.0, 0.5)),  # EDM's
        (variance_preserving(ALPHAS_CUMPROD), (999, 749, 499, 249)),
    ],
)
def test_times_of_real_hosts_are_taken(parametrisation: Parametrisation, timesteps: tuple[float, ...]) -> None:
    check_times(parametrisation, timesteps)
    with torch.device("meta"):  # as hosts that build their models there
        check_times(parametrisation, timesteps)


def test_a_path_may_have_parameters() -> None:
    shift = torch.tensor(0.1, requires_grad=True)
    check_times(Parametrisation(lambda t: (1 - t + shift, t)), (0.9, 0.5))
