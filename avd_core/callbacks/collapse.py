"""Early warnings that a student freezes, jitters, oversaturates or washes out, or that what trains it has failed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor

from avd_core._checks import check_number
from avd_core.callbacks.base import Callback, Metrics
from avd_core.callbacks.rules import CollapseFinding, Judge, Rule
from avd_core.motion import temporal_variance
from avd_core.regression import PAPER_SPREAD

OUTER_WEIGHTS = 0.1
"""A weight in this share of (0, ``w_reg``), at either end, is nearly off or on."""
MAX_SWITCHED = 0.5
"""Where more of the weights than this are in the outer tenths, the weight is a switch."""
MIN_WEIGHT_SPREAD = 0.005
"""Where weights have a smaller standard deviation than this share of ``w_reg``, the weight is a constant. Those of the
tiny preset have 0.016 on clips that all fit their captions, and still tell wrong captions (``docs/studies.md``)."""

# Of fewer clips at a few step, neither can be told.
_ENOUGH = 20


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of real latents (or the teacher's), to compare a student's with.

    Attributes:
        temporal_variance: ``E[Var_t(x)]``.
        channel_std: Standard deviation of each of the C channels.
    """

    temporal_variance: float
    channel_std: tuple[float, ...]

    @classmethod
    @torch.no_grad()
    def measure(cls, x_0: Tensor, *, frame_dim: int = 2) -> Self:
        """Measure samples ``[B, C, F, H, W]`` (``frame_dim=1``: ``[B, F, C, H, W]``), a few dozen of them."""
        variance = temporal_variance(x_0, frame_dim=frame_dim)
        return cls(float(variance), tuple(_channel_std(x_0, frame_dim).tolist()))


_OF_DISCRIMINATOR = ("ranked", "hinge_loss")
_SMOOTHED = ("variance", "saturation", "gradient_ratio", *_OF_DISCRIMINATOR)
_SHARPNESS = (
    f'set deviation="standardized" with a sharpness of 3, or the sharpness to 3 * {PAPER_SPREAD} / the spread of the '
    "losses around their means"
)


class CollapseMonitor(Callback):
    """Watches samples, loss weights and discriminator, and says in plain words when a run goes wrong.

    When a signal crosses a limit, a finding is logged (``logging``, level WARNING) and kept in ``findings``. The same
    finding comes again only if the signal has recovered in between.

    Reads these metrics, if they are there:

    ============================  ==================  =======================================  ========================
    metric                        signal              what it is                               findings
    ============================  ==================  =======================================  ========================
    ``x_0``, generated latents    ``variance``        temporal variance / the reference's      ``frozen``, ``jitter``
    ``x_0``                       ``saturation``      channel std / the reference's, averaged  ``oversaturated``,
                                                                                               ``washed_out``
    ``regression/weights``        ``weight``          mean of the weights / their maximum      ``regression_silent``
    ``regression/timesteps``      ``switched``        share of weights in the outer tenths     ``weights_switch``
    ..                            ``weight_spread``   standard deviation / their maximum       ``weights_constant``
    ``balance/gradient_ratio``    ``gradient_ratio``  the ratio of :class:`GradientBalance`,   ``regression_dominates``
    ``balance/scale``                                 as it is after scaling
    ``discriminator/ranked``      ``ranked``          share of pairs in which the clip's       ``discriminator_blind``
                                                      logit lies above the sample's
    ``discriminator/hinge_loss``  ``hinge_loss``      of :class:`HingeLoss`                    ``discriminator_won``
    ============================  ==================  =======================================  ========================

    Pass ``x_0`` only in steps whose samples are finished, since samples of an earlier few step are always blurred. In
    steps without ``x_0`` samples are not judged.

    All signals but those of the weights are smoothed over steps, whether they come in each step or in one of four.
    Those of the weights are of single clips, the last ``window`` of them: an average over a batch looks moderate also
    where half of its weights are on and half are off. Each few step with at least 20 of these clips is judged by
    itself, and the signal is that of the worst; clips at other times, or all if there are no ``regression/timesteps``,
    are judged together. A step whose weights are silent counts neither as a switch nor as a constant, and a constant
    not as a switch.

    A discriminator is judged by what has lasted for ``patience`` steps: of few pairs the share is noisy, and it rises
    slowly. Neither the logits' gap nor their signs are asked: all logits may wander together, by more than what
    sets clips and samples apart, and by more from timestep to timestep; so pairs should be of one caption and timestep.
    A share that stays near one half, or comes back to it, means that clips and samples are not told apart: because the
    samples are as good as clips, or because the equilibrium has collapsed. A hinge loss near zero means that the
    discriminator has won: nearly all logits lie beyond their margins, so the gap is about 2 or more, and it learns
    nothing more. (Both limits are ours; the second belongs to the hinge loss, whose margins are 1 and -1.)

    Costs two reductions of ``x_0`` per step, and waits for the device once every ``every`` steps.

    Args:
        reference: Statistics of real latents, in the student's latent space (:meth:`LatentStatistics.measure`).
        regression_weight: The ``weight`` of the regression loss, by which its weights are divided; None skips the
            weights, for plain regression (``sharpness=0``) say, whose weights are constant on purpose.
        every: Steps between two judgements, at least 1.
        grace: Steps at the start of each signal that are not judged: a few-step student starts out blurred and still.
            For a discriminator's signals it is ``patience``.
        decay: Smoothing per step, in [0, 1), also over steps that do not show a signal. With 0.95 a signal averages
            over about 20 steps: 20 batches, or 5 if it comes in one step of four.
        window: Number of the last clips by whose weights the regression is judged, once there are so many; at least 2.
        frame_dim: Dimension of frames of ``x_0``: 2 or 1.
        variance_range: Allowed temporal variance, as multiples of the reference's. The default is wide: a motion term
            with the paper's floor lifts the variance to 2.5 times its teacher's.
        saturation_range: Allowed standard deviation, as multiples of the reference's.
        min_weight: Smallest allowed share of the regression's maximal weight. (At an average loss it is 0.5.)
        max_switched: Largest allowed share of weights below a tenth or above nine tenths of their maximum. (For normal
            losses with a spread of 0.3 and the paper's sharpness it is 0.015, at five times the spread 0.6.)
        min_weight_spread: Smallest allowed standard deviation of weights, as a share of their maximum. (For such losses
            it is 0.19, at a fiftieth of the spread 0.004.)
        max_gradient_ratio: Largest allowed ratio of the regression's gradient to the matching term's; None does not
            judge it. It proves nothing. In an earlier, smaller toy one student with 1.3 to 1.6 froze, while others with
            1.0 to 1.4 and a heavier motion term kept moving. In today's none freezes up to 1.4; above 1 clips begin to
            blur (study ``balance`` in ``docs/studies.md``).
        min_ranked: Smallest allowed share of pairs that the discriminator ranks rightly, in [0, 1); one half is chance.
        min_hinge_loss: Smallest allowed hinge loss of the discriminator.
        patience: Steps that a discriminator, which starts out blind, is not judged from its first one on; and for which
            its limits must then have been crossed, at every look, before it is said.
    """

    def __init__(
        self,
        reference: LatentStatistics,
        *,
        regression_weight: float | None = None,
        every: int = 10,
        grace: int = 100,
        decay: float = 0.95,
        window: int = 200,
        frame_dim: int = 2,
        variance_range: tuple[float, float] = (0.5, 3.0),
        saturation_range: tuple[float, float] = (0.8, 1.15),
        min_weight: float = 0.05,
        max_switched: float = MAX_SWITCHED,
        min_weight_spread: float = MIN_WEIGHT_SPREAD,
        max_gradient_ratio: float | None = None,
        min_ranked: float = 0.55,
        min_hinge_loss: float = 0.05,
        patience: int = 100,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        if grace < 0:
            raise ValueError(f"grace must be at least 0, got {grace}.")
        if patience < 0:
            raise ValueError(f"patience must be at least 0, got {patience}.")
        check_number("decay", decay, at_least=0, below=1)
        check_number("min_ranked", min_ranked, at_least=0, below=1)
        check_number("min_hinge_loss", min_hinge_loss, at_least=0)
        if window < 2:
            raise ValueError(f"window must be at least 2, got {window}: weights are compared with each other.")
        for name, (low, high) in (("variance_range", variance_range), ("saturation_range", saturation_range)):
            if not 0 < low < high:
                raise ValueError(f"{name} must be (low, high) with 0 < low < high, got {(low, high)}.")
        # Some channels may be constant, such as the colours of grey footage.
        if not (reference.temporal_variance > 0 and min(reference.channel_std) >= 0 < max(reference.channel_std)):
            raise ValueError(f"reference must have positive statistics, got {reference}. Measure clips that move.")
        self.reference = reference
        self.regression_weight = regression_weight
        self.every = every
        self.grace = grace
        self.decay = decay
        self.window = window
        self.frame_dim = frame_dim
        # Grey clips have channels that hold next to nothing; ratios to those would say nothing, and drown the others.
        channel_std = torch.tensor(reference.channel_std)
        counted = channel_std >= 0.01 * channel_std.max()
        # Multiplied by each channel's standard deviation and added up, the mean of the ratios.
        self._channel_factors = torch.where(counted, 1 / channel_std, 0.0) / counted.sum()
        self._judge = Judge(
            _rules(
                variance_range,
                saturation_range,
                min_weight,
                max_switched,
                min_weight_spread,
                max_gradient_ratio,
                min_ranked,
                min_hinge_loss,
                patience,
            )
        )
        self.patience = patience
        self.min_weight = min_weight
        self.min_weight_spread = min_weight_spread
        self._smoothed: dict[str, Tensor] = {}
        self._before: dict[str, int] = {}  # steps before a signal was first shown
        self._shown: dict[str, int] = {}  # the step, counted here, in which a signal was last shown
        # Of the last clips, oldest first: weights relative to their maximum, and timesteps; [2, N].
        self._weights = torch.empty(2, 0)
        self._steps = 0

    def after_step(self, step: int, metrics: Metrics) -> None:
        self._steps += 1
        for name, value in self._signals(metrics).items():
            before = self._smoothed.get(name, value).to(value)
            decay = self.decay ** (self._steps - self._shown.get(name, self._steps))
            # One bad batch must not blind the monitor for good.
            moved = torch.where(before.isfinite(), torch.lerp(value, before, decay), value)
            self._smoothed[name] = torch.where(value.isfinite(), moved, before)
            self._shown[name] = self._steps
            self._before.setdefault(name, self._steps - 1)
        if self.regression_weight and (weights := metrics.get("regression/weights")) is not None:
            weights = weights.detach().float() / self.regression_weight
            timesteps = metrics.get("regression/timesteps", torch.zeros_like(weights)).to(weights)
            self._weights = torch.cat([self._weights.to(weights), torch.stack([weights, timesteps])], 1)
            self._weights = self._weights[:, -self.window :]
        if self._steps > self.grace and self._steps % self.every == 0:
            signals = {name: value for name, value in self.signals().items() if not self._has_just_begun(name)}
            self._judge.look(step, signals, counted=self._steps)

    def _has_just_begun(self, signal: str) -> bool:
        grace = self.patience if signal in _OF_DISCRIMINATOR else self.grace
        return signal in self._before and self._steps - self._before[signal] <= grace

    @property
    def samples_judged(self) -> bool:
        """Whether samples have been judged at least once: without, "no finding" says nothing about them."""
        last_look = self._steps - self._steps % self.every
        return "variance" in self._before and last_look - self._before["variance"] > self.grace

    @property
    def findings(self) -> list[CollapseFinding]:
        """All findings so far, oldest first."""
        return self._judge.findings

    def signals(self) -> dict[str, float]:
        """The signals that there are so far, by the names of the table above. Waits for the device."""
        return {**self._smoothed_values(), **self._weight_signals()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "signals": self._smoothed_values(),
            "before": dict(self._before),
            "shown": dict(self._shown),
            "weights": self._weights[0].tolist(),
            "timesteps": self._weights[1].tolist(),
            "steps": self._steps,
            **self._judge.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        signals = {name: value for name, value in state_dict["signals"].items() if name in _SMOOTHED}
        self._smoothed = {name: torch.tensor(value) for name, value in signals.items()}
        # States from before weights were kept lack the rest; their signals count as shown in the last step.
        self._shown = dict(state_dict.get("shown", dict.fromkeys(self._smoothed, int(state_dict["steps"]))))
        self._before = dict(state_dict.get("before", dict.fromkeys(self._smoothed, 0)))
        weights, timesteps = state_dict.get("weights", []), state_dict.get("timesteps")
        self._weights = torch.tensor([weights, timesteps or [0.0] * len(weights)], dtype=torch.float32)
        self._steps = int(state_dict["steps"])
        self._judge.load_state_dict(state_dict)

    def _smoothed_values(self) -> dict[str, float]:
        if not self._smoothed:
            return {}
        # After a restart some may still be on the CPU, where they were saved.
        values = torch.stack([value.cpu() for value in self._smoothed.values()]).tolist()
        return dict(zip(self._smoothed, values, strict=True))

    def _weight_signals(self) -> dict[str, float]:
        weights, timesteps = self._weights.cpu()
        if len(weights) < self.window:
            return {}
        steps = _by_step(weights, timesteps)
        signals = {}
        if steps:
            signals["weight"] = min(float(step.mean()) for step in steps)
        if heard := [step for step in steps if step.mean() >= self.min_weight]:
            signals["weight_spread"] = min(float(step.std(correction=0)) for step in heard)
            signals["switched"] = max(
                float(((step < OUTER_WEIGHTS) | (step > 1 - OUTER_WEIGHTS)).float().mean())
                if step.std(correction=0) >= self.min_weight_spread
                else 0.0
                for step in heard
            )
        return signals

    @torch.no_grad()
    def _signals(self, metrics: Metrics) -> dict[str, Tensor]:
        signals = {}
        if (x_0 := metrics.get("x_0")) is not None:
            std = _channel_std(x_0, self.frame_dim)
            if std.shape != self._channel_factors.shape:
                raise ValueError(
                    f"x_0 {list(x_0.shape)} has {len(std)} channels, the reference has {len(self._channel_factors)}. "
                    "Measure the reference in the same latent space and with the same frame_dim."
                )
            self._channel_factors = self._channel_factors.to(std.device)  # copies once
            signals["variance"] = temporal_variance(x_0, frame_dim=self.frame_dim) / self.reference.temporal_variance
            signals["saturation"] = (std * self._channel_factors).sum()
        if (ratio := metrics.get("balance/gradient_ratio")) is not None:
            signals["gradient_ratio"] = ratio * metrics.get("balance/scale", 1.0)
        signals |= {name: metrics[key] for name in _OF_DISCRIMINATOR if (key := f"discriminator/{name}") in metrics}
        return {name: value.float() for name, value in signals.items()}


def _rules(
    variance: tuple[float, float],
    saturation: tuple[float, float],
    min_weight: float,
    max_switched: float,
    min_weight_spread: float,
    max_ratio: float | None,
    min_ranked: float,
    min_hinge_loss: float,
    patience: int,
) -> tuple[Rule, ...]:
    return (
        Rule(
            "frozen", "variance", variance[0], False,
            "the samples freeze: their temporal variance is far below real clips'. Add a motion term, raise its weight "
            "or lower its floor; if a regression dominates, lower its weight",
        ),
        Rule(
            "jitter", "variance", variance[1], True,
            "the samples jitter: their temporal variance is far above real clips'. Raise the motion term's floor, if "
            "there is one, or give a regression on real clips more weight",
        ),
        Rule(
            "oversaturated", "saturation", saturation[1], True,
            "the samples oversaturate: their latents spread more than real clips'. Give a regression on real clips "
            "more weight, or lower the teacher's guidance",
        ),
        Rule(
            "washed_out", "saturation", saturation[0], False,
            "the samples wash out: their latents spread less than real clips'. A regression may dominate: lower its "
            "weight",
        ),
        Rule(
            "regression_silent", "weight", min_weight, False,
            "the adaptive weights are close to zero: losses lie far above their running means. Check the unit of the "
            "timesteps and the scale of the target, or lower the sharpness",
        ),
        Rule(
            "weights_switch", "switched", max_switched, True,
            "the adaptive weights are a switch: most lie in the outer tenths of their range, so clips count fully or "
            "not at all. That is right where losses fall into two groups, since some clips misfit their captions. "
            f"Where they do not: {_SHARPNESS}",
        ),
        Rule(
            "weights_constant", "weight_spread", min_weight_spread, False,
            "the adaptive weights are a constant: all clips count nearly alike, as in plain regression. That is right "
            f"where all of them fit their captions. Where some do not: {_SHARPNESS}",
        ),
        Rule(
            "regression_dominates", "gradient_ratio", math.inf if max_ratio is None else max_ratio, True,
            "the regression's gradient dominates distribution matching: the student tends to blur. Lower its "
            "weight, or hold the ratio with GradientBalance(target=...)",
        ),
        Rule(
            "discriminator_blind", "ranked", min_ranked, False,
            "the discriminator does not tell clips from samples: of a clip and a sample it ranks hardly more than half "
            "rightly. Look at the samples: unless they are as good as clips, the equilibrium has collapsed. The "
            "student may move faster than the discriminator learns: lower its learning rate, or raise the "
            "discriminator's; or noise hides what could be told apart: judge at lower timesteps",
            patience,
        ),
        Rule(
            "discriminator_won", "hinge_loss", min_hinge_loss, False,
            "the discriminator has won: its hinge loss is near zero, since it always tells clips from samples, and it "
            "learns nothing more. Raise the weight of its R1 term, lower its learning rate, or prime the student "
            "longer",
            patience,
        ),
    )  # fmt: skip


def _by_step(weights: Tensor, timesteps: Tensor) -> list[Tensor]:
    """Weights of each timestep that has enough; of all others together, if they are enough or there are no more."""
    weights, timesteps = weights[weights.isfinite()], timesteps[weights.isfinite()]
    _, index, counts = timesteps.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    steps = [weights[index == place] for place in (counts >= _ENOUGH).nonzero().flatten()]
    others = weights[counts[index] < _ENOUGH]
    return [*steps, others] if len(others) >= _ENOUGH or (len(others) and not steps) else steps


def _channel_std(x_0: Tensor, frame_dim: int) -> Tensor:
    """``[C]``, float32."""
    if x_0.ndim != 5 or frame_dim not in (1, 2):
        raise ValueError(
            "x_0 must be [B, C, F, H, W] with frame_dim=2 or [B, F, C, H, W] with frame_dim=1, got "
            f"{list(x_0.shape)} and frame_dim={frame_dim}."
        )
    pattern = "b c f h w -> c (b f h w)" if frame_dim == 2 else "b f c h w -> c (b f h w)"
    return rearrange(x_0.float(), pattern).std(dim=1, correction=0)
