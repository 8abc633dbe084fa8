"""The few steps of a student as a scheduler of diffusers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from avd_core import FlowMatchingSchedule
from avd_core.sampling import SamplerKind

logger = logging.getLogger(__name__)

EXPORTED_GRID = "_timesteps"
"""Where ``avd export`` puts the grid in the config of diffusers' scheduler, which has no name for it."""

EXPORTED_SAMPLER = "_sampler"
"""Where it puts how the student goes from one step to the next."""

Generators = torch.Generator | list[torch.Generator]


class FewStepScheduler(SchedulerMixin, ConfigMixin):
    """Samples on one grid of few timesteps, which is saved with it.

    A step takes the clean prediction ``x_0 = x_t - sigma velocity`` and noises it to the next timestep with fresh
    noise, ``(1 - sigma') x_0 + sigma' noise``, with ``sigma = t / num_train_timesteps``; the last gives ``x_0``. This
    is the step of diffusers' ``FlowMatchLCMScheduler``, and the sampler that DMD students are trained for. Students of
    phased consistency (PCM, DCM) go straight on instead, ``x_t + (sigma' - sigma) velocity``, and draw nothing: the
    step of ``FlowMatchEulerDiscreteScheduler``. Between the steps samples are float32, whatever the model computes in.

    The grid belongs to the student: it is used whatever ``num_inference_steps`` a pipeline is called with, and another
    number is warned about once.

    An exported folder is set to that one of the two, which diffusers has and which comes close to the grid, and
    carries the grid itself along: ``FewStepScheduler.from_config(pipeline.scheduler.config)`` is exact.

    Args:
        timesteps: The few steps, falling. Paper: 1000, 900, 757, 522.
        num_train_timesteps: The timestep of pure noise.
        sampler: ``"re-noise"``, or ``"ode"`` to go straight on.

    Raises:
        ValueError: If the timesteps do not fall strictly within ``(0, num_train_timesteps]``, or for another sampler.

    Attributes:
        timesteps: ``[N]`` float32, on the device that :meth:`set_timesteps` was given.
        sigmas: ``[N + 1]`` float32 on the CPU; the last is 0.

    Example:
        >>> scheduler = FewStepScheduler(timesteps=(1000, 900, 757, 522))
        >>> x_t = torch.randn(1, 16, 21, 6, 8)
        >>> for timestep in scheduler.timesteps:
        ...     x_t = scheduler.step(0.1 * x_t, timestep, x_t).prev_sample
    """

    __module__ = "avd_integrations.diffusers"  # as saved pipelines name it, whichever file it is in

    order = 1
    # Its settings may stand in a config beside ours, without a warning.
    _compatibles = ["FlowMatchLCMScheduler", "FlowMatchEulerDiscreteScheduler"]

    @register_to_config
    def __init__(
        self,
        timesteps: Sequence[float] = (1000.0, 900.0, 757.0, 522.0),
        num_train_timesteps: int = 1000,
        sampler: SamplerKind = "re-noise",
    ) -> None:
        values = [float(timestep) for timestep in timesteps]
        if (
            not values
            or not 0 < values[-1] <= values[0] <= num_train_timesteps
            or not all(a > b for a, b in pairwise(values))
        ):
            raise ValueError(
                f"timesteps must fall strictly from at most {num_train_timesteps} to above 0, got {values}."
            )
        if sampler not in get_args(SamplerKind):
            raise ValueError(f'sampler must be "re-noise" or "ode", got {sampler!r}.')
        self.register_to_config(timesteps=values)  # integers and tensors are saved as floats too
        self.sigmas = torch.tensor([*values, 0.0]) / num_train_timesteps
        self._path = FlowMatchingSchedule(num_train_timesteps)
        self._warned = False
        self.set_timesteps()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers', of its own config or of an exported folder's, where grid and sampler have other names."""
        for exported, name in ((EXPORTED_GRID, "timesteps"), (EXPORTED_SAMPLER, "sampler")):
            if exported in config:
                kwargs.setdefault(name, config[exported])
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """Begin a sample.

        Args:
            num_inference_steps: None, or the number of timesteps of the grid; another is warned about and ignored.
            device: Where ``timesteps`` shall be.
        """
        steps = len(self.config.timesteps)
        if num_inference_steps not in (None, steps) and not self._warned:
            logger.warning(
                "This student samples in %d steps, at timesteps %s; num_inference_steps=%s is ignored. Pass %d, and "
                "guidance_scale=1.0 if it was trained with guidance.",
                steps, ", ".join(f"{timestep:g}" for timestep in self.config.timesteps), num_inference_steps, steps,
            )  # fmt: skip
            self._warned = True
        self.timesteps = torch.tensor(self.config.timesteps, device=device)
        self._index = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Which step of the grid the next call of :meth:`step` is."""
        self._index = begin_index

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go from one timestep of the grid to the next.

        Args:
            model_output: ``[B, C, F, H, W]`` the velocity that the model predicts.
            timestep: Ignored, for diffusers' sake: steps are counted from :meth:`set_timesteps` on, so that no device
                is waited for.
            sample: ``[B, C, F, H, W]`` what the model was given.
            generator: Draws the noise: one for the batch, or one per sample. None is PyTorch's global one.
            return_dict: Whether to return a ``SchedulerOutput`` or a tuple of one.

        Returns:
            ``[B, C, F, H, W]`` float32: the sample at the next timestep, after the last the clean one.

        Raises:
            ValueError: If the grid is at its end, or the shapes differ.
        """
        index, steps = self._index, len(self.config.timesteps)
        if index >= steps:
            raise ValueError(f"All {steps} steps are done. Call set_timesteps before the next sample.")
        self._index += 1
        x_0 = self._path.velocity_to_x_0(model_output.float(), sample.float(), self._batch(index, sample))
        x_t = self._following(x_0, sample.float(), index, generator)
        return SchedulerOutput(prev_sample=x_t) if return_dict else (x_t,)

    def _following(self, x_0: Tensor, x_t: Tensor, index: int, generator: Generators | None) -> Tensor:
        """From a step and its clean prediction to what the next one starts from."""
        if index + 1 == len(self.config.timesteps):
            return x_0
        if self.config.sampler == "ode":
            return self._straight_on(x_0, x_t, index)
        return self._add_noise(x_0, randn_tensor(x_0.shape, generator, x_0.device, x_0.dtype), index + 1)

    def _add_noise(self, x_0: Tensor, noise: Tensor, index: int) -> Tensor:
        return self._path.add_noise(x_0, noise, self._batch(index, x_0))

    def _straight_on(self, x_0: Tensor, x_t: Tensor, index: int) -> Tensor:
        now, then = self._batch(index, x_t), self._batch(index + 1, x_t)
        return self._path.euler_step(x_t, self._path.x_0_to_velocity(x_0, x_t, now), now, then)

    def _batch(self, index: int, like: Tensor) -> Tensor:
        return torch.full((len(like),), self.config.timesteps[index], device=like.device)
