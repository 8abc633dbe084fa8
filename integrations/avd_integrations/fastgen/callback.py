"""The callback: both terms in FastGen's loss, at its hooks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avd_core import MotionConfig, RegressionConfig
from avd_integrations._host import named_means
from avd_integrations.fastgen.host import HOST, check_host
from avd_integrations.fastgen.terms import fastgen_terms
from avd_integrations.terms import HostTerms

_PAPER: Mapping[str, Any] = MappingProxyType({})


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
    ``.../sample_losses``, ``.../means``, and ``avd/motion/loss``, ``.../temporal_loss``, ``.../variance``.

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
            raise HOST.moved(f'There is no loss_dict["total_loss"], only {sorted(loss_dict)}')
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


@functools.cache
def _callback_class() -> Any:
    check_host()
    return type(
        "AVDCallback", (AVDHooks, HOST.load("fastgen.callbacks.callback").Callback), {"__doc__": AVDHooks.__doc__}
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
