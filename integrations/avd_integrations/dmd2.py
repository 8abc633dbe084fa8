"""DMD2's Stable Diffusion and SDXL trainer: adaptive regression on its real images.

DMD2 imports as ``main`` and is not installable, so run from its checkout. Nothing of it is imported before
:func:`sd_uni_model` is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from avd_core import AVDConfig, RegressionConfig
from avd_integrations._host import Host
from avd_integrations.parametrisation import Parametrisation, variance_preserving
from avd_integrations.terms import HostTerms

PROVEN_ON = "tianweiy/DMD2 8d8fa55"
"""The commit that the tests ran in."""

_HOST = Host("DMD2", PROVEN_ON, "Run from a checkout of https://github.com/tianweiy/DMD2.")

_READ = (
    "feedforward_model",
    "guidance_model",
    "accelerator",
    "alphas_cumprod",
    "denoising",
    "denoising_step_list",
    "num_denoising_step",
    "conditioning_timestep",
    "num_train_timesteps",
    "network_context_manager",
)
"""Attributes of ``SDUniModel`` that the subclass reads."""

_PASSED = ("real_train_dict", "compute_generator_gradient", "generator_turn")
"""Arguments of ``SDUniModel.forward`` that the subclass reads."""

_OPTIONS = ("gan_alone", "cls_on_clean_image")
"""Of the trainer's command line."""

_BATCH = ("images", "text_embedding", "unet_added_conditions")
"""Keys of ``real_train_dict`` that the subclass reads."""


def sd_uni_model(regression: RegressionConfig | None = None) -> type[nn.Module]:
    """DMD2's ``SDUniModel`` with adaptive regression, to stand in its place in ``main/train_sd.py``.

    On generator updates the generator makes one more forward, on noised real images at its own few steps, and the
    regression is added to ``loss_dict["loss_dm"]``: the trainer adds up the entries that it knows. So it is scaled by
    ``--dm_loss_weight`` together with distribution matching, and its weight counts relative to that, as in Eq. 9.

    The generator's few steps are the host's: with ``--denoising`` those of ``--num_denoising_step``, otherwise
    ``--conditioning_timestep`` alone. It sees what the host shows it there: pure noise at the first step, whatever
    ``alphas_cumprod`` says, and noised images at the others.

    The cache is the submodule ``avd`` of the guidance model, so both ways of saving write it into that model's file:
    accelerate's state, and with ``--fsdp`` the two ``.bin`` files. There is no motion term: images have no frames.

    ``log_dict["avd"]`` has the metrics of :class:`avd_core.AVDObjective`.

    Args:
        regression: Options of the adaptive regression; None is the paper's. DMD2 does not accumulate gradients.

    Returns:
        A subclass of ``SDUniModel``, with the same constructor.

    Raises:
        ImportError: If DMD2 cannot be imported.
        RuntimeError: If it is one that this adapter does not fit.
        TypeError: If ``regression`` is something else, such as an ``AVDConfig``.
        ValueError: If ``regression.auto_update`` is off. When the subclass is constructed: with ``--gan_alone``, or
            without ``--cls_on_clean_image``.
    """
    regression = RegressionConfig() if regression is None else regression
    if not isinstance(regression, RegressionConfig):
        raise TypeError(
            f"regression must be a RegressionConfig or None, got {type(regression).__name__}. DMD2 has the few steps "
            "and no motion term, so the regression's options are all that there is to configure."
        )
    if not regression.auto_update:
        raise ValueError("DMD2 does not accumulate gradients. Leave regression.auto_update at True.")
    base: Any = _HOST.load("main.sd_unified_model", {"SDUniModel.forward": _PASSED}).SDUniModel

    class AdaptiveSDUniModel(base):  # type: ignore[misc]
        """``SDUniModel``, and the regression."""

        def __init__(self, args: Any, accelerator: Any) -> None:
            _check_options(args)
            super().__init__(args, accelerator)
            _HOST.check(self, dict.fromkeys(_READ, ()))
            steps = [self.conditioning_timestep]
            if self.denoising:
                # Where their number does not divide 1000 the list has one more, which is never drawn.
                steps = self.denoising_step_list[: self.num_denoising_step].tolist()
            # On the guidance model before the trainer wraps and saves it. Being wrapped does the cache no harm here:
            # it is updated in each call, so DDP's broadcast finds nothing that is pending and the same means on all
            # ranks, and the trainer has mixed_precision="no", so FSDP casts no buffers.
            self.guidance_model.avd = HostTerms(
                AVDConfig(timesteps=tuple(float(step) for step in steps), regression=regression, motion=None),
                variance_preserving(self.alphas_cumprod, "noise"),
                layout="BCHW",
            ).to(self.alphas_cumprod.device)

        def forward(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
            loss_dict, log_dict = super().forward(*args, **kwargs)
            call = inspect.signature(super().forward).bind(*args, **kwargs)
            call.apply_defaults()
            if call.arguments["generator_turn"] and call.arguments["compute_generator_gradient"]:
                loss, metrics = self._regression(call.arguments["real_train_dict"])
                loss_dict["loss_dm"] = loss_dict["loss_dm"] + loss
                log_dict["avd"] = metrics
            return loss_dict, log_dict

        def _regression(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
            if gone := [key for key in _BATCH if key not in batch]:
                raise _HOST.moved(f"real_train_dict has no {', '.join(gone)}")
            terms: HostTerms = self.accelerator.unwrap_model(self.guidance_model).avd
            images = batch["images"].to(self.alphas_cumprod.device)
            times = terms.draw_times(len(images), images.device)
            x_t = self._noised(terms.parametrisation, images, times)
            # The noise that, on the path, leads from these images to this input.
            noise = Parametrisation(terms.parametrisation.coefficients, "x_0").noise(images, x_t, times)
            prediction = self._predict(x_t, times, batch)
            loss, metrics = terms.on_prediction(prediction=prediction, x_t=x_t, clips=images, noise=noise, times=times)
            return loss, metrics

        def _noised(self, parametrisation: Parametrisation, images: Tensor, times: Tensor) -> Tensor:
            noise = torch.randn_like(images)
            if not self.denoising:
                return noise
            pure = (times == self.num_train_timesteps - 1).view(-1, 1, 1, 1)
            return torch.where(pure, noise, parametrisation.add_noise(images, noise, times))

        def _predict(self, x_t: Tensor, times: Tensor, batch: Mapping[str, Any]) -> Tensor:
            with self.network_context_manager:
                prediction: Tensor = self.feedforward_model(
                    x_t,
                    times.long(),
                    batch["text_embedding"],
                    added_cond_kwargs=batch["unet_added_conditions"],
                ).sample
            return prediction

    return AdaptiveSDUniModel


def _check_options(args: Any) -> None:
    _HOST.check(args, dict.fromkeys(_OPTIONS, ()))
    if args.gan_alone:
        raise ValueError("With --gan_alone DMD2 drops loss_dm, with which the regression travels. Leave it out.")
    if not args.cls_on_clean_image:
        raise ValueError(
            "Without --cls_on_clean_image DMD2 loads no real images, so there is nothing to regress on. Set it "
            "(with --gen_cls_loss_weight 0 and --guidance_cls_loss_weight 0 the classifier stays without effect)."
        )
