"""rCM (NVlabs): a subclass of its text-to-video model that adds the two terms to the student's steps.

Clips are ``[B, C, T, H, W]``, times TrigFlow's t in [0, pi/2], predictions ``(x_0, F)``. Losses are sums over a sample
and over the batch, not means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from avd_core import AVDConfig
from avd_integrations._host import Host, named
from avd_integrations.parametrisation import trigflow
from avd_integrations.terms import HostTerms

PROVEN_ON = "NVlabs/rcm 5b41aa9"
"""The commit that the tests ran in."""

_HOST = Host("rCM", PROVEN_ON, "Run from a checkout of https://github.com/NVlabs/rcm, with its requirements.")

_CLASS = "T2VDistillModel_rCM"
_USED = {
    "training_step_closures": ("data_batch", "iteration"),
    "_make_training_ctx": ("x0_B_C_T_H_W", "condition", "uncondition", "iteration"),
    "_student_dmd_step": ("ctx", "iteration"),
    "backward_simulation": ("condition", "x_B_C_T_H_W_size", "n_steps", "with_grad"),
    "denoise": ("xt_B_C_T_H_W", "time", "condition", "net_type"),
    "is_student_phase": ("iteration",),
    "on_before_zero_grad": ("optimizer", "scheduler", "iteration"),
    "sync": (),
    "state_dict": (),
    "load_state_dict": ("state_dict", "strict", "assign"),
}
_READ = ("net_fake_score", "loss_scale_dmd", "sigma_max", "backward_timesteps", "tangent_warmup")
"""Of the host's configuration."""
_DMD, _REGRESSION = "dmd", "avd_regression"
_PREFIX = "avd."


def avd_model(config: Any, avd: AVDConfig | Mapping[str, Any] | None = None) -> Any:
    """rCM's model with the two terms, for ``_target_`` of the host's configuration.

    In an experiment::

        model=dict(_target_="avd_integrations.rcm.avd_model", avd=dict(motion=dict(floor=0.6)), config=dict(...))

    Args:
        config: The host's ``T2VDistillConfig_rCM``.
        avd: Hyperparameters, or a mapping of them; None is the paper's. Without ``timesteps`` the student's few steps
            are those of the host's sampler: ``atan(sigma_max)`` and ``backward_timesteps``. They are TrigFlow times.
            ``regression.auto_update`` is not to be set.

    Raises:
        ImportError: If rCM cannot be imported.
        RuntimeError: If its class has moved on from what is overridden, or its configuration from what is read.
        ValueError: As :func:`model_class`'s constructor does.
    """
    return model_class()(config, avd)


def model_class() -> type:
    """The subclass of rCM's ``T2VDistillModel_rCM``; its constructor is ``(config, avd=None)`` as :func:`avd_model`.

    - The regression is a closure of its own, ``"avd_regression"``, before that of distribution matching, with a
      backward pass of its own. It begins with distribution matching, after ``tangent_warmup``.
    - The motion term is added to distribution matching's.
    - Both are scaled to it: a weight is what it is in the paper where ``loss_scale_dmd`` is 1.
    - An iteration of the cache is an optimizer step of the student, of as many batches as ``trainer.grad_accum_iter``
      gathers. Only the trainer knows how many, so the cache waits for ``on_before_zero_grad``. With
      ``order="update_first"`` it cannot wait, and the second batch of a step raises ValueError.
    - The cache is in the host's checkpoints, as ``avd.*`` of the model.
    - Metrics come in ``output_batch`` as ``avd/*``.

    The constructor raises ValueError where the host has no distribution matching (no ``net_fake_score``, or
    ``loss_scale_dmd=0``), for timesteps outside (0, pi/2], or if ``auto_update`` is set; RuntimeError where the host's
    configuration lacks what is read.
    """
    members = {f"{_CLASS}.{name}": _USED[name] for name in _USED}
    members["DenoisePrediction"] = ("F",)  # denoise returns one
    module = _HOST.load("rcm.models.t2v_model_distill_rcm", members)
    host_class: Any = getattr(module, _CLASS)

    class AVDModelrCM(host_class):  # type: ignore[misc]
        """rCM's model with adaptive regression and clipped temporal variance."""

        avd: HostTerms

        def __init__(self, config: Any, avd: AVDConfig | Mapping[str, Any] | None = None) -> None:
            settings = _settings(config, avd)
            super().__init__(config)
            self.avd = HostTerms(settings, trigflow(), loss_scale=_sum_of_squares)
            self._avd_context: Any = None
            self._avd_samples: Tensor | None = None
            self._avd_batches = 0  # of the running optimizer step

        def training_step_closures(self, data_batch: Any, iteration: int) -> Iterator[tuple[str, Any, bool]]:
            self._avd_batches += 1
            regression = self.avd.objective.regression
            if self._avd_batches > 1 and regression is not None and regression.cache.order == "update_first":
                raise ValueError(
                    "order='update_first' needs trainer.grad_accum_iter=1: with several batches per optimizer step the "
                    "mean would be needed before the step's losses are known. Use order='weight_first', which is the "
                    "paper's."
                )
            names = []
            for name, closure, is_last in super().training_step_closures(data_batch, iteration):
                names.append(name)
                if name == _DMD and regression is not None:
                    yield _REGRESSION, self._avd_regression_step, False
                yield name, closure, is_last
            self._avd_context = None  # clips and embeddings of this step
            if self.is_student_phase(iteration) and iteration >= self.config.tangent_warmup and _DMD not in names:
                raise _HOST.moved(
                    f"{_CLASS}.training_step_closures gave {names} and no {_DMD!r} at iteration {iteration}"
                )

        def _make_training_ctx(self, *args: Any, **kwargs: Any) -> Any:
            self._avd_context = super()._make_training_ctx(*args, **kwargs)
            return self._avd_context

        def _avd_regression_step(self) -> tuple[dict[str, Tensor], Tensor]:
            """As the host's steps: what to show, and a loss per sample, which the trainer sums."""
            x_0, condition, _ = self._avd_context
            # With context parallelism several ranks share a sample.
            times, noise = self.sync(self.avd.draw_times(len(x_0), x_0.device), torch.randn_like(x_0))
            x_t = self.avd.parametrisation.add_noise(x_0, noise, times)
            prediction = self._avd_predict(x_t, times, condition)
            loss, metrics = self.avd.on_prediction(prediction=prediction, x_t=x_t, clips=x_0, noise=noise, times=times)
            return named(metrics), loss.expand(len(x_0))

        def _avd_predict(self, x_t: Tensor, times: Tensor, condition: Any) -> Tensor:
            prediction: Tensor = self.denoise(x_t, times, condition, net_type="student").F
            return prediction

        def backward_simulation(
            self, condition: Any, x_B_C_T_H_W_size: Any, n_steps: int, with_grad: bool = False
        ) -> tuple[Tensor, Any]:
            x_0, trajectory = super().backward_simulation(condition, x_B_C_T_H_W_size, n_steps, with_grad=with_grad)
            self._avd_samples = x_0  # the host's results have it without gradient
            return x_0, trajectory

        def _student_dmd_step(self, ctx: Any, iteration: int) -> tuple[dict[str, Any], Tensor]:
            try:
                output_batch, loss = super()._student_dmd_step(ctx, iteration)
                if self.avd.objective.motion is None:
                    return output_batch, loss
                motion = self.avd.on_samples(self._avd_samples)
                return output_batch | named(motion.metrics), loss + motion.loss
            finally:
                self._avd_samples = None  # and the graph behind it

        def on_before_zero_grad(self, optimizer: Any, scheduler: Any, iteration: int) -> None:
            super().on_before_zero_grad(optimizer, scheduler, iteration)
            self._avd_batches = 0
            if self.is_student_phase(iteration):
                self.avd.update()

        def state_dict(self) -> dict[str, Any]:
            state: dict[str, Any] = super().state_dict()
            # Copies: the host loads in place, which would go past the cache's check of its grid.
            state.update({_PREFIX + name: value.clone() for name, value in self.avd.state_dict().items()})
            return state

        def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
            own = {name: value for name, value in state_dict.items() if name.startswith(_PREFIX)}
            rest = {name: value for name, value in state_dict.items() if name not in own}
            result = super().load_state_dict(rest, strict=strict, assign=assign)
            if own:  # a checkpoint from before this adapter has none
                self.avd.load_state_dict({name.removeprefix(_PREFIX): value for name, value in own.items()})
            return result

    return AVDModelrCM


def _settings(config: Any, avd: AVDConfig | Mapping[str, Any] | None) -> AVDConfig:
    """The configuration, on the steps of the host's sampler if it names none, with a cache that waits if it can."""
    _HOST.check(config, dict.fromkeys(_READ, ()))
    if not config.net_fake_score or config.loss_scale_dmd <= 0:
        raise ValueError(
            "The terms are scaled to rCM's distribution matching, and this configuration has none. Set net_fake_score "
            "and loss_scale_dmd=1."
        )
    given = avd if isinstance(avd, AVDConfig) else AVDConfig.model_validate(_plain(avd or {}))
    if "timesteps" in given.model_fields_set:
        steps = given.timesteps
    else:
        steps = (math.atan(config.sigma_max), *map(float, config.backward_timesteps))
    if not all(0 < step <= math.pi / 2 for step in steps):
        raise ValueError(f"timesteps must be TrigFlow times in (0, pi/2], got {steps}.")
    options = {**given.model_dump(), "timesteps": steps}
    if given.regression is not None:
        if not given.regression.auto_update:
            raise ValueError("regression.auto_update is not to be set: the cache follows trainer.grad_accum_iter.")
        options["regression"]["auto_update"] = given.regression.order == "update_first"
    return AVDConfig.model_validate(options)


def _plain(value: Any) -> Any:
    """Dicts and lists of a configuration library's own kinds of them."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return value


def _sum_of_squares(shape: torch.Size) -> float:
    """rCM's loss for one of ours, for a batch of one, which is ``2 C T H W``.

    Of the same difference ``d`` of samples, distribution matching is the sum of ``d^2`` there, and half its mean here.
    The batch is summed too: the trainer sums what closures return, and they return this once per sample.
    """
    return 2.0 * math.prod(shape)
