"""Few-step sampling that runs its high-noise steps at a reduced frame rate: Sec. 3.4 of the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from avd_core._checks import check_floating
from avd_core.schedule import FlowMatchingSchedule

Denoiser = Callable[..., Tensor]
"""``(x_t [B, C, F, H, W], timesteps [B], **conditioning)`` to the prediction of ``x_0``, of the same shape."""

SamplerKind = Literal["re-noise", "ode"]
"""From one of the few steps to the next: its clean prediction with fresh noise, or straight on along its velocity."""

Interpolator = Callable[[Tensor], Tensor]
"""``[B, C, F, H, W]`` to ``[B, C, 2 F - 1, H, W]``: a frame between each neighbouring pair."""


@dataclass(frozen=True)
class SamplingStep:
    """What one step of :class:`HalfRateInterpolationSampler` did.

    Attributes:
        index: Which step, from 0.
        timestep: Where it started.
        rate: 1 ran on all frames, 2 on every second one, and so on.
        x_0: ``[B, C, f, H, W]`` what it predicted, at that rate.
    """

    index: int
    timestep: float
    rate: int
    x_0: Tensor


class HalfRateInterpolationSampler:
    """Samples in a few steps, the first of them on every second frame.

    A step predicts ``x_0`` and adds fresh noise up to the next timestep. If the next step runs at a higher frame rate,
    the interpolator first inserts the missing frames into ``x_0``, and the remaining steps repair its errors (You et
    al., Sec. 3.4 and 8). Without a step at half rate this is the usual few-step sampler of DMD.

    Every second frame is kept, **and the last one**. So 21 frames become 11, and 20 become 11, too: of an even number
    the last two stay neighbours, and nothing is inserted between them. Rates of 4 and more repeat that. So the last
    frame of a clip is always the model's own, and the clip has the length that was asked for.

    Noise is always drawn at the full rate. So with one seed, samples at different rates have the same noise in the
    frames that they share, and can be compared.

    Args:
        denoiser: ``denoiser(x_t, timesteps, **conditioning) -> x_0``, with ``x_t`` ``[B, C, f, H, W]`` and
            ``timesteps`` ``[B]`` floating point. Of a velocity model:
            ``lambda x_t, t, **c: schedule.velocity_to_x_0(model(x_t, t, **c), x_t, t)``.
        interpolator: Inserts a frame between each neighbouring pair, ``[B, C, F, H, W]`` to ``[B, C, 2 F - 1, H, W]``:
            a :class:`LatentFrameInterpolator`, or :func:`interpolate_linearly`, which needs no training. If it has a
            method ``check_input``, that is called before the first step to see whether it can take the clips.
        timesteps: The few steps, falling. Paper: 1000, 900, 757, 522.
        half_rate_steps: How many of them, counted from the first, run at half rate. Paper: 2.
        rates: In place of ``half_rate_steps``: a rate for each step, where rate 4 runs on every fourth frame. Powers of
            two that do not grow, such as ``(4, 2, 1, 1)``. If the last is not 1, the finished sample is interpolated.
        positions: How frames are numbered for the model. With ``"consecutive"`` it sees a shorter clip whose motion is
            twice as fast. ``"strided"`` passes the keyword ``frame_positions``, a list of the frames' places in the
            whole clip, for a denoiser whose rotary embedding can use them.
        sampler: How the student goes from one step to the next, as it was trained: ``"re-noise"`` adds fresh noise, as
            above. ``"ode"`` keeps the noise that is left in ``x_t``, so that nothing is drawn; but frames that were
            inserted have none, and where the rate rises the whole clip gets fresh noise.
        on_step: Called after each step with a :class:`SamplingStep`.
        schedule: How noise is added; None is ``FlowMatchingSchedule()``.

    Raises:
        ValueError: If the timesteps do not fall, there are more half-rate steps than steps, or the rates, positions or
            sampler are not as above.

    Example:
        >>> from avd_core import interpolate_linearly
        >>> sampler = HalfRateInterpolationSampler(lambda x_t, timesteps: 0.5 * x_t, interpolate_linearly)
        >>> noise = torch.randn(1, 16, 21, 6, 8)
        >>> sampler(noise, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([1, 16, 21, 6, 8])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        interpolator: Interpolator,
        timesteps: Sequence[float] = (1000, 900, 757, 522),
        half_rate_steps: int = 2,
        *,
        rates: Sequence[int] | None = None,
        positions: Literal["consecutive", "strided"] = "consecutive",
        sampler: SamplerKind = "re-noise",
        on_step: Callable[[SamplingStep], None] | None = None,
        schedule: FlowMatchingSchedule | None = None,
    ) -> None:
        self.schedule = schedule or FlowMatchingSchedule()
        self.timesteps = _check_timesteps(timesteps, self.schedule)
        self.rates = step_rates(len(self.timesteps), half_rate_steps, rates)
        if positions not in ("consecutive", "strided"):
            raise ValueError(f'positions must be "consecutive" or "strided", got {positions!r}.')
        if sampler not in get_args(SamplerKind):
            raise ValueError(f'sampler must be "re-noise" or "ode", got {sampler!r}.')
        self.denoiser, self.interpolator = denoiser, interpolator
        self.positions, self.sampler, self.on_step = positions, sampler, on_step

    @torch.no_grad()
    def __call__(
        self, noise: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None, **conditioning: Any
    ) -> Tensor:
        """Sample.

        Args:
            noise: ``[B, C, F, H, W]`` standard normal, at the full frame rate.
            generator: Draws the noise between the steps: one for the batch, or one per sample, which makes a sample
                independent of its batch. Same noise and generator, same sample. None is PyTorch's global one.
            conditioning: Handed to the denoiser.

        Returns:
            ``[B, C, F, H, W]`` of ``noise``'s dtype.

        Raises:
            TypeError: If the noise is not floating point.
            ValueError: If it has another shape, has one frame where a step runs at a reduced rate, or is nothing that
                the interpolator can take; or if what the denoiser or the interpolator gives has a wrong shape.
        """
        self._check(noise, generator)
        frames = noise.shape[2]
        x_t = noise[:, :, kept_frames(frames, self.rates[0])]
        for index, (timestep, rate) in enumerate(zip(self.timesteps, self.rates, strict=True)):
            x_0 = self._predict(x_t, timestep, frames, rate, conditioning)
            if self.on_step is not None:
                self.on_step(SamplingStep(index, timestep, rate, x_0))
            following = self.rates[index + 1] if index + 1 < len(self.rates) else 1
            x_0 = raise_frame_rate(x_0, self.interpolator, frames, rate, following)
            if index + 1 < len(self.timesteps):
                now, then = _batch(timestep, noise), _batch(self.timesteps[index + 1], noise)
                if self.sampler == "ode" and rate == following:
                    velocity = self.schedule.x_0_to_velocity(x_0, x_t, now)
                    x_t = self.schedule.euler_step(x_t, velocity, now, then)
                else:
                    fresh = _draw_like(noise, generator)[:, :, kept_frames(frames, following)]
                    x_t = self.schedule.add_noise(x_0, fresh, then)
        return x_0

    def _predict(self, x_t: Tensor, timestep: float, frames: int, rate: int, conditioning: dict[str, Any]) -> Tensor:
        if self.positions == "strided":
            conditioning = {**conditioning, "frame_positions": kept_frames(frames, rate)}
        x_0 = self.denoiser(x_t, _batch(timestep, x_t), **conditioning)
        if x_0.shape != x_t.shape:
            raise ValueError(f"denoiser must return x_0 of shape {list(x_t.shape)}, as it came, got {list(x_0.shape)}.")
        return x_0.to(x_t.dtype)

    def _check(self, noise: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> None:
        check_floating("noise", noise)
        if noise.ndim != 5 or noise.numel() == 0:
            raise ValueError(f"noise must have shape [B, C, F, H, W], none of them 0, got {list(noise.shape)}.")
        if isinstance(generator, Sequence) and len(generator) != len(noise):
            raise ValueError(f"generator has {len(generator)} generators for {len(noise)} samples; pass one each.")
        if max(self.rates) == 1:
            return
        if noise.shape[2] < 2:
            raise ValueError("noise has one frame, which has no half frame rate. Sample images with half_rate_steps=0.")
        check_input = getattr(self.interpolator, "check_input", None)
        if check_input is not None:
            check_input(noise)


def step_rates(steps: int, half_rate_steps: int = 2, rates: Sequence[int] | None = None) -> tuple[int, ...]:
    """The rate of each step, from either way to give it; see :class:`HalfRateInterpolationSampler`.

    Raises:
        ValueError: If they do not fit the number of steps, or are not powers of two that do not grow.
    """
    if rates is None:
        if not 0 <= half_rate_steps <= steps:
            raise ValueError(f"half_rate_steps must be from 0 to {steps}, the number of steps, got {half_rate_steps}.")
        return (2,) * half_rate_steps + (1,) * (steps - half_rate_steps)
    rates = tuple(rates)
    if len(rates) != steps:
        raise ValueError(f"rates needs one for each of the {steps} steps, got {rates}.")
    if any(rate < 1 or rate & (rate - 1) for rate in rates) or any(a < b for a, b in pairwise(rates)):
        raise ValueError(f"rates must be powers of two that do not grow, such as (4, 2, 1, 1), got {rates}.")
    return rates


def kept_frames(frames: int, rate: int) -> list[int]:
    """Which of a clip's frames a step at some rate runs on: ``frames`` is halved to ``frames // 2 + 1`` as many times
    as ``rate`` says, keeping every second one and the last.

    >>> kept_frames(9, 2), kept_frames(8, 2), kept_frames(9, 4)
    ([0, 2, 4, 6, 8], [0, 2, 4, 6, 7], [0, 4, 8])

    Raises:
        ValueError: If there are no frames, or the rate is no power of two.
    """
    if frames < 1 or rate < 1 or rate & (rate - 1):
        raise ValueError(f"kept_frames needs at least one frame and a power of two as rate, got {frames} and {rate}.")
    kept = list(range(frames))
    while rate > 1:
        last = kept[-1]
        kept = kept[::2]
        if kept[-1] != last:
            kept.append(last)
        rate //= 2
    return kept


def raise_frame_rate(x_0: Tensor, interpolator: Interpolator, frames: int, rate: int, target_rate: int) -> Tensor:
    """Insert the frames that a lower frame rate lacks; those that are there stay as they are.

    Args:
        x_0: ``[B, C, f, H, W]``, the frames ``kept_frames(frames, rate)`` of a clip.
        interpolator: See :class:`HalfRateInterpolationSampler`.
        frames: Frames of the whole clip.
        rate: What ``x_0`` has.
        target_rate: What it shall have; not above ``rate``.

    Returns:
        ``[B, C, f', H, W]``, the frames ``kept_frames(frames, target_rate)``.

    Raises:
        ValueError: If ``x_0`` has another number of frames, the rates are no powers of two that fall, or the
            interpolator returns another shape than it should.
    """
    wanted_frames = len(kept_frames(frames, rate))
    if x_0.shape[2] != wanted_frames:
        raise ValueError(f"x_0 of {frames} frames at rate {rate} must have {wanted_frames}, got {x_0.shape[2]}.")
    if target_rate > rate or target_rate < 1:
        raise ValueError(f"target_rate must be from 1 to the rate of x_0, {rate}, got {target_rate}.")
    while rate > target_rate:
        rate //= 2
        length = len(kept_frames(frames, rate))
        # Of an even number, the last two frames are neighbours already.
        paired = x_0 if length % 2 else x_0[:, :, :-1]
        if paired.shape[2] > 1:
            inserted = interpolator(paired).to(x_0.dtype)
            batch, channels, short, *size = paired.shape
            wanted = (batch, channels, 2 * short - 1, *size)
            if inserted.shape != wanted:
                raise ValueError(
                    f"interpolator must return shape {list(wanted)} for {list(paired.shape)}, a frame between each "
                    f"neighbouring pair, got {list(inserted.shape)}."
                )
            x_0 = inserted if length % 2 else torch.cat([inserted, x_0[:, :, -1:]], dim=2)
    return x_0


def _check_timesteps(timesteps: Sequence[float], schedule: FlowMatchingSchedule) -> tuple[float, ...]:
    values = tuple(float(timestep) for timestep in timesteps)
    top = schedule.num_train_timesteps
    if not values or not 0 < values[-1] <= values[0] <= top or not all(a > b for a, b in pairwise(values)):
        raise ValueError(f"timesteps must fall strictly from at most {top:g} to above 0, got {values}.")
    return values


def _batch(timestep: float, like: Tensor) -> Tensor:
    # float32 whatever the samples are: bfloat16 has no 757.
    return torch.full((len(like),), timestep, device=like.device)


def _draw_like(noise: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Standard normal noise, drawn where the generator is: one on the CPU gives the same on every device."""
    if isinstance(generator, Sequence):
        return torch.cat([_draw_like(row.unsqueeze(0), each) for row, each in zip(noise, generator, strict=True)])
    device = noise.device if generator is None else generator.device
    return torch.randn(noise.shape, generator=generator, device=device, dtype=noise.dtype).to(noise.device)
