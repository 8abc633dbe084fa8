"""Wan's pipeline with its high-noise steps at half the frame rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from avd_core import kept_frames, raise_frame_rate, step_rates
from avd_integrations.diffusers.interpolator import LatentFrameInterpolatorModel
from avd_integrations.diffusers.positions import check_positions, frame_positions
from avd_integrations.diffusers.scheduler import EXPORTED_GRID, FewStepScheduler, Generators


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

    Raises:
        ValueError: If a transformer reads an image, as those of image to video do.

    Example:
        ::

            pipeline = WanHalfRatePipeline.from_pretrained("student/", dtype=torch.bfloat16).to("cuda")
            frames = pipeline("a red square moves right").frames[0]
    """

    __module__ = "avd_integrations.diffusers"  # as saved pipelines name it, whichever file it is in

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
        scheduler: FewStepScheduler | FlowMatchLCMScheduler | FlowMatchEulerDiscreteScheduler,
        transformer: WanTransformer3DModel | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        interpolator: LatentFrameInterpolatorModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        if not isinstance(scheduler, FewStepScheduler) and EXPORTED_GRID in scheduler.config:
            scheduler = FewStepScheduler.from_config(scheduler.config)  # an exported folder's
        for model in (transformer, transformer_2):
            if model is not None and model.config.in_channels != model.config.out_channels:
                raise ValueError(
                    f"transformer must be of text to video, got one with {model.config.in_channels} channels in and "
                    f"{model.config.out_channels} out, which reads an image. Sample it at half rate by "
                    "`avd sample --image`, or at the full rate by diffusers' WanImageToVideoPipeline."
                )
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
            check_positions(transformer, range(shape[2]))


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
        super().__init__(scheduler.config.timesteps, scheduler.config.num_train_timesteps, scheduler.config.sampler)
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

    def _following(self, x_0: Tensor, x_t: Tensor, index: int, generator: Generators | None) -> Tensor:
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
        if self.config.sampler == "ode" and rate == following:  # frames that were inserted have no noise to keep
            return self._straight_on(x_0, x_t, index)
        noise = randn_tensor(self._shape, self._generator, x_0.device, x_0.dtype)
        return self._add_noise(x_0, noise[:, :, self._kept(following)], index + 1)

    def _kept(self, rate: int) -> list[int]:
        return kept_frames(self._shape[2], rate)

    def _place(self, rate: int) -> None:
        self._placed.close()
        for transformer in self._transformers:
            self._placed.enter_context(frame_positions(transformer, self._kept(rate)))
