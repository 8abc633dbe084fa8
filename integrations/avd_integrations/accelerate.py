"""Hugging Face accelerate: the terms in a loop of one's own, on an ``Accelerator``'s device and in its checkpoints.

An accelerate-style trainer is a script, so there is nothing to hook into: :class:`AcceleratorTerms` are
:class:`HostTerms`, called where the script has its loss. accelerate is imported when they are constructed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from avd_core import AVDConfig, LossOutput
from avd_integrations._host import Host, with_accumulation
from avd_integrations.parametrisation import Parametrisation
from avd_integrations.terms import HostTerms, Layout

__all__ = ["PROVEN_ON", "AcceleratorTerms"]

PROVEN_ON = "huggingface/accelerate 1.15.0"
"""Where the tests ran."""

_HOST = Host("accelerate", PROVEN_ON, "Install it with pip install accelerate.")

_USED = ("device", "gradient_accumulation_steps", "register_for_checkpointing", "sync_gradients")


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
        time_range: As :class:`HostTerms`.
        bins: As :class:`HostTerms`.

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
        time_range: tuple[float, float] | None = None,
        bins: int = 20,
    ) -> None:
        module = _HOST.load("accelerate")
        if not isinstance(accelerator, module.Accelerator):
            raise TypeError(f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}.")
        replace(_HOST, name=f"accelerate {module.__version__}").check(accelerator, dict.fromkeys(_USED, ()))
        if config.regression is not None and not config.regression.auto_update:
            raise ValueError(
                "RegressionConfig.auto_update is not to be set: the cache follows the Accelerator's gradient "
                "accumulation."
            )
        config = with_accumulation(config, accelerator.gradient_accumulation_steps)
        super().__init__(
            config,
            parametrisation,
            predict,
            clips,
            layout=layout,
            loss_scale=loss_scale,
            time_range=time_range,
            bins=bins,
        )
        self._accelerator = accelerator
        self.to(accelerator.device)
        accelerator.register_for_checkpointing(self)

    def on_prediction(self, **given: Tensor) -> LossOutput:
        """As :class:`HostTerms`; then ends the cache's iteration where the accelerator ends the optimizer step."""
        output = super().on_prediction(**given)
        if self._accelerator.sync_gradients:
            self.update()
        return output
