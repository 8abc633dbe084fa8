"""Both terms in FastGen's conventions: its noise schedules, its predictions, its few steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from avd_core import AVDConfig, MotionConfig, RegressionConfig
from avd_integrations._host import with_accumulation
from avd_integrations.fastgen.host import HOST, check_host, is_rectified_flow, nearest
from avd_integrations.parametrisation import Parametrisation, Prediction
from avd_integrations.terms import HostTerms, Layout

# FastGen's names of predictions. Its "flow" is a velocity of ours on rectified flow's path only.
_PREDICTIONS: dict[str, Prediction] = {"x0": "x_0", "eps": "noise", "v": "v", "flow": "velocity"}


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
    check_host()
    scheduler, grid = model.net.noise_scheduler, few_steps(model)
    host_prediction, prediction = _prediction_of(model.net)
    layout = _layout(model.input_shape, motion)
    config = AVDConfig(timesteps=tuple(grid.tolist()), regression=regression, motion=motion)
    config = with_accumulation(config, grad_accum_rounds)
    alphas, sigmas = scheduler.alpha(grid), scheduler.sigma(grid)

    def coefficients(times: Tensor) -> tuple[Tensor, Tensor]:
        index = nearest(times, grid)
        return alphas.to(times.device)[index], sigmas.to(times.device)[index]

    def predict(x_t: Tensor, times: Tensor, batch: tuple[Any, dict[str, Any]]) -> Tensor:
        model, data = batch
        condition = model._prepare_training_data(data)[1]
        t = grid.to(x_t.device)[nearest(times, grid)]
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


def _prediction_of(net: Any) -> tuple[str, Prediction]:
    """What to ask of a network, in FastGen's word and in ours: what it was made for, as conversions only add error."""
    asked = net.net_pred_type
    if asked == "flow" and not is_rectified_flow(net):
        asked = "x0"
    if asked not in _PREDICTIONS:
        raise HOST.moved(f"The network predicts {asked!r}, known are {sorted(_PREDICTIONS)}")
    return asked, _PREDICTIONS[asked]


def _layout(input_shape: Any, motion: MotionConfig | None) -> Layout:
    shape = list(input_shape)
    if len(shape) not in (3, 4):
        raise HOST.moved(f"model.input_shape is neither [C, H, W] nor [C, T, H, W], but {shape}")
    if motion is not None and (len(shape) == 3 or shape[1] < 2):
        raise ValueError(
            f"The motion term is the variance along frames, and images have none: model.input_shape is {shape}. "
            "Pass motion=None to avd_callback."
        )
    return "BCFHW" if len(shape) == 4 else "BCHW"
