"""The two terms in a host's own conventions: what every adapter is made of, and the recipe for a host without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from avd_core import AVDConfig, AVDObjective, LossOutput
from avd_integrations.parametrisation import Parametrisation

Layout = Literal["BCFHW", "BFCHW", "BCHW"]


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
        parametrisation: The host's path and prediction.
        predict: ``predict(x_t, times [B], batch) -> output``, the student with gradient, all in the host's layout and
            unit. None where the host runs its student itself: see :meth:`on_prediction` and :meth:`from_prediction`.
        clips: ``clips(batch)`` the real clips' latents in the host's layout, clean and without gradient. None as with
            ``predict``.
        layout: Order of the host's dimensions. With "BCHW", images, the motion term has no frames to look at and must
            be left out.
        loss_scale: The host's loss for one of ours: 1 where it takes means, the number of values of a sample where it
            sums them. A function of a sample's shape without its batch dimension, or a number.

    Raises:
        ValueError: If the motion term is on for images, or counts its frames in another dimension; or if
            ``gradient_ratio`` is set, for which the matching term would have to be known here.
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
    ) -> None:
        super().__init__()
        if layout == "BCHW" and config.motion is not None:
            raise ValueError(
                "The motion term is the variance along frames, and images have none. Use AVDConfig(motion=None)."
            )
        if config.motion is not None and config.motion.frame_dim != 2:
            raise ValueError(f"motion.frame_dim must be 2, as layout says the rest, got {config.motion.frame_dim}.")
        if config.gradient_ratio is not None:
            raise ValueError(
                "AVDConfig(gradient_ratio=...) compares with the matching term's gradient, which an adapter does not "
                "see. Leave it at None, or call avd_core.AVDObjective with matching_loss and matching_output."
            )
        self.objective = AVDObjective(config)
        self.parametrisation, self.layout = parametrisation, layout
        self._predict, self._clips, self._loss_scale = predict, clips, loss_scale

    def forward(self, batch: Any, x_0: Tensor | None = None) -> LossOutput:
        """Both terms; those that the configuration leaves out are left out.

        Args:
            batch: Whatever ``clips`` and ``predict`` read.
            x_0: The student's generated samples in the host's layout, with gradient; for the motion term.

        Returns:
            LossOutput: The scalar to add to the host's loss, in its scale; metrics as :class:`avd_core.AVDObjective`
            has them, unscaled.
        """
        parts = []
        if self.objective.regression is not None:
            parts.append(self.on_clips(batch))
        if self.objective.motion is not None:
            parts.append(self.on_samples(x_0))
        return _sum(parts)

    def from_prediction(self, output: Tensor, x_t: Tensor, clips: Tensor, noise: Tensor, times: Tensor) -> LossOutput:
        """Both terms from what the host's student has predicted on noised clips; none is run here.

        The motion term's sample is the ``x_0`` in that prediction. Arguments are those of :meth:`on_prediction`, and
        the result is that of :meth:`forward`.
        """
        parts = []
        output, x_t = _at_least_float32(output), _at_least_float32(x_t)
        if self.objective.regression is not None:
            parts.append(self.on_prediction(output, x_t, clips, noise, times))
        if self.objective.motion is not None:
            parts.append(self.on_samples(self.parametrisation.x_0(output, x_t, times)))
        return _sum(parts)

    def on_clips(self, batch: Any) -> LossOutput:
        """The regression: noises the batch's clips to drawn few steps, and one forward of the student. Eq. 5-7.

        Raises:
            ValueError: If the terms were made without ``predict`` or ``clips``, or without the regression.
        """
        if self._predict is None or self._clips is None:
            raise ValueError(
                "These terms were made without predict and clips, so they can run no student. Pass both to HostTerms, "
                "or give what your own student predicted to on_prediction or from_prediction."
            )
        clips = self._clips(batch).detach()
        times = self.draw_times(len(clips), clips.device)
        noise = torch.randn_like(clips)
        x_t = self.parametrisation.add_noise(clips, noise, times)
        output = self._predict(x_t, times, batch)
        return self.on_prediction(output, x_t, clips, noise, times)

    def on_prediction(self, output: Tensor, x_t: Tensor, clips: Tensor, noise: Tensor, times: Tensor) -> LossOutput:
        """The regression where the host has noised its clips and run its student on them already.

        Args:
            output: What the student predicted, in the host's layout and parametrisation, with gradient.
            x_t: What it saw.
            clips: The clean clips in it.
            noise: The noise in it.
            times: ``[B]`` members of ``config.timesteps``.
        """
        # In half precision the difference of two near velocities would be mostly rounding.
        output, x_t, clips, noise = (_at_least_float32(tensor) for tensor in (output, x_t, clips, noise))
        prediction = self.parametrisation.velocity(output, x_t, times)
        return self._scaled(self.objective.on_clips(prediction, noise - clips, times), clips)

    def on_samples(self, x_0: Tensor | None) -> LossOutput:
        """The motion term of generated samples. Eq. 8."""
        if x_0 is not None and self.layout == "BFCHW":
            x_0 = rearrange(x_0, "b f c h w -> b c f h w")
        output = self.objective.on_samples(x_0)
        return output if x_0 is None else self._scaled(output, x_0)

    def draw_times(self, count: int, device: torch.device, *, generator: torch.Generator | None = None) -> Tensor:
        """``[count]`` of the few steps, each as likely as the others; without ``generator`` by PyTorch's own."""
        if self.objective.regression is None:
            raise ValueError("AVDConfig leaves out the regression: there is nothing to draw times for.")
        grid = self.objective.regression.cache.timesteps.to(device)
        return grid[torch.randint(len(grid), (count,), device=device, generator=generator)]

    def update(self) -> None:
        """End the optimizer step; does something with ``RegressionConfig(auto_update=False)`` only.

        A collective where ranks are synchronised: call it on every rank.
        """
        regression = self.objective.regression
        if regression is not None and not regression.cache.auto_update:
            regression.cache.update()

    def _scaled(self, output: LossOutput, like: Tensor) -> LossOutput:
        scale = self._loss_scale
        factor = scale(like.shape[1:]) if callable(scale) else scale
        return LossOutput(factor * output.loss, output.metrics)


def _sum(parts: list[LossOutput]) -> LossOutput:
    if not parts:
        raise ValueError("AVDConfig leaves out both the regression and the motion term: nothing to compute.")
    loss = torch.stack([part.loss for part in parts]).sum()
    return LossOutput(loss, {name: value for part in parts for name, value in part.metrics.items()})


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
