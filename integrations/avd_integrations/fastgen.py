"""FastGen: both terms as one of its callbacks, and its students sampled at half the frame rate.

FastGen's trainer hands a callback the batch, the generated sample and the losses just before ``backward()``::

    from avd_integrations.fastgen import avd_callback
    from fastgen.utils import LazyCall as L

    config.trainer.callbacks["avd"] = L(avd_callback)(regression={"weight": 2.0}, motion={"floor": 0.6})

FastGen is imported when one of this module's functions is called, not before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avd_core import (
    AVDConfig,
    FlowMatchingSchedule,
    HalfRateInterpolationSampler,
    MotionConfig,
    RegressionConfig,
    interpolate_linearly,
)
from avd_integrations._host import Host, named_means, with_accumulation
from avd_integrations.parametrisation import Parametrisation, Prediction
from avd_integrations.terms import HostTerms, Layout

__all__ = ["PROVEN_ON", "AVDHooks", "avd_callback", "fastgen_terms", "few_steps", "half_rate"]

PROVEN_ON = "NVlabs/FastGen 34f30e8 (2026-02-25)"
"""The commit that the tests ran in."""

_HOST = Host("FastGen", PROVEN_ON, "Install it from https://github.com/NVlabs/FastGen.")

_PAPER: Mapping[str, Any] = MappingProxyType({})

# What is used of the host, with the arguments it is used with.
_USED: dict[str, dict[str, tuple[str, ...]]] = {
    "fastgen.callbacks.callback": {
        "Callback.on_load_checkpoint_start": ("model",),
        "Callback.on_load_checkpoint_end": ("model", "iteration"),
        "Callback.on_backward_begin": (
            "model", "data_batch", "output_batch", "loss_dict", "iteration", "accum_iter",
        ),
        "Callback.on_optimizer_step_begin": ("model", "iteration"),
        "Callback.state_dict": (),
        "Callback.load_state_dict": ("state_dict",),
    },
    "fastgen.methods.model": {
        "FastGenModel._prepare_training_data": ("data",),
        "FastGenModel.get_optimizers": ("iteration",),
        "FastGenModel.autocast": (),
        "FastGenModel._student_sample_loop": ("net", "x", "t_list", "condition", "student_sample_type"),
    },
    "fastgen.networks.network": {"FastGenNetwork.forward": ("x_t", "t", "condition", "fwd_pred_type")},
    "fastgen.networks.noise_schedule": {
        "BaseNoiseSchedule.alpha": ("t",),
        "BaseNoiseSchedule.sigma": ("t",),
        "BaseNoiseSchedule.get_t_list": ("sample_steps", "device"),
        "RFNoiseSchedule": (),
    },
}  # fmt: skip

# FastGen's names of predictions. Its "flow" is a velocity of ours on rectified flow's path only.
_PREDICTIONS: dict[str, Prediction] = {"x0": "x_0", "eps": "noise", "v": "v", "flow": "velocity"}


def avd_callback(regression: Mapping[str, Any] | None = _PAPER, motion: Mapping[str, Any] | None = _PAPER) -> Any:
    """A FastGen callback that adds both terms to ``total_loss`` wherever the student is updated.

    Options are plain mappings, so that FastGen can write them into its ``config.yaml`` and override them from its
    command line (``trainer.callbacks.avd.motion.floor=0.8``). The few steps are not among them: they are the student's
    own, ``model.sample_t_cfg.t_list`` or what its noise schedule makes of ``model.student_sample_steps``.

    Args:
        regression: Options of :class:`avd_core.RegressionConfig`, the paper's by default; None leaves the term out.
            ``auto_update`` is not among them: the cache is updated once per optimizer step.
        motion: Options of :class:`avd_core.MotionConfig`, likewise. None for image models.

    Returns:
        AVDHooks: which are a ``fastgen.callbacks.callback.Callback`` too.

    Raises:
        ImportError: If FastGen cannot be imported.
        RuntimeError: If it is one that this adapter does not fit.
        ValueError: If an option is unknown or out of its range, or both terms are left out.
    """
    return _callback_class()(regression, motion)


class AVDHooks:
    """What :func:`avd_callback` does at which of FastGen's hooks.

    At ``on_backward_begin``, on iterations that update the student and on no others:

    - The batch's real clips are noised to drawn few steps, and the student runs on them once more, under the model's
      own autocast, for the regression.
    - The generated sample that the method has put into ``output_batch`` goes through the motion term.
    - ``loss_dict["total_loss"]`` becomes the sum; the trainer divides it by its accumulation rounds and scales it.

    Scalars are added to ``loss_dict``, which FastGen averages and logs: ``avd/regression/loss``, ``.../weights``,
    ``.../sample_losses``, ``.../means``, and ``avd/motion/loss``, ``.../unclipped``, ``.../variance``.

    The state, saved by FastGen with its own under the callback's name, is that of :class:`avd_core.AVDObjective`.

    Args:
        regression: See :func:`avd_callback`.
        motion: See :func:`avd_callback`.
    """

    config: Any
    """FastGen's whole configuration; its trainer sets it."""

    def __init__(self, regression: Mapping[str, Any] | None, motion: Mapping[str, Any] | None) -> None:
        if regression is None and motion is None:
            raise ValueError("Both regression and motion are None: nothing would be added to the loss.")
        if regression is not None and not RegressionConfig(**regression).auto_update:
            raise ValueError("auto_update is not to be set: the cache follows FastGen's trainer.grad_accum_rounds.")
        self._regression = None if regression is None else RegressionConfig(**regression)
        self._motion = None if motion is None else MotionConfig(**motion)
        self._terms: HostTerms | None = None

    @property
    def terms(self) -> HostTerms:
        """The terms, which exist from ``on_load_checkpoint_start`` on."""
        if self._terms is None:
            raise RuntimeError(
                "avd_callback knows no model yet: FastGen's trainer calls on_load_checkpoint_start first."
            )
        return self._terms

    def on_load_checkpoint_start(self, model: Any) -> None:
        """Build the terms: the last hook before the state comes, and the first with the model on its device."""
        rounds = self.config.trainer.grad_accum_rounds
        self._terms = fastgen_terms(model, self._regression, self._motion, grad_accum_rounds=rounds).to(model.device)

    def on_load_checkpoint_end(self, model: Any, iteration: int = 0) -> None:
        """Refuse to go on with caches that differ, as when only some ranks see the checkpoint's folder."""
        _check_equal_on_all_ranks(self.terms, iteration, model.device)

    def on_backward_begin(
        self,
        model: Any,
        data_batch: dict[str, Any],
        output_batch: dict[str, Any],
        loss_dict: dict[str, Tensor],
        iteration: int = 0,
        accum_iter: int = 0,
    ) -> None:
        """Add the terms to the loss."""
        if not _updates_student(model, iteration):
            return
        if "total_loss" not in loss_dict:
            raise _HOST.moved(f'There is no loss_dict["total_loss"], only {sorted(loss_dict)}')
        samples = None if self._motion is None else _generated(output_batch, type(model).__name__)
        loss, metrics = self.terms((model, data_batch), samples)
        loss_dict["total_loss"] = loss_dict["total_loss"] + loss
        loss_dict.update(named_means(metrics))

    def on_optimizer_step_begin(self, model: Any, iteration: int = 0) -> None:
        """End the cache's iteration, after all accumulation rounds."""
        if _updates_student(model, iteration):
            self.terms.update()

    def state_dict(self) -> dict[str, Any]:
        """The cache, equal on all ranks, so that the first rank's is everyone's. No collective: FSDP asks one rank."""
        return self.terms.objective.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue; FastGen's checkpointers call this on every rank that finds the file."""
        self.terms.objective.load_state_dict(state_dict)


def fastgen_terms(
    model: Any, regression: RegressionConfig | None, motion: MotionConfig | None, *, grad_accum_rounds: int = 1
) -> HostTerms:
    """Both terms for a FastGen model; their batch is ``(model, data_batch)``, as FastGen's trainer has preprocessed it.

    Layout is ``[B, C, T, H, W]``, or ``[B, C, H, W]`` where ``model.input_shape`` says so; losses are means, as
    FastGen's are. Path and prediction are those of the student's network: rectified flow with a velocity for Wan, or
    any other of FastGen's noise schedules with the prediction that the network was made for.

    Args:
        model: A ``FastGenModel``, on its device.
        regression: Its options, or None to leave it out.
        motion: Its options, or None to leave it out.
        grad_accum_rounds: Micro-batches of an optimizer step. With more than one, call :meth:`HostTerms.update` after
            them.

    Raises:
        ImportError, RuntimeError: As :func:`avd_callback`.
        ValueError: If the motion term is on for a model of images, or ``order="update_first"`` is asked for with more
            than one accumulation round.
    """
    _check_host()
    scheduler, grid = model.net.noise_scheduler, few_steps(model)
    host_prediction, prediction = _prediction_of(model.net)
    layout = _layout(model.input_shape, motion)
    config = AVDConfig(timesteps=tuple(grid.tolist()), regression=regression, motion=motion)
    config = with_accumulation(config, grad_accum_rounds)
    alphas, sigmas = scheduler.alpha(grid), scheduler.sigma(grid)

    def coefficients(times: Tensor) -> tuple[Tensor, Tensor]:
        index = _nearest(times, grid)
        return alphas.to(times.device)[index], sigmas.to(times.device)[index]

    def predict(x_t: Tensor, times: Tensor, batch: tuple[Any, dict[str, Any]]) -> Tensor:
        model, data = batch
        condition = model._prepare_training_data(data)[1]
        t = grid.to(x_t.device)[_nearest(times, grid)]
        # The trainer has left its autocast by now, and the student shall compute as in FastGen's own step.
        with model.autocast():
            predicted: Tensor = model.net(x_t, t, condition=condition, fwd_pred_type=host_prediction)
        return predicted

    return HostTerms(
        config,
        Parametrisation(coefficients, prediction),
        predict,
        clips=lambda batch: batch[0]._prepare_training_data(batch[1])[0],
        layout=layout,
    )


def few_steps(model: Any) -> Tensor:
    """``[N]`` in the noise schedule's own precision: the times at which a FastGen student is trained, without the 0."""
    scheduler, config = model.net.noise_scheduler, model.config
    options = {"device": model.device, "dtype": scheduler.t_precision}
    if config.student_sample_steps == 1:
        # A schedule's own list of one may start a little below: at 79.56 of EDM's 80.
        return torch.tensor([scheduler.max_t], **options)
    if config.sample_t_cfg.t_list is not None:
        return torch.tensor(list(config.sample_t_cfg.t_list)[:-1], **options)
    steps: Tensor = scheduler.get_t_list(sample_steps=config.student_sample_steps, device=model.device)
    return steps[:-1]


def half_rate(
    method: Any, interpolator: Callable[[Tensor], Tensor] = interpolate_linearly, half_rate_steps: int = 2
) -> Any:
    """A FastGen method whose students are sampled by :class:`avd_core.HalfRateInterpolationSampler`.

    Training is untouched; validation, the samples that are logged and FastGen's inference scripts change, as they all
    sample through the method's class::

        config.model_class = L(half_rate(DMD2Model, interpolator))(config=None)

    Args:
        method: A subclass of ``FastGenModel`` that samples as it does, such as ``DMD2Model``.
        interpolator: As there; a network in eval mode and on the samples' device.
        half_rate_steps: How many of the few steps run on every second frame.

    Returns:
        A subclass of ``method``.

    Raises:
        ImportError, RuntimeError: As :func:`avd_callback`.
        ValueError: If the method samples in a way of its own, as causal ones do. When sampling: if there are fewer
            steps, or the student is not on rectified flow's path, is given frames, or does not sample with
            ``student_sample_type="sde"``.
    """
    _check_host()
    base = _HOST.load("fastgen.methods.model").FastGenModel
    own = getattr(method, "_student_sample_loop", None)
    if getattr(own, "__func__", None) is not base._student_sample_loop.__func__:
        raise ValueError(f"{method.__name__} samples in a way of its own, which has no half frame rate.")

    def _student_sample_loop(
        cls: Any,
        /,
        net: Any,
        x: Tensor,
        t_list: Tensor,
        condition: Any = None,
        student_sample_type: str = "sde",
        **_: Any,
    ) -> Tensor:
        _check_sampling(net, student_sample_type)
        grid = t_list[:-1]

        def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
            t = grid.to(x_t.device)[_nearest(timesteps, grid)]
            x_0: Tensor = net(x_t, t, condition=condition, fwd_pred_type="x0")
            return x_0

        sampler = HalfRateInterpolationSampler(
            denoise, interpolator, tuple(grid.tolist()), half_rate_steps, schedule=FlowMatchingSchedule(1)
        )
        return sampler(x)

    return type(
        f"HalfRate{method.__name__}",
        (method,),
        {"_student_sample_loop": classmethod(_student_sample_loop), "__doc__": method.__doc__},
    )


@functools.cache
def _callback_class() -> Any:
    _check_host()
    return type(
        "AVDCallback", (AVDHooks, _HOST.load("fastgen.callbacks.callback").Callback), {"__doc__": AVDHooks.__doc__}
    )


def _updates_student(model: Any, iteration: int) -> bool:
    """Whether this iteration's backward pass is for the student: the method says so by what it steps afterwards."""
    return any(optimizer is model.net_optimizer for optimizer in model.get_optimizers(iteration))


def _generated(output_batch: Mapping[str, Any], method: str) -> Tensor:
    """The sample behind the method's loss: of several steps "gen_rand" is a function, and the sample beside it."""
    samples = output_batch.get("gen_rand_train", output_batch.get("gen_rand"))
    if not isinstance(samples, Tensor) or not samples.requires_grad:
        raise RuntimeError(
            f"{method} puts no generated sample with gradient into output_batch (gen_rand_train, or gen_rand of one "
            "step), which the motion term needs. Pass motion=None to avd_callback."
        )
    return samples


def _prediction_of(net: Any) -> tuple[str, Prediction]:
    """What to ask of a network, in FastGen's word and in ours: what it was made for, as conversions only add error."""
    asked = net.net_pred_type
    if asked == "flow" and not _is_rectified_flow(net):
        asked = "x0"
    if asked not in _PREDICTIONS:
        raise _HOST.moved(f"The network predicts {asked!r}, known are {sorted(_PREDICTIONS)}")
    return asked, _PREDICTIONS[asked]


def _layout(input_shape: Any, motion: MotionConfig | None) -> Layout:
    shape = list(input_shape)
    if len(shape) not in (3, 4):
        raise _HOST.moved(f"model.input_shape is neither [C, H, W] nor [C, T, H, W], but {shape}")
    if motion is not None and (len(shape) == 3 or shape[1] < 2):
        raise ValueError(
            f"The motion term is the variance along frames, and images have none: model.input_shape is {shape}. "
            "Pass motion=None to avd_callback."
        )
    return "BCFHW" if len(shape) == 4 else "BCHW"


def _nearest(times: Tensor, grid: Tensor) -> Tensor:
    """``[B]`` indices into the grid, which has FastGen's own times.

    FastGen checks their range in float64, and 0.999 in float32 is outside.
    """
    return (times.to(grid.dtype).unsqueeze(1) - grid.to(times.device)).abs().argmin(dim=1)


def _check_equal_on_all_ranks(terms: HostTerms, iteration: int, device: torch.device) -> None:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    state = [tensor.to(device, torch.float64).flatten() for tensor in terms.objective.state_dict().values()]
    own = torch.cat([torch.tensor([iteration], device=device, dtype=torch.float64), *state])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    if any(not torch.equal(other, everyone[0]) for other in everyone):
        iterations = [int(other[0]) for other in everyone]
        raise RuntimeError(
            f"The ranks have not loaded the same checkpoint: they stand at iterations {iterations}, or their running "
            "means differ. FastGen's checkpointer starts a rank that does not find the file anew: put "
            "trainer.checkpointer.save_dir where all ranks see it."
        )


def _check_sampling(net: Any, student_sample_type: str) -> None:
    if student_sample_type != "sde":
        raise ValueError(
            f'Half-rate sampling noises each prediction anew: it needs model.student_sample_type="sde", got '
            f"{student_sample_type!r}."
        )
    if not _is_rectified_flow(net):
        raise ValueError(f"Half-rate sampling is for rectified flow, not {type(net.noise_scheduler).__name__}.")
    conditioned = [name for name in ("is_i2v", "is_vid2vid", "is_video2world") if getattr(net, name, False)]
    if conditioned or hasattr(net, "preserve_conditioning"):
        raise ValueError(
            f"Half-rate sampling is for text-to-video: {type(net).__name__} is given frames, at the full rate."
        )


def _is_rectified_flow(net: Any) -> bool:
    return isinstance(net.noise_scheduler, _HOST.load("fastgen.networks.noise_schedule").RFNoiseSchedule)


def _check_host() -> None:
    """That everything of FastGen that is used here is there, before a run is under way."""
    for module, members in _USED.items():
        _HOST.load(module, members)
