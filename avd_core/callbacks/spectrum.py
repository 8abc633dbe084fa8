"""Early warnings that a student's samples blur, fill with noise, drift or jitter, by their spectral roll-off points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from avd_core._checks import check_floating, check_number
from avd_core.callbacks.base import Callback, Metrics
from avd_core.callbacks.rules import CollapseFinding, Judge, Rule
from avd_core.spectrum import spectral_rolloff, temporal_rolloff

_SIGNALS = ("spatial", "temporal")
# A channel that spreads by less than this share of the widest one holds next to nothing, and what it holds is noise.
_EMPTY = 0.01


@dataclass(frozen=True)
class SpectralStatistics:
    """Roll-off points of real latents, to compare a student's with.

    A clip has one number in space and one in time. The spatial one is the roll-off of each channel's frames, pooled by
    their energy, averaged over channels; the temporal one is the channels' average too.

    Attributes:
        channels: The channels that count: those that spread at least 1% as much as the widest one.
        spatial: Mean over clips, in cycles per sample, and standard deviation over clips.
        temporal: The same along frames, in cycles per frame.
    """

    channels: tuple[int, ...]
    spatial: tuple[float, float]
    temporal: tuple[float, float]

    @classmethod
    @torch.no_grad()
    def measure(cls, x_0: Tensor, *, frame_dim: int = 2) -> Self:
        """Measure clips ``[B, C, F, H, W]`` (``frame_dim=1``: ``[B, F, C, H, W]``), a few dozen of them.

        Raises:
            TypeError: If they are not floating.
            ValueError: If they have another shape or fewer than 2 frames, or are not finite.
        """
        x_0 = _frames_third(x_0, frame_dim)
        std = x_0.float().transpose(0, 1).flatten(1).std(dim=1, correction=0)
        if not std.isfinite().all():
            raise ValueError("SpectralStatistics needs finite clips, got some that are not. Leave them out.")
        channels = tuple((std >= _EMPTY * std.max()).nonzero().flatten().tolist())
        values = _rolloffs(x_0, channels)
        (spatial, temporal), (spatial_std, temporal_std) = values.mean(1).tolist(), values.std(1, correction=0).tolist()
        return cls(channels, (spatial, spatial_std), (temporal, temporal_std))


class SpectralRolloffMonitor(Callback):
    """Compares the roll-off points of the samples with those of real clips, and says in words where they differ.

    ============  ==============================================================  ===========================
    signal        what it is                                                      findings
    ============  ==============================================================  ===========================
    ``spatial``   mean :func:`spectral_rolloff` of the last clips, less the real  ``blurred`` (below),
                  clips' mean, divided by the standard deviation of real clips    ``noisy`` (above)
    ``temporal``  the same of :func:`temporal_rolloff`                            ``drifting``, ``jittering``
    ============  ==============================================================  ===========================

    Both sides are judged: a student may blur or fill with noise, drift or jitter. Neither signal depends on the scale
    of a channel, so saturation does not count, which :class:`CollapseMonitor` watches. Of equal mean over channels and
    clips nothing is seen: a channel that blurs beside one that fills with noise, say.

    Reads the metric ``x_0``, generated latents; other steps are not judged. Pass it only in steps whose samples are
    finished, since samples of an earlier few step are always blurred. A finding is logged (``logging``, level WARNING)
    and kept in ``findings``, and comes again only after the signal has recovered.

    A signal is that of the last ``window`` clips, and there is none before; so chance alone moves it by 0.12 with the
    64 clips of the default, and as much again if the reference is of 64 clips. A signal in which real clips do not
    vary is left out, such as the temporal one of 2 or 3 frames, which have one frequency only.

    Costs two real FFTs of ``x_0`` per step, and waits for the device once every ``every`` steps.

    Args:
        reference: Roll-offs of real latents, in the student's latent space (:meth:`SpectralStatistics.measure`).
        every: Steps between two judgements, at least 1.
        grace: Steps at the start that are not judged: a few-step student starts out blurred and still.
        window: Number of the last clips that are judged, at least 1.
        frame_dim: Dimension of frames of ``x_0``: 2 or 1.
        spatial_margin: How far the spatial signal may be from 0, to either side, in standard deviations of single real
            clips.
        temporal_margin: The same for the temporal signal; wider, since a student of distribution matching alone that
            looks well lies at 0.6 on our small latents.
    """

    def __init__(
        self,
        reference: SpectralStatistics,
        *,
        every: int = 10,
        grace: int = 100,
        window: int = 64,
        frame_dim: int = 2,
        spatial_margin: float = 0.75,
        temporal_margin: float = 1.0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        if grace < 0:
            raise ValueError(f"grace must be at least 0, got {grace}.")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}.")
        check_number("spatial_margin", spatial_margin, above=0)
        check_number("temporal_margin", temporal_margin, above=0)
        self.reference = reference
        self.every = every
        self.grace = grace
        self.window = window
        self.frame_dim = frame_dim
        self._judge = Judge(_rules(spatial_margin, temporal_margin))
        # Of the last clips, oldest first: spatial and temporal roll-off; [2, N].
        self._values = torch.empty(2, 0)
        self._steps = 0

    @property
    def findings(self) -> list[CollapseFinding]:
        """All findings so far, oldest first."""
        return self._judge.findings

    @torch.no_grad()
    def after_step(self, step: int, metrics: Metrics) -> None:
        self._steps += 1
        if (x_0 := metrics.get("x_0")) is not None:
            values = _rolloffs(_frames_third(x_0, self.frame_dim), self.reference.channels)
            self._values = torch.cat([self._values.to(values), values], 1)[:, -self.window :]
        if self._steps > self.grace and self._steps % self.every == 0:
            self._judge.look(step, self.signals(), counted=self._steps)

    def signals(self) -> dict[str, float]:
        """The signals that there are so far, by the names of the table above. Waits for the device."""
        values = self._values.cpu()
        if values.shape[1] < self.window:
            return {}
        # One broken clip must not blind the monitor for as long as it is in the window.
        means = values.nanmean(1).tolist()
        return {
            name: (mean - real) / spread
            for name, mean, (real, spread) in zip(
                _SIGNALS, means, (self.reference.spatial, self.reference.temporal), strict=True
            )
            if spread > 0
        }

    def state_dict(self) -> dict[str, Any]:
        return {"values": self._values.tolist(), "steps": self._steps, **self._judge.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._values = torch.tensor(state_dict["values"], dtype=torch.float32)
        self._steps = int(state_dict["steps"])
        self._judge.load_state_dict(state_dict)


def _rules(spatial: float, temporal: float) -> tuple[Rule, ...]:
    return (
        Rule(
            "blurred", "spatial", -spatial, False,
            "the samples are blurred: their spatial roll-off lies below real clips'. Train on, if the student has just "
            "begun; a regression may dominate: lower its weight",
        ),
        Rule(
            "noisy", "spatial", spatial, True,
            "the samples are noisy: their spatial roll-off lies above real clips'. Lower the teacher's guidance or the "
            "student's learning rate, or give a regression on real clips more weight",
        ),
        Rule(
            "drifting", "temporal", -temporal, False,
            "the samples are drifting: they change more slowly along frames than real clips. Add a motion term, "
            "raise its weight or lower its floor; if a regression dominates, lower its weight",
        ),
        Rule(
            "jittering", "temporal", temporal, True,
            "the samples are jittering: they change faster along frames than real clips. Raise the motion term's "
            "floor, if there is one, or give a regression on real clips more weight",
        ),
    )  # fmt: skip


def _rolloffs(x_BCFHW: Tensor, channels: tuple[int, ...]) -> Tensor:
    """Of each clip the spatial and the temporal roll-off, ``[2, B]`` float32."""
    if max(channels) >= x_BCFHW.shape[1]:
        raise ValueError(
            f"x_0 {list(x_BCFHW.shape)} has {x_BCFHW.shape[1]} channels, the reference has {max(channels) + 1} or "
            "more. Measure the reference in the same latent space and with the same frame_dim."
        )
    counted = x_BCFHW.float()
    if len(channels) < x_BCFHW.shape[1]:
        counted = torch.stack([counted[:, channel] for channel in channels], 1)
    return torch.stack([spectral_rolloff(counted, pool_dim=2).mean(1), temporal_rolloff(counted).mean(1)])


def _frames_third(x_0: Tensor, frame_dim: int) -> Tensor:
    """``[B, C, F, H, W]``."""
    check_floating("x_0", x_0)
    if x_0.ndim != 5 or frame_dim not in (1, 2):
        raise ValueError(
            "x_0 must be [B, C, F, H, W] with frame_dim=2 or [B, F, C, H, W] with frame_dim=1, got "
            f"{list(x_0.shape)} and frame_dim={frame_dim}."
        )
    return x_0 if frame_dim == 2 else x_0.transpose(1, 2)
