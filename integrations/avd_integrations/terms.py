"""The two terms in a host's own conventions: what every adapter is made of, and the recipe for a host without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from avd_core import AVDConfig, AVDObjective, LossMeanCache, LossOutput
from avd_core._checks import check_gradient, check_number, check_timesteps
from avd_integrations._path_checks import check_noising, check_times
from avd_integrations.parametrisation import Parametrisation

Layout = Literal["BCFHW", "BFCHW", "BCHW"]

_LOOKS = 8
"""Calls whose ``x_t`` is looked at while none can tell, as pure noise says nothing of the clips."""


class HostTerms(nn.Module):
    """Adaptive regression on real clips and clipped temporal variance of samples, for any distiller.

    Three callables say how the host sees the world::

        terms = HostTerms(
            AVDConfig(timesteps=(0.999, 0.9, 0.757, 0.522)),    # the student's few steps, in the host's own unit
            Parametrisation(coefficients, "velocity"),          # 1. times to (alpha, sigma); what the model predicts
            predict=lambda x_t, t, batch: student(x_t, t, batch["text"]),                              # 2.
            clips=lambda batch: batch["latents"],                                                      # 3.
        )
        loss = host_loss + terms(batch, generated_x_0).loss

    Layout, time, prediction and the scale of the loss are converted here; the maths is :class:`avd_core.AVDObjective`.
    The only state is the objective's: put ``state_dict()`` into the host's checkpoint.

    Args:
        config: Hyperparameters. ``timesteps`` are the student's few steps in the host's unit. ``motion.frame_dim``
            counts in ``[B, C, F, H, W]``, its default 2, whatever the layout.
        parametrisation: The host's path and prediction. ``timesteps`` are looked up on it once, here.
        predict: ``predict(x_t, times [B], batch) -> prediction``, the student with gradient, all in the host's layout
            and unit. None where the host runs its student itself: see :meth:`on_prediction` and
            :meth:`from_prediction`.
        clips: ``clips(batch)`` the real clips' latents in the host's layout, clean and without gradient. None as with
            ``predict``.
        layout: Order of the host's dimensions. With "BCHW", images, the motion term has no frames to look at and must
            be left out.
        loss_scale: The host's loss for one of ours: 1 where it takes means, the number of values of a sample where it
            sums them. A function of a sample's shape without its batch dimension, or a positive number.
        time_range: ``(low, high)`` for hosts that draw times continuously, in their unit; in place of
            ``config.timesteps``. Times are then drawn uniformly from it, and the cache is
            :meth:`avd_core.LossMeanCache.uniform` over it.
        bins: Into how many parts the cache divides ``time_range``, at least 2.

    Raises:
        TypeError: If ``config`` or ``parametrisation`` is something else.
        ValueError: If both terms are left out; if the motion term is on for images, or counts its frames in another
            dimension; if ``gradient_ratio`` is set, for which the matching term would have to be known here, or
            ``regression.judged="excess"``, for which the teacher would; for an unknown layout, a ``loss_scale`` that is
            not positive, ``timesteps`` beside a ``time_range``, fewer than 2 ``bins``, or times that are not on the
            path: in another unit, say.
    """

    def __init__(
        self,
        config: AVDConfig,
        parametrisation: Parametrisation,
        predict: Callable[[Tensor, Tensor, Any], Tensor] | None = None,
        clips: Callable[[Any], Tensor] | None = None,
        *,
        layout: Layout = "BCFHW",
        loss_scale: float | Callable[[torch.Size], float] = 1.0,
        time_range: tuple[float, float] | None = None,
        bins: int = 20,
    ) -> None:
        super().__init__()
        self.objective = AVDObjective(_with_bins(config, time_range, bins))
        config = self.objective.config
        if config.regression is None and config.motion is None:
            raise ValueError("regression and motion are both None: there is nothing to compute.")
        if not isinstance(parametrisation, Parametrisation):
            raise TypeError(
                "parametrisation must be a Parametrisation, such as rectified_flow() returns, got "
                f"{type(parametrisation).__name__}."
            )
        if layout not in get_args(Layout):
            raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}.")
        if not callable(loss_scale):
            check_number("loss_scale", loss_scale, above=0)
        if layout == "BCHW" and config.motion is not None:
            raise ValueError(
                "The motion term is the variance along frames, and images have none. Leave it out with motion=None, or "
                'for clips say layout="BCFHW" or "BFCHW".'
            )
        if config.motion is not None and config.motion.frame_dim != 2:
            raise ValueError(f"motion.frame_dim must be 2, as layout says the rest, got {config.motion.frame_dim}.")
        if config.gradient_ratio is not None:
            raise ValueError(
                "AVDConfig(gradient_ratio=...) compares with the matching term's gradient, which an adapter does not "
                "see. Leave it at None, or call avd_core.AVDObjective with matching_loss and matching_output."
            )
        if config.regression is not None and config.regression.judged == "excess":
            raise ValueError(
                'RegressionConfig(judged="excess") compares with the teacher\'s own error, and an adapter runs no '
                'teacher. Set "loss" or "relative", or call avd_core.AVDObjective with teacher_prediction.'
            )
        if config.regression is not None:
            check_times(parametrisation, config.timesteps, time_range)
        self.parametrisation, self.layout, self._loss_scale = parametrisation, layout, loss_scale
        self._time_range, self._looks_left = time_range, _LOOKS
        # In a tuple, as a module among them would become a part of this one, and of its state.
        self._callables = predict, clips

    def forward(self, batch: Any, x_0: Tensor | None = None) -> LossOutput:
        """Both terms; those that the configuration leaves out are left out.

        Args:
            batch: Whatever ``clips`` and ``predict`` read.
            x_0: The student's generated samples in the host's layout, with gradient; for the motion term.

        Returns:
            LossOutput: The scalar to add to the host's loss, in its scale; metrics as :class:`avd_core.AVDObjective`
            has them, unscaled.

        Raises:
            TypeError, ValueError: If what is given, or what ``clips`` and ``predict`` return, has another layout or
                shape, is not floating, or has no gradient where it should. No loss is recorded then.
        """
        parts = []
        if self.objective.motion is not None:
            self._check_samples(x_0)
        if self.objective.regression is not None:
            parts.append(self.on_clips(batch))
        if self.objective.motion is not None:
            parts.append(self.on_samples(x_0))
        return _sum(parts)

    def from_prediction(
        self, *, prediction: Tensor, x_t: Tensor, clips: Tensor, noise: Tensor, times: Tensor
    ) -> LossOutput:
        """Both terms from what the host's student has predicted on noised clips; none is run here.

        The motion term's sample is the ``x_0`` in that prediction. Arguments are those of :meth:`on_prediction`, and
        the result is that of :meth:`forward`.
        """
        self._check_prediction(prediction, x_t, clips, noise, times)
        self._check_dimensions("clips", clips)
        self._check_noising(x_t, clips, noise, times)
        parts = []
        if self.objective.regression is not None:
            parts.append(self._regression(prediction, x_t, clips, noise, times))
        if self.objective.motion is not None:
            x_0 = self.parametrisation.x_0(_at_least_float32(prediction), _at_least_float32(x_t), times)
            parts.append(self.on_samples(x_0))
        return _sum(parts)

    def on_clips(self, batch: Any) -> LossOutput:
        """The regression: noises the batch's clips to drawn few steps, and one forward of the student. Eq. 5-7.

        Raises:
            ValueError: If the terms were made without ``predict`` or ``clips``, or without the regression.
        """
        predict, clips_of = self._callables
        if predict is None or clips_of is None:
            raise ValueError(
                "These terms were made without predict and clips, so they can run no student. Pass both to HostTerms, "
                "or give what your own student predicted to on_prediction or from_prediction."
            )
        clips = clips_of(batch)
        self._check_tensor("what clips returned", clips)
        clips = clips.detach()
        times = self.draw_times(len(clips), clips.device)
        noise = torch.randn_like(clips)
        x_t = self.parametrisation.add_noise(clips, noise, times)
        prediction = predict(x_t, times, batch)
        if not isinstance(prediction, Tensor):
            raise TypeError(
                f"predict must return the prediction, a torch.Tensor, got {type(prediction).__name__}. Return the "
                "entry of it that is the prediction."
            )
        return self.on_prediction(prediction=prediction, x_t=x_t, clips=clips, noise=noise, times=times)

    def on_prediction(
        self, *, prediction: Tensor, x_t: Tensor, clips: Tensor, noise: Tensor, times: Tensor
    ) -> LossOutput:
        """The regression where the host has noised its clips and run its student on them already.

        That ``x_t`` is made of the clips and the noise at these times is looked at, which waits for the device, until
        a call can tell: not one at pure noise, with as much noise as clip, or with values that are not finite. At most
        eight calls are looked at; none under ``torch.compile``.

        Args:
            prediction: What the student predicted, in the host's layout and parametrisation, with gradient.
            x_t: What it saw.
            clips: The clean clips in it.
            noise: The noise in it.
            times: ``[B]`` members of ``config.timesteps``, or from the range; others count for the nearest.

        Raises:
            TypeError, ValueError: As :meth:`forward`; for times that are not ``[B]`` or not on the path; if ``x_t`` is
                made of something else.
        """
        self._check_prediction(prediction, x_t, clips, noise, times)
        self._check_noising(x_t, clips, noise, times)
        return self._regression(prediction, x_t, clips, noise, times)

    def on_samples(self, x_0: Tensor | None) -> LossOutput:
        """The motion term of generated samples, with gradient and in the host's layout. Eq. 8."""
        x_0 = self._check_samples(x_0)
        x_0_BCFHW = rearrange(x_0, "b f c h w -> b c f h w") if self.layout == "BFCHW" else x_0
        return self._scaled(self.objective.on_samples(x_0_BCFHW), x_0_BCFHW)

    def draw_times(self, count: int, device: torch.device, *, generator: torch.Generator | None = None) -> Tensor:
        """``[count]`` of the few steps, each as likely as the others, or uniformly from ``time_range``.

        Without ``generator`` by PyTorch's own.
        """
        if self.objective.regression is None:
            raise ValueError("AVDConfig leaves out the regression: there is nothing to draw times for.")
        if self._time_range is not None:
            low, high = self._time_range
            return low + (high - low) * torch.rand(count, device=device, generator=generator)
        grid = self.objective.timesteps.to(device)
        return grid[torch.randint(len(grid), (count,), device=device, generator=generator)]

    def update(self) -> None:
        """End the optimizer step; does something with ``RegressionConfig(auto_update=False)`` only.

        A collective where ranks are synchronised: call it on every rank.
        """
        self.objective.update()

    def _regression(self, prediction: Tensor, x_t: Tensor, clips: Tensor, noise: Tensor, times: Tensor) -> LossOutput:
        # In half precision the difference of two near velocities would be mostly rounding.
        prediction, x_t, clips, noise = (_at_least_float32(tensor) for tensor in (prediction, x_t, clips, noise))
        velocity = self.parametrisation.velocity(prediction, x_t, times)
        regression = self.objective.config.regression
        judged_by = {"clips": clips} if regression is not None and regression.judged == "relative" else {}
        return self._scaled(self.objective.on_clips(velocity, noise - clips, times, **judged_by), clips)

    def _check_samples(self, x_0: Tensor | None) -> Tensor:
        if x_0 is None:
            raise ValueError(
                "The motion term needs x_0, the student's generated samples. Pass them, or leave the part out with "
                "AVDConfig(motion=None)."
            )
        self._check_tensor("x_0", x_0)
        self._check_dimensions("x_0", x_0)
        check_gradient("x_0", x_0, self.training)
        return x_0

    def _check_dimensions(self, name: str, tensor: Tensor) -> None:
        """Require frames and channels that the motion term takes, as the core knows nothing of ``layout``."""
        if self.objective.config.motion is None:
            return
        size = dict(zip(self.layout, tensor.shape, strict=True))
        channels = self.objective.config.motion.channels
        if channels is not None and size["C"] != channels:
            other = "BCFHW" if self.layout == "BFCHW" else "BFCHW"
            raise ValueError(
                f"motion.channels is {channels}, and {name} has shape {list(tensor.shape)} in layout {self.layout}, "
                f"{size['C']} channels. "
                + (
                    f'Frames and channels look swapped: say layout="{other}".'
                    if size["F"] == channels
                    else "Is it in another layout or latent space?"
                )
            )
        if size["F"] < 2:
            raise ValueError(
                f"The motion term needs at least 2 frames, and {name} has shape {list(tensor.shape)} in layout "
                f"{self.layout}."
            )

    def _check_prediction(self, prediction: Any, x_t: Any, clips: Any, noise: Any, times: Any) -> None:
        given = {"clips": clips, "prediction": prediction, "x_t": x_t, "noise": noise}
        for name, tensor in given.items():
            self._check_tensor(name, tensor, like=clips)
        check_timesteps(times, clips)
        check_gradient("prediction", prediction, self.training)

    def _check_noising(self, x_t: Tensor, clips: Tensor, noise: Tensor, times: Tensor) -> None:
        """Once it has told something, never again: it waits for the device. The meta device has no values."""
        if self._looks_left and not (torch.compiler.is_compiling() or x_t.is_meta):
            tells = check_noising(self.parametrisation, x_t=x_t, clips=clips, noise=noise, times=times)
            self._looks_left = 0 if tells else self._looks_left - 1

    def _check_tensor(self, name: str, tensor: Any, like: Tensor | None = None) -> None:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point torch.Tensor of latents, got {kind}.")
        if tensor.ndim != len(self.layout):
            raise ValueError(f"{name} must be {list(self.layout)}, as layout says, got shape {list(tensor.shape)}.")
        if like is not None and tensor.shape != like.shape:
            raise ValueError(
                f"{name} must have the shape of the clips, {list(like.shape)}, got {list(tensor.shape)}: nothing is "
                "broadcast here."
            )

    def _scaled(self, output: LossOutput, like: Tensor) -> LossOutput:
        scale = self._loss_scale
        factor = scale(like.shape[1:]) if callable(scale) else scale
        return LossOutput(factor * output.loss, output.metrics)


def _with_bins(config: AVDConfig, time_range: tuple[float, float] | None, bins: int) -> AVDConfig:
    """The configuration with the middle of each bin as its grid."""
    if time_range is None or not isinstance(config, AVDConfig):  # which the objective refuses
        return config
    if "timesteps" in config.model_fields_set:
        raise ValueError(
            f"time_range={time_range} and AVDConfig(timesteps={config.timesteps}) both say which times are drawn. "
            "Leave out timesteps where times are continuous, or time_range for a student of few steps."
        )
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}: the parts of time_range whose losses are compared.")
    grid = LossMeanCache.uniform(*time_range, bins).timesteps.tolist()
    return AVDConfig.model_validate({**config.model_dump(), "timesteps": grid})


def _sum(parts: list[LossOutput]) -> LossOutput:
    loss = torch.stack([part.loss for part in parts]).sum()
    return LossOutput(loss, {name: value for part in parts for name, value in part.metrics.items()})


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
