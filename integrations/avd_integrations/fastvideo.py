"""FastVideo (``fastvideo/train``): its DMD2 method with both terms, chosen by the run's YAML::

    method:
      _target_: avd_integrations.fastvideo.dmd2
      avd: {regression: {weight: 2.0}, motion: {floor: 0.6}}

FastVideo's callbacks see no batch, so the terms come in a subclass of its method. ``_target_`` may be any callable that
takes what a method's class takes; it is a function here, so that FastVideo is imported when a run is built, not before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from avd_core import AVDConfig, LossOutput
from avd_integrations._host import Host, named_means, with_accumulation
from avd_integrations.parametrisation import rectified_flow
from avd_integrations.terms import HostTerms

__all__ = ["PROVEN_ON", "AVDHooks", "avd_config", "dmd2", "dmd2_class"]

PROVEN_ON = "FastVideo 0.2.1"
"""The release that the tests ran in."""

_HOST = Host(
    "FastVideo", PROVEN_ON, "Install it with pip install fastvideo, or from https://github.com/hao-ai-lab/FastVideo."
)

_METHOD = "fastvideo.train.methods.distribution_matching.dmd2"

# What is used of the host, with the arguments it is used with.
_USED: dict[str, dict[str, tuple[str, ...]]] = {
    _METHOD: {
        "DMD2Method.__init__": ("cfg", "role_models"),
        "DMD2Method.single_train_step": ("batch", "iteration"),
        "DMD2Method.optimizers_schedulers_step": ("iteration",),
        "DMD2Method.checkpoint_state": (),
        "DMD2Method._dmd_loss": ("generator_pred_x0", "batch"),
        "DMD2Method._get_denoising_step_list": ("device",),
    },
    "fastvideo.train.models.base": {
        "ModelBase.prepare_batch": ("raw_batch", "generator", "latents_source"),
        "ModelBase.add_noise": ("clean_latents", "noise", "timestep"),
        "ModelBase.predict_noise": (
            "noisy_latents", "timestep", "batch", "conditional", "cfg_uncond", "attn_kind",
        ),
    },
}  # fmt: skip
_ATTRIBUTES = ("student", "method_config", "training_config", "cuda_generator", "_rollout_mode", "_cfg_uncond")

# Stands for DMD2Method, which dmd2_class puts behind the hooks.
_Host: Any = object


def dmd2(*, cfg: Any, role_models: dict[str, Any]) -> Any:
    """FastVideo's ``DMD2Method`` with :class:`AVDHooks`: the ``method._target_`` of a run's YAML.

    Args:
        cfg: FastVideo's ``RunConfig``.
        role_models: ``ModelBase`` instances of the roles student, teacher and critic.

    Raises:
        ImportError: If FastVideo cannot be imported.
        RuntimeError: If it is one that this adapter does not fit.
        ValueError: If an option is unknown or out of its range, both terms are left out, or the regression is on and
            the data are prompts only.
    """
    return dmd2_class()(cfg=cfg, role_models=role_models)


@functools.cache
def dmd2_class() -> Any:
    """The class behind :func:`dmd2`, to be subclassed further. Raises as it does."""
    hosts = {module: _HOST.load(module, members) for module, members in _USED.items()}
    return type("AVDDMD2Method", (AVDHooks, hosts[_METHOD].DMD2Method), {"__doc__": AVDHooks.__doc__})


class AVDHooks(_Host):  # type: ignore[misc]
    """What is added to ``DMD2Method``, on iterations that update the student and on no others.

    - ``_dmd_loss`` gains both terms: the clipped temporal variance of the generated clips that it is given, and the
      regression on the batch's real clips, for which the student runs once more. Layout is ``[B, T, C, H, W]``; the
      few steps are ``dmd_denoising_steps``, warped if FastVideo warps them; real clips are noised by the student's own
      ``add_noise``, which looks up the nearest of its scheduler's times. FastVideo's losses are means, as ours are.
    - Real clips are ``batch.latents`` with ``rollout_mode: data_latent``. With ``rollout_mode: simulate`` FastVideo
      prepares zeros in their place; the clips of the same batch are then prepared a second time, for real.
    - Noise and times come from the method's ``cuda_generator``, as all of FastVideo's do: equal within a group of
      sequence-parallel ranks, which hold the same clips, and different between groups.
    - ``optimizers_schedulers_step`` ends the cache's iteration, after all accumulation rounds. Where the student had no
      part in it, nothing was recorded, and the cache stays as it is.
    - ``checkpoint_state`` has the cache as "avd", for Distributed Checkpoint.
    - ``single_train_step`` adds metrics, averaged over a batch: ``avd/matching_loss``, the loss without the terms, and
      ``avd/`` with the names of :class:`avd_core.AVDObjective`.

    Attributes:
        avd: The terms, a :class:`HostTerms`.
    """

    def __init__(self, *, cfg: Any, role_models: dict[str, Any]) -> None:
        super().__init__(cfg=cfg, role_models=role_models)
        _HOST.check(self, dict.fromkeys(_ATTRIBUTES, ()))
        training = self.training_config
        config = avd_config(
            self.method_config.get("avd"),
            self._get_denoising_step_list(torch.device("cpu")).tolist(),
            training.loop.gradient_accumulation_steps,
        )
        if config.regression is not None and training.data.preprocessed_data_type == "text_only":
            raise ValueError(
                "The regression needs real clips, and training.data.preprocessed_data_type is text_only. Use data with "
                "VAE latents, or leave the part out with method.avd.regression: null."
            )
        self.avd = HostTerms(
            config,
            rectified_flow(self.student.num_train_timesteps),
            layout="BFCHW",
        ).to(self.student.device)
        self._raw_batch: dict[str, Any] | None = None
        self._avd_metrics: dict[str, Tensor] = {}

    def single_train_step(self, batch: dict[str, Any], iteration: int) -> tuple[Any, Any, dict[str, Any]]:
        self._raw_batch, self._avd_metrics = batch, {}
        try:
            losses, outputs, metrics = super().single_train_step(batch, iteration)
            return losses, outputs, {**metrics, **self._avd_metrics}
        finally:
            self._raw_batch = None

    def optimizers_schedulers_step(self, iteration: int) -> None:
        super().optimizers_schedulers_step(iteration)
        self.avd.update()

    def checkpoint_state(self) -> dict[str, Any]:
        return {**super().checkpoint_state(), "avd": _CopiedState(self.avd)}

    def _dmd_loss(self, generator_pred_x0: Tensor, batch: Any) -> Tensor:
        loss: Tensor = super()._dmd_loss(generator_pred_x0, batch)
        metrics = {"matching_loss": loss}
        if self.avd.objective.regression is not None:
            regression = self._on_clips(batch)
            loss, metrics = loss + regression.loss, metrics | regression.metrics
        if self.avd.objective.motion is not None:
            motion = self.avd.on_samples(generator_pred_x0)
            loss, metrics = loss + motion.loss, metrics | motion.metrics
        self._avd_metrics = named_means(metrics)
        return loss

    def _on_clips(self, batch: Any) -> LossOutput:
        clips = self._real_clips(batch).detach()
        times = self.avd.draw_times(len(clips), clips.device, generator=self.cuda_generator)
        noise = torch.randn(clips.shape, device=clips.device, dtype=clips.dtype, generator=self.cuda_generator)
        x_t = self.student.add_noise(clips, noise, times.repeat_interleave(clips.shape[1]))  # one time per frame
        velocity = self._predict_velocity(x_t, times, batch)
        return self.avd.on_prediction(prediction=velocity, x_t=x_t, clips=clips, noise=noise, times=times)

    def _real_clips(self, batch: Any) -> Tensor:
        if self._rollout_mode == "simulate":
            batch = self.student.prepare_batch(self._raw_batch, generator=self.cuda_generator, latents_source="data")
        clips: Tensor = batch.latents
        return clips

    def _predict_velocity(self, x_t: Tensor, times: Tensor, batch: Any) -> Tensor:
        # The rollout's kind of attention: backward() recomputes activations under the metadata of that kind.
        velocity: Tensor = self.student.predict_noise(
            x_t, times, batch, conditional=True, cfg_uncond=self._cfg_uncond, attn_kind="vsa"
        )
        return velocity


def avd_config(options: Mapping[str, Any] | None, steps: Sequence[float], accumulation: int = 1) -> AVDConfig:
    """The hyperparameters that a run's YAML asks for.

    Args:
        options: ``method.avd``: ``regression`` and ``motion`` with options of :class:`avd_core.RegressionConfig` and
            :class:`avd_core.MotionConfig`, or null to leave one out. None is the paper's.
        steps: The student's few steps, as FastVideo samples them.
        accumulation: ``training.loop.gradient_accumulation_steps``; with more than one the cache is updated once per
            optimizer step.

    Raises:
        ValueError: If an option is unknown or out of its range, is decided by FastVideo's own, or leaves nothing.
    """
    given = dict(options or {})
    if "timesteps" in given:
        raise ValueError("method.avd.timesteps is not to be set: the few steps are method.dmd_denoising_steps.")
    if isinstance(given.get("regression"), Mapping) and "auto_update" in given["regression"]:
        raise ValueError(
            "method.avd.regression.auto_update is not to be set: it follows training.loop.gradient_accumulation_steps."
        )
    config = AVDConfig(**given, timesteps=tuple(steps))
    if config.regression is None and config.motion is None:
        raise ValueError("method.avd leaves out both terms: name FastVideo's own DMD2Method as method._target_ then.")
    return with_accumulation(config, accumulation)


class _CopiedState:
    """A module's state for Distributed Checkpoint.

    It loads into the tensors of ``state_dict()`` before anyone has asked whether they fit; in the cache's own, a saved
    grid would have replaced this run's before the two could be compared.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._module.state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self._module.load_state_dict(state_dict)
