"""CausVid, Self-Forcing and the released AVD code: one family of trainers, adapted by a subclass of their ``DMD``.

Clips are ``[B, F, C, H, W]``, timesteps ``[B, F]`` in [0, 1000] on rectified flow's path, losses are means. The
wrappers around Wan return ``x_0`` (CausVid, AVD) or ``(flow, x_0)`` (Self-Forcing).
"""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avd_core import AVDConfig
from avd_integrations._host import Host, name_of, named
from avd_integrations.parametrisation import Parametrisation
from avd_integrations.terms import HostTerms

logger = logging.getLogger(__name__)

PROVEN_ON = "CausVid ca21150, Self-Forcing 33593df, Adaptive-Video-Distillation b3442d6"
"""The commits that the tests ran in."""

_HOST = Host("DMD class of CausVid, Self-Forcing or the released AVD code", PROVEN_ON)

CHECKPOINT_KEY = "avd"
"""Where the trainer's checkpoint has the cache."""

Clips = Iterable[tuple[Tensor, list[str]]]
"""Batches of real clips: latents ``[B, F, C, H, W]``, scaled as the host's, and a prompt for each."""

_USED = {
    "compute_distribution_matching_loss": ("image_or_video", "conditional_dict", "unconditional_dict", "gradient_mask"),
    "generator_loss": ("image_or_video_shape", "conditional_dict", "unconditional_dict", "clean_latent"),
}
_READ = {
    "generator.forward": ("noisy_image_or_video", "conditional_dict", "timestep"),
    "text_encoder.forward": ("text_prompts",),
    "scheduler": (),
    "denoising_step_list": (),
    "device": (),
    "dtype": (),
}
"""Of an instance."""
_RELEASED_AVD_METHOD = "reg_loss"


def with_avd(host_class: type, config: AVDConfig | None = None, clips: Clips | None = None) -> type:
    """A subclass of a host's ``DMD`` that adds the two terms to its generator's loss.

    The constructor is the host's, so the trainer builds it as it builds its own::

        from model import CausVid, DMD, SiD                                      # Self-Forcing, trainer/distillation.py
        from avd_integrations.self_forcing import with_avd
        DMD = with_avd(DMD, AVDConfig(), clips=my_loader)

    The few steps are the host's ``denoising_step_list`` (after its warping, and without its final 0). The objective is
    at ``avd.objective`` of the instance. Put ``avd.state_dict()`` under ``"avd"`` into the dictionary that the
    trainer saves; an instance reads it from the file that ``generator_ckpt`` names.

    Args:
        host_class: ``causvid.dmd.DMD`` of CausVid or the released AVD code, ``model.DMD`` of Self-Forcing.
        config: Hyperparameters; None is the paper's. ``timesteps`` may be left out, as the host says them.
        clips: Real clips with their prompts, gone through again and again, of the host's ``image_or_video_shape`` but
            for the batch. None takes the host's ``clean_latent``, which its trainer passes only where
            ``backward_simulation`` is off.

    Returns:
        The subclass; its constructor is ``(args, device)``.

    Raises:
        RuntimeError: If the class lacks what is overridden, or its instance what is read: another class, or a version
            that has moved.
        ValueError: If ``regression.auto_update`` is off; or the class is that of the released AVD code, and ``config``
            has a motion term, which its ``generator_loss`` has already. From the instance: for an image model, for
            another grid than the host's few steps, and for ``clips`` of another shape than the rollout's.
    """
    _HOST.check(host_class, _USED)
    hyperparameters = AVDConfig.paper() if config is None else config
    if hyperparameters.regression is not None and not hyperparameters.regression.auto_update:
        raise ValueError("These trainers do not accumulate gradients. Leave regression.auto_update at True.")
    if hasattr(host_class, _RELEASED_AVD_METHOD) and hyperparameters.motion is not None:
        raise ValueError(
            f"{name_of(host_class)} is the released AVD code, whose generator_loss has a motion term of its own, and "
            "two would be added. Use AVDConfig(motion=None), or remove its term and its reg_loss."
        )

    class AVDDMD(host_class):  # type: ignore[misc]
        """The host's ``DMD`` with adaptive regression and clipped temporal variance."""

        avd: HostTerms

        def __init__(self, args: Any, device: Any) -> None:
            super().__init__(args, device)
            _check_instance(self)
            self.avd = HostTerms(
                _at_steps(hyperparameters, self.denoising_step_list),
                _path(self.scheduler),
                predict=self._avd_velocity,
                clips=lambda batch: batch["clips"],
                layout="BFCHW",
            ).to(device)
            self._avd_clips = None if clips is None else _again_and_again(clips)
            _restore(self.avd, getattr(args, "generator_ckpt", None))

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            # The trainer puts the model in evaluation mode before every training step, which would stop the cache.
            self.avd.train()
            return self

        def compute_distribution_matching_loss(
            self,
            image_or_video: Tensor,
            conditional_dict: Any,
            unconditional_dict: Any,
            gradient_mask: Tensor | None = None,
            **options: Any,
        ) -> tuple[Tensor, dict[str, Any]]:
            loss, log = super().compute_distribution_matching_loss(
                image_or_video=image_or_video,
                conditional_dict=conditional_dict,
                unconditional_dict=unconditional_dict,
                gradient_mask=gradient_mask,
                **options,
            )
            if self.avd.objective.motion is None:
                return loss, log
            x_0 = image_or_video
            if gradient_mask is not None:  # long videos: the host takes no gradient of the first block
                x_0 = torch.where(gradient_mask, x_0, x_0.detach())
            motion = self.avd.on_samples(x_0)
            return loss + motion.loss, log | named(motion.metrics)

        def generator_loss(
            self,
            image_or_video_shape: Any,
            conditional_dict: Any,
            unconditional_dict: Any,
            clean_latent: Tensor | None,
            **options: Any,
        ) -> tuple[Tensor, dict[str, Any]]:
            batch = None
            if self.avd.objective.regression is not None:
                batch = self._avd_batch(image_or_video_shape, conditional_dict, clean_latent)
            loss, log = super().generator_loss(
                image_or_video_shape=image_or_video_shape,
                conditional_dict=conditional_dict,
                unconditional_dict=unconditional_dict,
                clean_latent=clean_latent,
                **options,
            )
            if batch is None:
                return loss, log
            regression = self.avd.on_clips(batch)
            return loss + regression.loss, log | named(regression.metrics)

        def _avd_batch(self, shape: Any, conditional_dict: Any, clean_latent: Tensor | None) -> dict[str, Any]:
            """Clips and what the text encoder made of their prompts."""
            if self._avd_clips is not None:
                latents, prompts = next(self._avd_clips)
                if tuple(latents.shape[1:]) != tuple(shape[1:]) or len(prompts) != len(latents):
                    # The causal transformer keeps the attention mask of the first shape that it sees.
                    raise ValueError(
                        f"clips must give latents [B, {', '.join(map(str, shape[1:]))}], as image_or_video_shape says, "
                        f"and B prompts; got {list(latents.shape)} and {len(prompts)} prompts."
                    )
                with torch.no_grad():
                    conditional_dict = self.text_encoder(text_prompts=list(prompts))
            elif clean_latent is not None:
                latents = clean_latent
            else:
                raise ValueError(
                    "The regression needs real clips, and this trainer reads prompts only (clean_latent is None). Pass "
                    "with_avd(..., clips=loader), batches of latents [B, F, C, H, W] and their prompts, or leave the "
                    "regression out with AVDConfig(regression=None)."
                )
            return {"clips": latents.to(device=self.device, dtype=self.dtype), "text": conditional_dict}

        def _avd_velocity(self, x_t: Tensor, times: Tensor, batch: dict[str, Any]) -> Tensor:
            """The student's velocity; all frames of a clip are at one timestep."""
            prediction = self.generator(
                noisy_image_or_video=x_t,
                conditional_dict=batch["text"],
                timestep=times.unsqueeze(1).expand(-1, x_t.shape[1]),
            )
            if isinstance(prediction, tuple):
                velocity: Tensor = prediction[0]
                return velocity
            x_0_path = Parametrisation(self.avd.parametrisation.coefficients, "x_0")
            return x_0_path.velocity(prediction, x_t.float(), times)

    AVDDMD.__name__ = AVDDMD.__qualname__ = f"AVD{host_class.__name__}"
    return AVDDMD


def _at_steps(config: AVDConfig, denoising_step_list: Tensor) -> AVDConfig:
    """The configuration on the host's few steps, of which the 0 at the end is no step of the student."""
    steps = tuple(float(step) for step in denoising_step_list if step > 0)
    if "timesteps" in config.model_fields_set and config.timesteps != steps:
        raise ValueError(
            f"AVDConfig has timesteps {config.timesteps}, and the host's denoising_step_list is {steps} (after "
            "warping). Leave timesteps out of AVDConfig."
        )
    return AVDConfig.model_validate({**config.model_dump(), "timesteps": steps})


def _check_instance(host: Any) -> None:
    """That a built model has what is read of it."""
    _HOST.check(host, _READ)
    if not hasattr(host.scheduler, "sigmas") and getattr(host.scheduler, "alphas_cumprod", None) is not None:
        raise ValueError(
            f"The host's scheduler {name_of(host.scheduler)} is on DDPM's path: only flow-matching models (Wan) are "
            "supported, not the host's image models."
        )
    _HOST.check(host.scheduler, {"sigmas": (), "timesteps": ()})


def _path(scheduler: Any) -> Parametrisation:
    """Rectified flow with the noise level of the scheduler's nearest timestep, as the host's wrappers look it up."""

    def coefficients(times: Tensor) -> tuple[Tensor, Tensor]:
        timesteps, sigmas = scheduler.timesteps.to(times), scheduler.sigmas.to(times)
        sigma = sigmas[(timesteps.unsqueeze(0) - times.unsqueeze(1)).abs().argmin(dim=1)]
        return 1 - sigma, sigma

    return Parametrisation(coefficients, "velocity")


def _again_and_again(clips: Clips) -> Iterator[tuple[Tensor, list[str]]]:
    while True:
        empty = True
        for batch in clips:
            empty = False
            yield batch
        if empty:
            raise ValueError("clips gave no batch. Pass something that can be gone through again, not an iterator.")


def _restore(terms: HostTerms, path: Any) -> None:
    """The cache from the trainer's checkpoint, if that has one; the weights in the file are not read."""
    if not path or terms.objective.regression is None:
        return
    state, reason = None, f"has no key {CHECKPOINT_KEY!r}"
    if not zipfile.is_zipfile(path):  # nothing else can be mapped into memory
        reason = "is no file in the zip format of torch.save"
    else:
        try:
            state = torch.load(Path(path), map_location="cpu", mmap=True, weights_only=True).get(CHECKPOINT_KEY)
        except pickle.UnpicklingError:  # what else is in the file is the host's own business
            reason = "cannot be read without unpickling classes, which is not done here"
    if state is None:
        logger.warning("%s %s: the cache starts empty.", path, reason)
        return
    terms.load_state_dict(state)
