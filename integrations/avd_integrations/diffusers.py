"""Students in diffusers: the exact few steps as a scheduler, and Wan's pipeline at half the frame rate.

A folder that ``avd export`` wrote is loaded by diffusers alone; this module adds the exact grid and half rate.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from avd_core import FlowMatchingSchedule, LatentFrameInterpolator, kept_frames, raise_frame_rate, step_rates

try:
    from diffusers import (
        AutoencoderKLWan,
        ConfigMixin,
        FlowMatchLCMScheduler,
        ModelMixin,
        SchedulerMixin,
        WanPipeline,
        WanTransformer3DModel,
    )
    from diffusers.configuration_utils import register_to_config
    from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
    from diffusers.schedulers.scheduling_utils import SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel
except ImportError as error:
    raise ImportError(
        f"avd_integrations.diffusers needs diffusers with its Wan pipeline, and transformers: {error}. Install them "
        'with pip install "avd-core[trainer,wan]".'
    ) from error

logger = logging.getLogger(__name__)

# Where ``avd export`` puts the grid in the config of diffusers' scheduler, which has no name for it.
_EXPORTED_GRID = "_timesteps"

Generators = torch.Generator | list[torch.Generator]


class FewStepScheduler(SchedulerMixin, ConfigMixin):
    """Samples on one grid of few timesteps, which is saved with it.

    A step takes the clean prediction ``x_0 = x_t - sigma velocity`` and noises it to the next timestep with fresh
    noise, ``(1 - sigma') x_0 + sigma' noise``, with ``sigma = t / num_train_timesteps``; the last gives ``x_0``. This
    is the step of diffusers' ``FlowMatchLCMScheduler``, and the sampler that DMD students are trained for. Between the
    steps samples are float32, whatever the model computes in.

    The grid belongs to the student: it is used whatever ``num_inference_steps`` a pipeline is called with, and another
    number is warned about once.

    An exported folder is set to ``FlowMatchLCMScheduler``, which diffusers has and which comes close to the grid, and
    carries the grid itself along: ``FewStepScheduler.from_config(pipeline.scheduler.config)`` is exact.

    Args:
        timesteps: The few steps, falling. Paper: 1000, 900, 757, 522.
        num_train_timesteps: The timestep of pure noise.

    Raises:
        ValueError: If the timesteps do not fall strictly within ``(0, num_train_timesteps]``.

    Attributes:
        timesteps: ``[N]`` float32, on the device that :meth:`set_timesteps` was given.
        sigmas: ``[N + 1]`` float32 on the CPU; the last is 0.

    Example:
        >>> scheduler = FewStepScheduler(timesteps=(1000, 900, 757, 522))
        >>> x_t = torch.randn(1, 16, 21, 6, 8)
        >>> for timestep in scheduler.timesteps:
        ...     x_t = scheduler.step(0.1 * x_t, timestep, x_t).prev_sample
    """

    order = 1
    # Its settings may stand in a config beside ours, without a warning.
    _compatibles = ["FlowMatchLCMScheduler"]

    @register_to_config
    def __init__(
        self, timesteps: Sequence[float] = (1000.0, 900.0, 757.0, 522.0), num_train_timesteps: int = 1000
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
        self.register_to_config(timesteps=values)  # integers and tensors are saved as floats too
        self.sigmas = torch.tensor([*values, 0.0]) / num_train_timesteps
        self._path = FlowMatchingSchedule(num_train_timesteps)
        self._warned = False
        self.set_timesteps()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers', of its own config or of an exported folder's, whose grid stands under another name there."""
        if _EXPORTED_GRID in config:
            kwargs.setdefault("timesteps", config[_EXPORTED_GRID])
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
        x_t = self._following(x_0, index, generator)
        return SchedulerOutput(prev_sample=x_t) if return_dict else (x_t,)

    def _following(self, x_0: Tensor, index: int, generator: Generators | None) -> Tensor:
        """From the clean prediction of a step to what the next one starts from."""
        if index + 1 == len(self.config.timesteps):
            return x_0
        return self._add_noise(x_0, randn_tensor(x_0.shape, generator, x_0.device, x_0.dtype), index + 1)

    def _add_noise(self, x_0: Tensor, noise: Tensor, index: int) -> Tensor:
        return self._path.add_noise(x_0, noise, self._batch(index, x_0))

    def _batch(self, index: int, like: Tensor) -> Tensor:
        return torch.full((len(like),), self.config.timesteps[index], device=like.device)


class LatentFrameInterpolatorModel(ModelMixin, LatentFrameInterpolator, ConfigMixin):
    """:class:`avd_core.LatentFrameInterpolator` as a model of diffusers: a pipeline saves, loads, casts and moves it.

    The files are the same: either class loads what the other has saved. New, it interpolates linearly.

    Args:
        channels: C, latent channels. Wan2.1: 16.
        widths: Channels of the three levels; multiples of 8.

    Raises:
        ValueError: If an option is out of range.

    Attributes:
        chunk_size: Pairs that the network takes at once, as there; None by default. Is not saved.
    """

    @register_to_config
    def __init__(self, channels: int = 16, widths: Sequence[int] = (32, 64, 128)) -> None:
        # ModelMixin's own would call the network's without arguments.
        LatentFrameInterpolator.__init__(self, channels, widths)
        self._gradient_checkpointing_func = None


class WanHalfRatePipeline(WanPipeline):
    """diffusers' ``WanPipeline`` with its high-noise steps at half the frame rate (You et al., Sec. 3.4).

    The loop is diffusers' own: it gets latents of fewer frames and, for the time of a call, a scheduler that inserts
    the missing ones into the clean prediction before it is noised again. Which frames are kept, and which noise is
    drawn, is as :class:`avd_core.HalfRateInterpolationSampler` says; so is the result.

    Args:
        tokenizer: Of the text encoder; may be missing if prompts come as ``prompt_embeds``.
        text_encoder: May be missing if prompts come as ``prompt_embeds``.
        vae: May be missing with ``output_type="latent"``.
        scheduler: A :class:`FewStepScheduler`, which knows the student's steps; that of an exported folder becomes one.
        transformer: The student.
        transformer_2: The student for low noise, in pipelines that have two.
        interpolator: Inserts the frames. May be missing if all steps run at the full rate.
        boundary_ratio: As in ``WanPipeline``: the second transformer takes over below that part of the timesteps.
        expand_timesteps: As in ``WanPipeline``; such models run at the full rate only.

    Example:
        ::

            pipeline = WanHalfRatePipeline.from_pretrained("student/", dtype=torch.bfloat16).to("cuda")
            frames = pipeline("a red square moves right").frames[0]
    """

    scheduler: SchedulerMixin
    interpolator: LatentFrameInterpolatorModel | None

    _optional_components = [*WanPipeline._optional_components, "tokenizer", "text_encoder", "vae", "interpolator"]
    # The interpolator is in no offload sequence and not excluded from offloading: it is loaded when it is first called
    # and pushes nothing out. In the sequence it would push out the transformer, which runs next.

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: UMT5EncoderModel | None = None,
        vae: AutoencoderKLWan | None = None,
        *,
        scheduler: FewStepScheduler | FlowMatchLCMScheduler,
        transformer: WanTransformer3DModel | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        interpolator: LatentFrameInterpolatorModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        if isinstance(scheduler, FlowMatchLCMScheduler) and _EXPORTED_GRID in scheduler.config:
            scheduler = FewStepScheduler.from_config(scheduler.config)  # an exported folder's
        super().__init__(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
            transformer_2=transformer_2,
            boundary_ratio=boundary_ratio,
            expand_timesteps=expand_timesteps,
        )
        self.register_modules(interpolator=interpolator)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        output_type: str = "np",
        half_rate_steps: int = 2,
        rates: Sequence[int] | None = None,
        positions: Literal["consecutive", "strided"] = "consecutive",
        **options: Any,
    ) -> WanPipelineOutput | tuple[Any, ...]:
        """Generate clips.

        Args:
            prompt: What to show; a list for several clips.
            height: Of the clips, in pixels; a multiple of 16.
            width: Likewise.
            num_frames: Of the clips; for Wan, one more than a multiple of 4.
            num_inference_steps: May be left out: the scheduler knows the steps.
            guidance_scale: 1 is none. Students of this package have learned the teacher's guidance.
            generator: Draws all noise, also between the steps (where ``WanPipeline`` draws from the global one): one
                for the batch, or a list of one per clip.
            latents: ``[B, C, F, H, W]`` noise to start from, **at the full frame rate**; drawn if None.
            output_type: As in ``WanPipeline``; ``"latent"`` for ``[B, C, F, H, W]`` float32.
            half_rate_steps: How many steps, counted from the first, run at half rate. Paper: 2. 0 is ``WanPipeline``.
            rates: In place of ``half_rate_steps``: for each step, on one frame of how many it runs; powers of two that
                do not grow, such as ``(4, 2, 1, 1)``.
            positions: What the transformer is told about where its frames are. ``"consecutive"``: nothing, they are a
                shorter clip. ``"strided"``: its rotary embedding has the frames at their places in the whole clip.
            options: All others of ``WanPipeline``. A ``callback_on_step_end`` sees the latents at the frame rate of the
                step to come, and may replace them by others of that rate. A call that it interrupts returns the
                latents that there are, as ``WanPipeline`` does: at half rate, half the frames.

        Returns:
            As ``WanPipeline``.

        Raises:
            TypeError: If the scheduler is no :class:`FewStepScheduler`.
            ValueError: If more steps run at half rate than there are, the rates are none, a component is missing, the
                clip has one latent frame or is nothing that the interpolator takes, or the places of its frames are
                beyond what the transformer has.
        """
        scheduler = self.scheduler
        if not isinstance(scheduler, FewStepScheduler):
            raise TypeError(
                f"scheduler must be a FewStepScheduler, got a {type(scheduler).__name__}. Make one of the "
                "timesteps it was trained at: pipeline.scheduler = FewStepScheduler(timesteps=(1000, 900, 757, 522))."
            )
        if prompt is not None and self.text_encoder is None:
            raise ValueError("This pipeline has no text encoder. Pass prompt_embeds in place of prompt.")
        if guidance_scale > 1 and self.text_encoder is None and options.get("negative_prompt_embeds") is None:
            raise ValueError(
                f"guidance_scale={guidance_scale:g} needs negative_prompt_embeds: this pipeline has no text encoder. "
                "Pass them, or leave guidance_scale at 1: the student has learned its teacher's guidance."
            )
        if output_type != "latent" and self.vae is None:
            raise ValueError('This pipeline has no VAE to decode latents with. Pass output_type="latent".')
        steps = len(scheduler.config.timesteps)
        step_rates_ = step_rates(steps, half_rate_steps, rates)
        shape = self._latent_shape(height, width, num_frames) if latents is None else latents.shape
        transformers = self._transformers() if positions == "strided" else []
        self._check(step_rates_, positions, shape, transformers)
        scheduler.set_timesteps(num_inference_steps)  # warns of another number of steps
        passing = _HalfRateScheduler(scheduler, step_rates_, self.interpolator, generator, transformers)
        try:
            self.scheduler = passing
            return super().__call__(
                prompt,
                height=height,
                width=width,
                num_frames=num_frames,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generator,
                latents=latents,
                output_type=output_type,
                **options,
            )
        finally:
            passing.end()
            self.scheduler = scheduler

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ``WanPipeline``'s; within a call of this pipeline, only the frames that its first step runs on."""
        latents: Tensor = super().prepare_latents(*args, **kwargs)
        return self.scheduler.begin(latents) if isinstance(self.scheduler, _HalfRateScheduler) else latents

    def to_json_string(self) -> str:
        """The content of ``model_index.json``; it names diffusers' class, so that diffusers loads the folder too."""
        config = json.loads(super().to_json_string())
        return json.dumps({**config, "_class_name": "WanPipeline"}, indent=2, sort_keys=True) + "\n"

    def _transformers(self) -> list[WanTransformer3DModel]:
        return [model for model in (self.transformer, self.transformer_2) if model is not None]

    def _latent_shape(self, height: int, width: int, num_frames: int) -> torch.Size:
        """What ``WanPipeline`` will draw, but for the batch; an odd ``num_frames`` it rounds to this too."""
        return torch.Size(
            (
                1,
                self._transformers()[0].config.in_channels,
                num_frames // self.vae_scale_factor_temporal + 1,
                height // self.vae_scale_factor_spatial,
                width // self.vae_scale_factor_spatial,
            )
        )

    def _check(
        self, rates: Sequence[int], positions: str, shape: torch.Size, transformers: Sequence[WanTransformer3DModel]
    ) -> None:
        if positions not in ("consecutive", "strided"):
            raise ValueError(f'positions must be "consecutive" or "strided", got {positions!r}.')
        if max(rates) == 1:
            return
        if self.interpolator is None:
            raise ValueError(
                "This pipeline has no interpolator to insert frames with. Pass half_rate_steps=0, or load one: "
                "WanHalfRatePipeline.from_pretrained(..., interpolator=LatentFrameInterpolatorModel.from_pretrained"
                '("folder")).'
            )
        if self.config.expand_timesteps:
            raise ValueError(
                "A pipeline with expand_timesteps (Wan2.2 TI2V) counts timesteps per frame and cannot change the frame "
                "rate. Pass half_rate_steps=0."
            )
        self.interpolator.check_input(torch.empty(shape, device="meta"))
        if shape[2] < 2:
            raise ValueError(
                "A clip of one latent frame has no half frame rate. Pass half_rate_steps=0, or more frames."
            )
        for transformer in transformers:
            _check_positions(transformer, range(shape[2]))


@contextmanager
def frame_positions(transformer: WanTransformer3DModel, positions: Sequence[int]) -> Iterator[None]:
    """Give the frames of a clip other places in a transformer's rotary embedding.

    Inside, the transformer takes the frame ``i`` of a clip to be at ``positions[i]``. So a clip at half rate can keep
    the places that its frames have in the whole one.

    Args:
        transformer: Of Wan, with one latent frame per token.
        positions: As many as the clips will have frames; each in ``[0, rope_max_seq_len)``.

    Raises:
        ValueError: If the transformer has no such place, or its tokens have several frames.

    Example:
        ::

            with frame_positions(transformer, kept_frames(21, rate=2)):
                velocity = transformer(latents[:, :, ::2], timesteps, captions).sample
    """
    _check_positions(transformer, positions)
    rope, rows = transformer.rope, len(positions)
    temporal = rope.attention_head_dim - 4 * (rope.attention_head_dim // 6)  # the rest is of height and width
    before = {name: getattr(rope, name)[:rows, :temporal].clone() for name in ("freqs_cos", "freqs_sin")}
    try:
        for name in before:
            # In place, since compiled graphs and offloading hold on to the tensors themselves.
            table = getattr(rope, name)
            table[:rows, :temporal] = table[list(positions), :temporal]
        yield
    finally:
        for name, values in before.items():
            getattr(rope, name)[:rows, :temporal] = values


def _check_positions(transformer: WanTransformer3DModel, positions: Sequence[int]) -> None:
    frames_per_token = transformer.config.patch_size[0]
    if frames_per_token != 1:
        raise ValueError(
            f"This transformer has {frames_per_token} frames in a token, which have one place between them. Use "
            "consecutive positions."
        )
    places = transformer.rope.max_seq_len
    if min(positions) < 0 or max(positions) >= places:
        raise ValueError(
            f"positions must be from 0 to {places - 1}, the last place of this transformer's rotary embedding, got "
            f"{min(positions)} to {max(positions)}. Use consecutive positions, or generate fewer frames."
        )


class _HalfRateScheduler(FewStepScheduler):
    """The scheduler of one call: raises the frame rate of the clean prediction, then draws noise at that rate.

    Noise is drawn at the full rate and cut, as :class:`avd_core.HalfRateInterpolationSampler` draws it, by the
    generator of the call: ``WanPipeline`` hands its scheduler none.
    """

    def __init__(
        self,
        scheduler: FewStepScheduler,
        rates: Sequence[int],
        interpolator: Callable[[Tensor], Tensor] | None,
        generator: Generators | None,
        transformers: Sequence[WanTransformer3DModel],
    ) -> None:
        super().__init__(scheduler.config.timesteps, scheduler.config.num_train_timesteps)
        self._rates, self._interpolator, self._generator = rates, interpolator, generator
        self._transformers = transformers  # those to be told where their frames are
        self._placed = ExitStack()

    def begin(self, noise: Tensor) -> Tensor:
        """``[B, C, F, H, W]`` to the frames of it that the first step runs on."""
        if isinstance(self._generator, list) and len(self._generator) != len(noise):
            raise ValueError(f"generator has {len(self._generator)} generators for {len(noise)} clips; pass one each.")
        self._shape = noise.shape
        self._place(self._rates[0])
        return noise[:, :, self._kept(self._rates[0])]

    def end(self) -> None:
        self._placed.close()

    def _following(self, x_0: Tensor, index: int, generator: Generators | None) -> Tensor:
        rate, frames = self._rates[index], self._shape[2]
        if x_0.shape[2] != len(self._kept(rate)):
            raise ValueError(
                f"A callback replaced the latents by others of {x_0.shape[2]} frames; step {index} runs on "
                f"{len(self._kept(rate))}."
            )
        last = index + 1 == len(self._rates)
        following = 1 if last else self._rates[index + 1]
        if rate > following:
            assert self._interpolator is not None  # the pipeline has checked
            x_0 = raise_frame_rate(x_0, self._interpolator, frames, rate, following)
        if last:
            return x_0
        self._place(following)
        noise = randn_tensor(self._shape, self._generator, x_0.device, x_0.dtype)
        return self._add_noise(x_0, noise[:, :, self._kept(following)], index + 1)

    def _kept(self, rate: int) -> list[int]:
        return kept_frames(self._shape[2], rate)

    def _place(self, rate: int) -> None:
        self._placed.close()
        for transformer in self._transformers:
            self._placed.enter_context(frame_positions(transformer, self._kept(rate)))
