"""Hugging Face accelerate: the terms in a loop of one's own, on an ``Accelerator``'s device and in its checkpoints.

An accelerate-style trainer is a script, so there is nothing to hook into: :class:`AcceleratorTerms` are
:class:`HostTerms`, called where the script has its loss. accelerate is imported when they are constructed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from avd_core import AVDConfig, LossOutput, RegressionConfig
from avd_integrations.parametrisation import Parametrisation
from avd_integrations.terms import HostTerms, Layout

__all__ = ["PROVEN_ON", "AcceleratorTerms"]

PROVEN_ON = "huggingface/accelerate 1.15.0"

# What is used of the host.
_CONTRACT = ("device", "gradient_accumulation_steps", "register_for_checkpointing", "sync_gradients")


class AcceleratorTerms(HostTerms):
    """Both terms, on an accelerator's device, in its checkpoints and in step with its gradient accumulation::

        terms = AcceleratorTerms(
            accelerator, AVDConfig(timesteps=(1000, 750, 500, 250)), rectified_flow(),
            predict=lambda x_t, t, batch: student(x_t, t, batch["text"]), clips=lambda batch: batch["latents"],
        )
        with accelerator.accumulate(student):
            accelerator.backward(host_loss + terms(batch, generated_x_0).loss)

    - *Not to be prepared*: terms have no parameters. Inside of what ``accelerator.prepare`` wraps in DDP, its
      broadcast of buffers would overwrite the cache's running iteration on all ranks but the first.
    - *Gradient accumulation*: a cache's iteration ends with the micro-batch at which ``accelerator.sync_gradients`` is
      true, right after its losses are recorded; all micro-batches of a step are weighted by the same means. Call the
      terms within ``accelerator.accumulate``, equally often on every rank.
    - *Mixed precision*: predictions in half precision are compared in float32.
    - *Checkpoints*: the terms are registered with ``accelerator.register_for_checkpointing``, so ``save_state`` writes
      their state, tensors only, into ``custom_checkpoint_{i}.pkl``, ``i`` counting what is registered in the order of
      registration, and ``load_state`` reads it, with ``torch.load(weights_only=False)``.

    Args:
        accelerator: An ``accelerate.Accelerator``.
        config: As :class:`HostTerms`. ``regression.auto_update`` is not to be set.
        parametrisation: As :class:`HostTerms`.
        predict: As :class:`HostTerms`; call the prepared student.
        clips: As :class:`HostTerms`.
        layout: As :class:`HostTerms`.
        loss_scale: As :class:`HostTerms`.

    Raises:
        ImportError: If accelerate cannot be imported.
        RuntimeError: If it is one that this adapter does not fit.
        TypeError: If ``accelerator`` is something else.
        ValueError: If ``auto_update`` is set, or ``order="update_first"`` is asked for with gradient accumulation;
            otherwise as :class:`HostTerms`.
    """

    def __init__(
        self,
        accelerator: Any,
        config: AVDConfig,
        parametrisation: Parametrisation,
        predict: Callable[[Tensor, Tensor, Any], Tensor],
        clips: Callable[[Any], Tensor],
        *,
        layout: Layout = "BCFHW",
        loss_scale: float | Callable[[torch.Size], float] = 1.0,
    ) -> None:
        _check_contract(accelerator)
        config = _in_step(config, accelerator.gradient_accumulation_steps)
        super().__init__(config, parametrisation, predict, clips, layout=layout, loss_scale=loss_scale)
        self._accelerator = accelerator
        self.to(accelerator.device)
        accelerator.register_for_checkpointing(self)

    def on_prediction(self, output: Tensor, x_t: Tensor, clips: Tensor, noise: Tensor, times: Tensor) -> LossOutput:
        result = super().on_prediction(output, x_t, clips, noise, times)
        regression = self.objective.regression
        if regression is not None and not regression.cache.auto_update and self._accelerator.sync_gradients:
            regression.cache.update()
        return result


def _in_step(config: AVDConfig, accumulation: int) -> AVDConfig:
    """The configuration whose cache is updated once per optimizer step."""
    if config.regression is None:
        return config
    if not config.regression.auto_update:
        raise ValueError(
            "RegressionConfig.auto_update is not to be set: the cache follows the Accelerator's gradient accumulation."
        )
    if accumulation <= 1:
        return config
    regression = RegressionConfig(**{**config.regression.model_dump(), "auto_update": False})
    return config.model_copy(update={"regression": regression})


def _check_contract(accelerator: Any) -> None:
    try:
        host = importlib.import_module("accelerate")
    except ImportError as error:
        raise ImportError(
            f"accelerate is needed here, and importing it failed: {error}. Install it with pip install accelerate. "
            f"{_proven()}"
        ) from error
    if not isinstance(accelerator, host.Accelerator):
        raise TypeError(f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}.")
    if missing := [name for name in _CONTRACT if not hasattr(accelerator, name)]:
        raise RuntimeError(
            f"accelerate {host.__version__} has no Accelerator.{', '.join(missing)} any more. {_proven()}"
        )


def _proven() -> str:
    return f"This adapter was proven on {PROVEN_ON}."
