"""Adversarial terms: the hinge loss (V-PAE) and the logistic one (DMD2) of both sides, and what keeps a discriminator
smooth."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avd_core._checks import (
    check_floating,
    check_gradient,
    check_number,
    check_same_device,
    check_same_shape,
    find_frames,
)
from avd_core.output import LossOutput

Discriminator = Callable[[Tensor], Tensor]
"""From noised clips ``[B, ...]`` to one logit for each, ``[B]``. Timesteps and conditions are bound already."""


class HingeLoss(nn.Module):
    r"""The hinge loss of a discriminator and of the generator that it judges.

    .. math::
        \mathcal{L}_D = \mathbb{E}\max(0, 1 - D(\mathrm{clip})) + \mathbb{E}\max(0, 1 + D(\mathrm{sample})), \quad
        \mathcal{L}_G = -\mathbb{E}\,D(\mathrm{sample})

    A logit is high for what the discriminator takes for a real clip. Beyond 1 for clips and below -1 for samples the
    discriminator has nothing to gain. Since :math:`\mathcal{L}_D \ge 2 - \mathrm{gap}`, with the gap of the mean
    logits, a loss near 0 means that the two are always told apart. A loss near 2 says little: ``ranked`` does.

    V-PAE (arXiv 2508.21019, phase II) names the loss and prints no formula: this is the usual one. Noise clips and
    samples to the same timestep before asking for their logits; the timestep's distribution is yours.

    Example:
        >>> hinge = HingeLoss()
        >>> clip_logits = torch.tensor([1.5, 0.0], requires_grad=True)
        >>> sample_logits = torch.tensor([-1.0, 0.5], requires_grad=True)
        >>> loss, metrics = hinge.discriminator(clip_logits, sample_logits)
        >>> loss.item(), metrics["ranked"].item(), metrics["accuracy"].item()
        (1.25, 0.5, 0.625)
        >>> hinge.generator(sample_logits).loss.item()
        0.25
    """

    def discriminator(self, clip_logits: Tensor, sample_logits: Tensor) -> LossOutput:
        r"""The discriminator's side, :math:`\mathcal{L}_D`.

        Args:
            clip_logits: ``[B]`` logits of real clips, floating, with gradient.
            sample_logits: ``[B']`` those of generated samples, likewise, on the same device. Detach the samples, not
                their logits.

        Returns:
            LossOutput: ``loss`` scalar; metrics, scalars: ``hinge_loss``, the same number (in a total with other terms
            it would not be seen); ``clip_logit`` and ``sample_logit``, the means; ``logit_gap``, their difference;
            ``ranked``, the share of pairs in which the clip's logit lies above the sample's, a tie counting half: of
            equally many clips and samples the pairs at the same place, which best have one caption and timestep, and
            else all pairs; ``accuracy``, the share of logits whose sign is right, both sides weighing the same and a 0
            counting half. ``ranked`` is 0.5 where nothing is told apart, whatever the logits' offset and scale.

        Raises:
            TypeError: For tensors that are not floating.
            ValueError: For logits that are not ``[B]`` or empty, or on different devices; in training mode, if one of
                them has no gradient.
        """
        clips, samples = _check_sides(clip_logits, sample_logits, self.training)
        loss = _shortfall(clips).mean() + _shortfall(-samples).mean()
        return LossOutput(loss, {"hinge_loss": loss.detach(), **_telling_apart(clips, samples)})

    def generator(self, sample_logits: Tensor) -> LossOutput:
        r"""The generator's side, :math:`\mathcal{L}_G`.

        Args:
            sample_logits: ``[B]`` logits of generated samples, floating, with gradient to the generator.

        Returns:
            LossOutput: ``loss`` scalar; metrics ``sample_logit``, the mean, scalar.

        Raises:
            TypeError: If ``sample_logits`` is not floating.
            ValueError: If it is not ``[B]`` or empty; in training mode, if it has no gradient.
        """
        samples = _check_samples(sample_logits, self.training)
        return LossOutput(-samples.mean(), {"sample_logit": samples.detach().mean()})


class LogisticLoss(nn.Module):
    r"""The logistic loss of a discriminator, and the non-saturating one of the generator that it judges.

    .. math::
        \mathcal{L}_D = \mathbb{E}\,\mathrm{sp}(-D(\mathrm{clip})) + \mathbb{E}\,\mathrm{sp}(D(\mathrm{sample})), \quad
        \mathcal{L}_G = \mathbb{E}\,\mathrm{sp}(-D(\mathrm{sample})), \quad \mathrm{sp}(x) = \log(1 + e^x)

    A logit is the log odds that the discriminator gives for a real clip. A discriminator that tells nothing apart and
    says so has :math:`\mathcal{L}_D = 2 \log 2`. Unlike :class:`HingeLoss` it has something to gain at any logit, and a
    generator's gradient vanishes where its samples pass for clips. This is the GAN of DMD2 (arXiv 2405.14867,
    Sec. 4.3), both sides as in its released code. Weigh them outside.

    Example:
        >>> logistic = LogisticLoss()
        >>> logits = torch.zeros(2, requires_grad=True)
        >>> round(logistic.discriminator(logits, logits).loss.item(), 4)
        1.3863
        >>> round(logistic.generator(logits).loss.item(), 4)
        0.6931
    """

    def discriminator(self, clip_logits: Tensor, sample_logits: Tensor) -> LossOutput:
        r"""The discriminator's side, :math:`\mathcal{L}_D`.

        Arguments and errors are those of :meth:`HingeLoss.discriminator`.

        Returns:
            LossOutput: ``loss`` scalar; metrics as there, with ``logistic_loss`` in place of ``hinge_loss``.
        """
        clips, samples = _check_sides(clip_logits, sample_logits, self.training)
        loss = _softplus(-clips).mean() + _softplus(samples).mean()
        return LossOutput(loss, {"logistic_loss": loss.detach(), **_telling_apart(clips, samples)})

    def generator(self, sample_logits: Tensor) -> LossOutput:
        r"""The generator's side, :math:`\mathcal{L}_G`.

        Arguments, metrics and errors are those of :meth:`HingeLoss.generator`.
        """
        samples = _check_samples(sample_logits, self.training)
        return LossOutput(_softplus(-samples).mean(), {"sample_logit": samples.detach().mean()})


class SpatioTemporalR1Loss(nn.Module):
    """Keeps a discriminator's logits from changing fast around real clips, in space and in time.

    See :func:`spatio_temporal_r1_loss` for the equation and the arguments, which are the same.

    Example:
        >>> r1 = SpatioTemporalR1Loss(weight=100.0)
        >>> head = torch.nn.Linear(16, 1)
        >>> discriminator = lambda x_t: head(x_t.mean((2, 3, 4))).squeeze(1)
        >>> x_t = torch.randn(2, 16, 5, 8, 8)  # noised clips, [B, C, F, H, W]
        >>> loss, metrics = r1(discriminator, x_t, discriminator(x_t))
        >>> sorted(metrics)
        ['spatial', 'temporal']
    """

    def __init__(
        self,
        *,
        weight: float = 100.0,
        sigma_spatial: float = 0.01,
        sigma_temporal: float = 0.1,
        step_spatial: float | None = None,
        frame_dim: int | None = None,
    ) -> None:
        super().__init__()
        _check_options(weight, sigma_spatial, sigma_temporal, step_spatial)
        self.weight = weight
        self.sigma_spatial = sigma_spatial
        self.sigma_temporal = sigma_temporal
        self.step_spatial = step_spatial
        self.frame_dim = frame_dim

    def forward(
        self,
        discriminator: Discriminator,
        x_t: Tensor,
        logits: Tensor,
        *,
        spatial_noise: Tensor | None = None,
        temporal_noise: Tensor | None = None,
    ) -> LossOutput:
        """Compute the loss; see :func:`spatio_temporal_r1_loss`.

        Raises:
            TypeError, ValueError: As there; also in training mode, if ``logits`` has no gradient.
        """
        check_floating("logits", logits)
        check_gradient("logits", logits, self.training)
        return spatio_temporal_r1_loss(
            discriminator,
            x_t,
            logits,
            spatial_noise=spatial_noise,
            temporal_noise=temporal_noise,
            weight=self.weight,
            sigma_spatial=self.sigma_spatial,
            sigma_temporal=self.sigma_temporal,
            step_spatial=self.step_spatial,
            frame_dim=self.frame_dim,
        )

    def extra_repr(self) -> str:
        step = "" if self.step_spatial is None else f", step_spatial={self.step_spatial}"
        return f"weight={self.weight}, sigma_spatial={self.sigma_spatial}, sigma_temporal={self.sigma_temporal}{step}"


def spatio_temporal_r1_loss(
    discriminator: Discriminator,
    x_t: Tensor,
    logits: Tensor,
    *,
    spatial_noise: Tensor | None = None,
    temporal_noise: Tensor | None = None,
    weight: float = 100.0,
    sigma_spatial: float = 0.01,
    sigma_temporal: float = 0.1,
    step_spatial: float | None = None,
    frame_dim: int | None = None,
) -> LossOutput:
    r"""Squared change of the logits under two small perturbations of noised real clips (V-PAE's STR1).

    .. math::
        \mathcal{L} = w \sum_{j \in \{s, t\}} \mathbb{E}\,(D(x_t) - D(x_t + \sigma_j \xi_j))^2

    Both perturbations have unit variance and are orthogonal to each other. :math:`\xi_s` is one noise for all frames
    of a clip: it changes what the clip shows, and nothing of its motion. :math:`\xi_t` is the noise of each frame minus
    the mean over frames, times :math:`\sqrt{F / (F - 1)}`: it changes the motion, and nothing of the mean frame.

    V-PAE (arXiv 2508.21019) gives the two :math:`\sigma` and neither formula nor weight. Our readings: the approximated
    R1 of APT (arXiv 2501.08316), one for each perturbation, with its weight of 100; what is perturbed is the *noised*
    clip, whose own logits it is compared with (perturbing the clean clip would shrink the perturbation by
    ``1 - sigma(t)``, to nothing at pure noise); and the factor :math:`\sqrt{F / (F - 1)}`, by which
    :math:`\sigma_t` is the perturbation's standard deviation for any number of frames. The terms are not divided by
    :math:`\sigma_j^2`, so by default the temporal one weighs 100 times the spatial one per unit of slope.

    A change of the logits by a perturbation of 0.01 is smaller than what a transformer in bfloat16 rounds away on its
    way to them. ``step_spatial`` then measures the same slope with a larger perturbation.

    Args:
        discriminator: Gives the logits ``[B]`` of perturbed noised clips, shaped as ``x_t``, at the same timesteps and
            conditions as ``logits``. It is called twice, with float32 at least.
        x_t: ``[B, C, F, H, W]`` noised real clips, floating, or another shape with ``frame_dim``. No gradient reaches
            it.
        logits: ``[B]`` what ``discriminator`` says of ``x_t`` itself, floating, on the same device. The gradient goes
            through these logits and through those of the perturbed clips.
        spatial_noise: Normal noise in the shape of ``x_t`` with a single frame, ``[B, C, 1, H, W]``. None draws it from
            torch's default generator.
        temporal_noise: Normal noise in the shape of ``x_t``; its mean over frames is subtracted here. None draws it.
        weight: :math:`w`, at least 0. Published for the approximated R1: 0.1 to 600.
        sigma_spatial: :math:`\sigma_s`, positive, in the unit of ``x_t``. V-PAE: 0.01.
        sigma_temporal: :math:`\sigma_t`, positive, in the unit of ``x_t``. V-PAE: 0.1.
        step_spatial: Standard deviation :math:`h` of the spatial perturbation that is really added, positive; the
            squared change then counts :math:`(\sigma_s / h)^2` times, which is the same to first order. None adds
            :math:`\sigma_s` itself. Ours; 0.1 is for discriminators that compute in bfloat16.
        frame_dim: The dimension of frames: 2 for ``[B, C, F, H, W]``, 1 for ``[B, F, C, H, W]``. None is 2 for five
            dimensions, and an error for any other number.

    Returns:
        LossOutput: ``loss`` scalar; metrics ``spatial`` and ``temporal``, the two expectations without weight, scalars.

    Raises:
        TypeError: For tensors that are not floating.
        ValueError: For fewer than two frames, shapes or devices that differ, a discriminator whose answer is not shaped
            as ``logits``, or options out of range.
    """
    _check_options(weight, sigma_spatial, sigma_temporal, step_spatial)
    frame_dim = find_frames("x_t", x_t, frame_dim)
    _check_logits("logits", logits)
    if len(logits) != len(x_t):
        raise ValueError(f"logits must have shape [{len(x_t)}], one per noised clip, got {list(logits.shape)}.")
    check_same_device("logits", logits, "x_t", x_t)
    still_shape = [1 if dim == frame_dim else size for dim, size in enumerate(x_t.shape)]
    _check_noise("spatial_noise", spatial_noise, still_shape, x_t)
    _check_noise("temporal_noise", temporal_noise, list(x_t.shape), x_t)

    x_t = _float32_at_least(x_t.detach())
    if spatial_noise is None:
        spatial_noise = torch.randn(still_shape, dtype=x_t.dtype, device=x_t.device)
    if temporal_noise is None:
        temporal_noise = torch.randn_like(x_t)
    spatial_noise, temporal_noise = spatial_noise.to(x_t), temporal_noise.to(x_t)
    frames = x_t.shape[frame_dim]
    temporal_noise = (temporal_noise - temporal_noise.mean(frame_dim, keepdim=True)) * math.sqrt(frames / (frames - 1))

    step = sigma_spatial if step_spatial is None else step_spatial
    spatial = (sigma_spatial / step) ** 2 * _squared_change(discriminator, x_t + step * spatial_noise, logits)
    temporal = _squared_change(discriminator, x_t + sigma_temporal * temporal_noise, logits)
    return LossOutput(weight * (spatial + temporal), {"spatial": spatial.detach(), "temporal": temporal.detach()})


def _squared_change(discriminator: Discriminator, perturbed: Tensor, logits: Tensor) -> Tensor:
    changed = discriminator(perturbed)
    check_same_shape("the discriminator's answer", changed, "logits", logits)
    return (_float32_at_least(logits) - _float32_at_least(changed)).square().mean()


def _shortfall(logits: Tensor) -> Tensor:
    """``max(0, 1 - logits)``; an infinite logit is infinite, since it must reach whoever guards against it."""
    return torch.where(logits.isinf(), logits.abs(), F.relu(1 - logits))


def _softplus(logits: Tensor) -> Tensor:
    """``log(1 + exp(logits))``; an infinite logit is infinite, likewise."""
    return torch.where(logits.isinf(), logits.abs(), F.softplus(logits))


def _check_samples(sample_logits: Tensor, training: bool) -> Tensor:
    """The logits of samples, in float32 at least."""
    _check_logits("sample_logits", sample_logits)
    check_gradient("sample_logits", sample_logits, training)
    return _float32_at_least(sample_logits)


def _check_sides(clip_logits: Tensor, sample_logits: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """The logits of both sides, in float32 at least."""
    _check_logits("clip_logits", clip_logits)
    _check_logits("sample_logits", sample_logits)
    check_same_device("clip_logits", clip_logits, "sample_logits", sample_logits)
    check_gradient("clip_logits", clip_logits, training)
    return _float32_at_least(clip_logits), _check_samples(sample_logits, training)


@torch.no_grad()
def _telling_apart(clips: Tensor, samples: Tensor) -> dict[str, Tensor]:
    """How well logits tell clips from samples."""
    pairs = clips - samples if len(clips) == len(samples) else clips.unsqueeze(1) - samples
    return {
        "clip_logit": clips.mean(),
        "sample_logit": samples.mean(),
        "logit_gap": clips.mean() - samples.mean(),
        "ranked": 0.5 + 0.5 * pairs.sign().mean(),
        "accuracy": 0.5 + 0.25 * (clips.sign().mean() - samples.sign().mean()),
    }


def _float32_at_least(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_logits(name: str, logits: Tensor) -> None:
    check_floating(name, logits)
    if logits.ndim != 1 or logits.numel() == 0:
        remedy = f" Use {name}.squeeze(1)." if logits.ndim == 2 and logits.shape[1] == 1 else ""
        raise ValueError(f"{name} must be [B], one logit per video, got shape {list(logits.shape)}.{remedy}")


def _check_noise(name: str, noise: Tensor | None, shape: list[int], x_t: Tensor) -> None:
    if noise is None:
        return
    check_floating(name, noise)
    if list(noise.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} for x_t {list(x_t.shape)}, got {list(noise.shape)}.")
    check_same_device(name, noise, "x_t", x_t)


def _check_options(weight: float, sigma_spatial: float, sigma_temporal: float, step_spatial: float | None) -> None:
    check_number("weight", weight, at_least=0)
    check_number("sigma_spatial", sigma_spatial, above=0)
    check_number("sigma_temporal", sigma_temporal, above=0)
    if step_spatial is not None:
        check_number("step_spatial", step_spatial, above=0)
