"""The whole addition to a distribution-matching loss in one module: Eq. 9 without its first term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from avd_core._checks import check_floating
from avd_core.balance import GradientBalance
from avd_core.cache import LossMeanCache
from avd_core.config import AVDConfig
from avd_core.motion import ClippedTemporalVarianceLoss
from avd_core.output import LossOutput
from avd_core.regression import AdaptiveRegressionLoss


class AVDObjective(nn.Module):
    """Adaptive regression and clipped temporal variance, to be added to a matching loss that you have.

    ``L_G = L_matching + w_reg w_{t,s} L_reg + w_temp L_temp`` (You et al. 2026, Eq. 9); this module gives the second
    and third term. It has no parameters. Its state is the cache and the balance: save it with the rest of the run.

    Args:
        config: Hyperparameters; None is the paper's. A part that is None there is left out here.

    Attributes:
        regression: The regression loss with its ``cache``, or None.
        motion: The temporal variance loss, or None.
        balance: The :class:`GradientBalance` of the regression and the matching term. It measures their ratio in calls
            that pass ``matching_loss`` and ``matching_output``, and holds it if ``config.gradient_ratio`` is set.

    Example:
        >>> objective = AVDObjective()
        >>> x_0 = torch.randn(1, 16, 3, 8, 8, requires_grad=True)             # generated
        >>> prediction = torch.randn(1, 16, 3, 8, 8, requires_grad=True)      # velocities of real clips
        >>> target = torch.randn(1, 16, 3, 8, 8)
        >>> timesteps = objective.timesteps[torch.randint(4, (1,))]
        >>> loss, metrics = objective(x_0, prediction, target, timesteps)
        >>> sorted(metrics)  # doctest: +NORMALIZE_WHITESPACE
        ['motion/loss', 'motion/temporal_loss', 'motion/variance',
         'regression/loss', 'regression/means', 'regression/sample_losses', 'regression/weights']
    """

    def __init__(self, config: AVDConfig | None = None) -> None:
        super().__init__()
        config = AVDConfig.paper() if config is None else config
        if not isinstance(config, AVDConfig):
            raise TypeError(
                f"config must be an AVDConfig, got {type(config).__name__}. AVDConfig.model_validate makes one of a "
                "mapping."
            )
        self.config = config
        self.regression: AdaptiveRegressionLoss | None = None
        self.motion: ClippedTemporalVarianceLoss | None = None
        self.balance = GradientBalance(target=config.gradient_ratio, **config.balance.model_dump())
        if (r := config.regression) is not None:
            cache = LossMeanCache(
                config.timesteps, decay=r.decay, order=r.order, auto_update=r.auto_update, sync_ranks=r.sync_ranks
            )
            self.regression = AdaptiveRegressionLoss(
                cache, weight=r.weight, sharpness=r.sharpness, deviation=r.deviation, judged=r.judged
            )
        if config.motion is not None:
            self.motion = ClippedTemporalVarianceLoss(**config.motion.model_dump())

    @property
    def timesteps(self) -> Tensor:
        """``[K]`` float32: the few steps of the configuration, on this module's device, to be drawn from by index."""
        if self.regression is not None:
            return self.regression.cache.timesteps
        return torch.tensor(self.config.timesteps, dtype=torch.float32, device=self.balance.means.device)

    def forward(
        self,
        x_0: Tensor | None = None,
        prediction: Tensor | None = None,
        target: Tensor | None = None,
        timesteps: Tensor | None = None,
        *,
        clips: Tensor | None = None,
        teacher_prediction: Tensor | None = None,
        matching_loss: Tensor | None = None,
        matching_output: Tensor | Sequence[Tensor] | None = None,
    ) -> LossOutput:
        """Compute both terms.

        Args:
            x_0: ``[B, C, F, H, W]`` generated samples, for the motion term. Unused if the configuration has none.
            prediction: ``[B', ...]`` the student's velocity on noised real clips, for the regression. This and all that
                follows is unused if the configuration has none.
            target: ``[B', ...]`` the velocity ``noise - x_0`` of those clips.
            timesteps: ``[B']`` the few-step timesteps at which they were noised.
            clips: ``[B', ...]`` those clips, clean; only if ``config.regression.judged`` is ``"relative"``.
            teacher_prediction: ``[B', ...]`` the teacher's velocity for the same noised clips, without guidance; only
                if ``config.regression.judged`` is ``"excess"``.
            matching_loss: Scalar, your matching loss, before its ``backward()``. With this and the next argument the
                ratio of gradients is reported, and held if ``config.gradient_ratio`` is set. It is not added to the
                result.
            matching_output: ``[B, ...]`` the velocity that the student predicted for the generated samples and from
                which ``matching_loss`` was computed; several of them where it is the sum of losses of several outputs.

        Returns:
            LossOutput: ``loss`` scalar; the metrics of each part behind ``regression/``, ``motion/`` and ``balance/``,
            with each term's own weighted ``loss`` among them.

        Raises:
            ValueError: If an argument of a part that is switched on is missing; if ``x_0`` has other than five
                dimensions; in training mode, if ``x_0`` or ``prediction`` has no gradient; otherwise as the parts do.
        """
        # All checks come first: a call that fails must not leave its losses in the cache.
        on_clips: dict[str, Any] = {
            "clips": clips,
            "teacher_prediction": teacher_prediction,
            "matching_loss": matching_loss,
            "matching_output": matching_output,
        }
        self._check_inputs(x_0, prediction, target, timesteps, **on_clips)
        parts = []
        if self.regression is not None:
            regression = self.on_clips(prediction, target, timesteps, **on_clips)  # may break a compiled graph
            parts.append(regression)
        if self.motion is not None:
            parts.append(self.on_samples(x_0))
        metrics = {name: value for part in parts for name, value in part.metrics.items()}
        return LossOutput(torch.stack([part.loss for part in parts]).sum(), metrics)

    def on_samples(self, x_0: Tensor | None) -> LossOutput:
        """The term on generated samples, for loops with a backward pass of its own for real clips.

        Then the activations of only one forward are held at a time. The gradients of both passes add up to those of
        :meth:`forward`. Arguments and metrics are the same as there.

        Raises:
            ValueError: If the part is left out; otherwise as :meth:`forward`.
        """
        if self.motion is None:
            raise ValueError("AVDConfig leaves out the motion term: there is nothing to compute on samples.")
        self._check_samples(x_0)
        return _prefixed("motion", self.motion(x_0))

    def on_clips(
        self,
        prediction: Tensor | None,
        target: Tensor | None,
        timesteps: Tensor | None,
        *,
        clips: Tensor | None = None,
        teacher_prediction: Tensor | None = None,
        matching_loss: Tensor | None = None,
        matching_output: Tensor | Sequence[Tensor] | None = None,
    ) -> LossOutput:
        """The term on real clips; see :meth:`on_samples`.

        ``matching_output`` may be a detached copy of the generator's velocity, with ``matching_loss`` computed from it:
        the graph of the generator is not needed.

        Raises:
            ValueError: If the part is left out; otherwise as :meth:`forward`.
        """
        if self.regression is None:
            raise ValueError("AVDConfig leaves out the regression: there is nothing to compute on clips.")
        judged_by = {"clips": clips, "teacher_prediction": teacher_prediction}
        self._check_clips(prediction, target, timesteps, matching_loss, matching_output, **judged_by)
        loss, metrics = self.regression(prediction, target, timesteps, **judged_by)
        balance: dict[str, Tensor] = {}
        if matching_loss is not None:
            loss, balance_metrics = self.balance(loss, prediction, matching_loss, matching_output)
            balance = {f"balance/{name}": value for name, value in balance_metrics.items()}
        output = _prefixed("regression", LossOutput(loss, metrics))
        return LossOutput(output.loss, {**balance, **output.metrics})

    def update(self) -> None:
        """End an optimizer step. Call it once per step, on every rank (a collective if ranks are synchronised).

        It only acts with ``RegressionConfig(auto_update=False)``, so a loop can call it in any case.
        """
        if self.regression is not None and not self.regression.cache.auto_update:
            self.regression.cache.update()

    def _check_inputs(
        self,
        x_0: Tensor | None,
        prediction: Tensor | None,
        target: Tensor | None,
        timesteps: Tensor | None,
        matching_loss: Tensor | None,
        matching_output: Tensor | Sequence[Tensor] | None,
        **judged_by: Tensor | None,
    ) -> None:
        if self.regression is None and self.motion is None:
            raise ValueError(
                "AVDConfig leaves out both the regression and the motion term: there is nothing to compute."
            )
        if self.regression is not None:
            self._check_clips(prediction, target, timesteps, matching_loss, matching_output, **judged_by)
        else:
            _check_matching(matching_loss, matching_output)
        if self.motion is not None:
            self._check_samples(x_0)

    def _check_samples(self, x_0: Tensor | None) -> None:
        if x_0 is None:
            raise ValueError(
                "The motion term needs x_0, the generated samples. Pass them, or leave the part out with "
                "AVDConfig(motion=None)."
            )
        if self.motion is not None:
            check_floating("x_0", x_0)
            if x_0.ndim != 5:
                raise ValueError(
                    f"x_0 must be [B, C, F, H, W], or [B, F, C, H, W] with frame_dim=1, got shape {list(x_0.shape)}. "
                    "Images have no motion: leave the part out with AVDConfig(motion=None)."
                )
            self.motion.check_inputs(x_0)

    def _check_clips(
        self,
        prediction: Tensor | None,
        target: Tensor | None,
        timesteps: Tensor | None,
        matching_loss: Tensor | None,
        matching_output: Tensor | Sequence[Tensor] | None,
        **judged_by: Tensor | None,
    ) -> None:
        _check_matching(matching_loss, matching_output)
        if self.config.gradient_ratio is not None and matching_loss is None:
            raise ValueError(
                "AVDConfig(gradient_ratio=...) needs matching_loss and matching_output to compare with. Pass both, or "
                "set gradient_ratio=None for the paper's constant weight."
            )
        if prediction is None or target is None or timesteps is None:
            raise ValueError(
                "The regression needs prediction, target and timesteps of real clips. Pass them, or leave the part "
                "out with AVDConfig(regression=None)."
            )
        if self.regression is not None:
            self.regression.check_inputs(prediction, target, timesteps, **judged_by)
        if matching_loss is not None and matching_output is not None:
            self.balance.check_inputs(None, prediction, matching_loss, matching_output)


def _check_matching(matching_loss: Tensor | None, matching_output: Tensor | Sequence[Tensor] | None) -> None:
    if (matching_loss is None) != (matching_output is None):
        raise ValueError("matching_loss and matching_output belong together: pass both or neither.")


def _prefixed(part: str, output: LossOutput) -> LossOutput:
    metrics = {f"{part}/{name}": value for name, value in output.metrics.items()}
    metrics[f"{part}/loss"] = output.loss.detach()  # not by |, which the compiler of PyTorch 2.6 does not know
    return LossOutput(output.loss, metrics)
