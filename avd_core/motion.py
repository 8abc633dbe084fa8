"""The clipped temporal variance of generated samples: Eq. 8."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from avd_core._checks import check_gradient, check_number, find_frames
from avd_core._distributed import sum_over_ranks, world_size
from avd_core.output import LossOutput

# Pieces in which a tensor is worked through, so that no temporary is larger than 1/16 of it.
_PIECES = 16


class ClippedTemporalVarianceLoss(nn.Module):
    """Pushes generated samples to move, until a floor is reached.

    See :func:`clipped_temporal_variance_loss` for the equation and the arguments, which are the same.

    The floor depends on the latent space. 0.6 is for Wan2.1's normalised latents, where samples of the teacher have
    about 1.5. For other latents, call :func:`derive_floor` on samples of their teacher.

    Example:
        >>> motion = ClippedTemporalVarianceLoss(weight=0.05, floor=0.6, channels=16)
        >>> x_0 = 0.1 * torch.randn(1, 16, 21, 60, 104)  # [B, C, F, H, W]
        >>> loss, metrics = motion(x_0.requires_grad_())
        >>> sorted(metrics)
        ['temporal_loss', 'variance']
    """

    def __init__(
        self,
        *,
        weight: float = 0.05,
        floor: float = 0.6,
        eps: float = 1e-6,
        frame_dim: int | None = None,
        channels: int | None = None,
        sync_ranks: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_options(weight, floor, eps)
        self.weight = weight
        self.floor = floor
        self.eps = eps
        self.frame_dim = frame_dim
        self.channels = channels
        self.sync_ranks = sync_ranks
        self.process_group = process_group

    def forward(self, x_0: Tensor) -> LossOutput:
        """Compute the loss of generated samples; see :func:`clipped_temporal_variance_loss`.

        Raises:
            TypeError, ValueError: As there; also in training mode, if ``x_0`` has no gradient.
        """
        self.check_inputs(x_0)
        return clipped_temporal_variance_loss(
            x_0,
            weight=self.weight,
            floor=self.floor,
            eps=self.eps,
            frame_dim=self.frame_dim,
            channels=self.channels,
            sync_ranks=self.sync_ranks,
            process_group=self.process_group,
        )

    def check_inputs(self, x_0: Tensor) -> None:
        """Raise what :meth:`forward` would, without computing anything."""
        find_frames("x_0", x_0, self.frame_dim, self.channels)
        check_gradient("x_0", x_0, self.training)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, floor={self.floor}, eps={self.eps}, frame_dim={self.frame_dim}"


def clipped_temporal_variance_loss(
    x_0: Tensor,
    *,
    weight: float = 0.05,
    floor: float = 0.6,
    eps: float = 1e-6,
    frame_dim: int | None = None,
    channels: int | None = None,
    sync_ranks: bool = True,
    process_group: ProcessGroup | None = None,
) -> LossOutput:
    r"""Negative log of the mean temporal variance, clipped from below (You et al. 2026, Eq. 8 with truncation).

    .. math::
        \mathcal{L} = w_\mathrm{temp} \max(-\log(\mathbb{E}_x[\mathrm{Var}_t(x)] + \epsilon), \mathrm{floor})

    The variance is taken along frames and divided by their number. At the floor and below, the loss is constant and its
    gradient exactly 0. (The released code drops the term there: the same gradient, but the logged loss jumps.)

    Args:
        x_0: ``[B, C, F, H, W]`` generated samples, floating, with gradient. Any other shape of at least two dimensions
            works too, if ``frame_dim`` says which one holds the frames.
        weight: ``w_temp`` of Eq. 9, at least 0. The paper's is 0.05.
        floor: Where the loss stops falling, in nats. A larger floor asks for less motion. The paper's is 0.6.
        eps: Added to the variance, positive. The paper's is 1e-6.
        frame_dim: The dimension of frames: 2 for ``[B, C, F, H, W]``, 1 for ``[B, F, C, H, W]``. None is 2 for five
            dimensions, and an error for any other number.
        channels: How many channels the latent space has. If given, it is compared with the first dimension after the
            batch that does not hold frames, which finds a swapped layout. None does not compare.
        sync_ranks: Take the expectation over the samples of all ranks, as in Eq. 8; a collective. Gradients are scaled:
            DDP and FSDP2 average them over ranks, and the average is the gradient of one process with the whole batch.
            If False, each rank computes and clips the loss of its own samples.
        process_group: The ranks of ``sync_ranks``; None is the default group.

    Returns:
        LossOutput: ``loss`` scalar; metrics ``variance`` (the expectation) and ``temporal_loss`` (the loss
        without weight and floor), scalars.

    Raises:
        TypeError: If ``x_0`` is not floating.
        ValueError: If there are fewer than two frames, ``x_0`` is empty, ``frame_dim`` is the batch dimension, out of
            range or missing, there are other than ``channels`` channels, or an option is out of its range.
    """
    _check_options(weight, floor, eps)
    variance = _temporal_variance(x_0, find_frames("x_0", x_0, frame_dim, channels))
    if sync_ranks and (ranks := world_size(process_group)) > 1:
        variance = _mean_over_ranks(variance, x_0.numel(), ranks, process_group)
    temporal_loss = -torch.log(variance + eps)
    # Not clamp(): its gradient is 1 at the floor. An infinite variance must reach whoever guards against it.
    clipped = (temporal_loss <= floor) & temporal_loss.isfinite()
    loss = weight * torch.where(clipped, torch.full_like(temporal_loss, floor), temporal_loss)
    return LossOutput(loss, {"variance": variance.detach(), "temporal_loss": temporal_loss.detach()})


def temporal_variance(x_0: Tensor, *, frame_dim: int | None = None) -> Tensor:
    """``E[Var_t(x)]``: the population variance along frames, averaged over everything else.

    Differentiable once. Beyond the gradient it needs 1/F of the input for the means and 1/16 for temporaries.

    Args:
        x_0: ``[B, C, F, H, W]``, or any other shape of at least two dimensions, batch first; floating.
        frame_dim: The dimension of frames, as in :func:`clipped_temporal_variance_loss`.

    Returns:
        Scalar, float32 at least.

    Raises:
        TypeError, ValueError: As :func:`clipped_temporal_variance_loss`.
    """
    return _temporal_variance(x_0, find_frames("x_0", x_0, frame_dim))


def _temporal_variance(x_0: Tensor, frame_dim: int) -> Tensor:
    variance: Tensor = _TemporalVariance.apply(x_0, frame_dim)  # type: ignore[no-untyped-call]
    return variance


def derive_floor(x_0: Tensor, *, margin: float = 0.0, frame_dim: int | None = None, eps: float = 1e-6) -> float:
    """A floor for your latent space, from samples that move as much as you want.

    It is the mean of the temporal losses that each sample has by itself, which is how we read the paper's 1.5 for its
    teacher. The logarithm of the samples' mean variance would be lower (Jensen's inequality), the more so the more they
    differ. In a batch of one, as in the paper, the loss compares each sample by itself with the floor. In a larger one
    it compares the logarithm of the batch's mean variance, and so stops somewhat before the student moves as much as
    the samples; ``-log`` of their :func:`temporal_variance` is the floor at which it then stops.

    A sample whose variance is below ``eps`` stands still, and is left out: its loss would say nothing but
    ``-log(eps)``, 13.8, and a few of these would raise the mean far above every sample that moves.

    Args:
        x_0: Samples of the teacher (or real latents), ``[B, C, F, H, W]``; a few dozen suffice.
        margin: How far the floor is below the samples' temporal loss, in nats. With 0 the loss stops pushing a sample
            that moves as much as an average one of these. The paper's floor of 0.6 is 0.9 below the 1.5 of its
            teacher, so it asks for up to ``exp(0.9)`` = 2.5 times the teacher's variance.
        frame_dim: The dimension of frames, as in :func:`clipped_temporal_variance_loss`.
        eps: That of the loss.

    Returns:
        ``E_x[-log(Var_t(x_0) + eps)] - margin``, over samples that move. Waits for the device.

    Raises:
        ValueError: If no sample moves or one is not finite; otherwise as :func:`temporal_variance`.
    """
    frame_dim = find_frames("x_0", x_0, frame_dim)
    variances = [float(_temporal_variance(sample, frame_dim)) for sample in x_0.detach().chunk(len(x_0))]
    for number, variance in enumerate(variances):
        if not math.isfinite(variance):
            raise ValueError(
                f"derive_floor needs finite samples, got a temporal variance of {variance} for sample {number}. Leave "
                "it out."
            )
    moving = [variance for variance in variances if variance > eps]
    if not moving:
        raise ValueError(
            f"derive_floor needs samples that move, got temporal variances of at most {max(variances)}. Pass samples "
            "of which some move."
        )
    return sum(-math.log(variance + eps) for variance in moving) / len(moving) - margin


class _TemporalVariance(torch.autograd.Function):
    """Mean squared deviation from the mean over frames, worked through in pieces.

    torch.var along a middle dimension is not vectorised on CPUs, and autograd would keep or write full-size
    temporaries. The derivative is simple: ``2 (x - mean) / numel``.
    """

    @staticmethod
    def forward(ctx: Any, x_0: Tensor, frame_dim: int) -> Tensor:
        mean = x_0.mean(dim=frame_dim, keepdim=True, dtype=torch.promote_types(x_0.dtype, torch.float32))
        squares = [(x - m).square_().sum() for x, m in _pieces(frame_dim, x_0, mean)]
        ctx.save_for_backward(x_0, mean)
        ctx.frame_dim = frame_dim
        return torch.stack(squares).sum() / x_0.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        x_0, mean = ctx.saved_tensors
        scale = grad_output * (2.0 / x_0.numel())
        if x_0.dtype == mean.dtype:
            return torch.addcmul(mean * -scale, x_0, scale), None
        gradient = torch.empty_like(x_0)
        for x, m, out in _pieces(ctx.frame_dim, x_0, mean, gradient):
            out.copy_((x - m) * scale)
        return gradient, None


def _pieces(frame_dim: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same part of each tensor, split along a dimension other than frames.

    The first dimension with enough entries keeps the pieces contiguous where that is possible. A compiler fuses
    temporaries away by itself and gets the whole.
    """
    if torch.compiler.is_compiling():
        return iter([tensors])
    shape = tensors[0].shape
    others = [dim for dim in range(len(shape)) if dim != frame_dim]
    dim = next((d for d in others if shape[d] >= _PIECES), max(others, key=lambda d: shape[d]))
    return zip(*(tensor.chunk(_PIECES, dim) for tensor in tensors), strict=True)


def _mean_over_ranks(variance: Tensor, count: int, ranks: int, group: ProcessGroup | None) -> Tensor:
    """The value of all ranks' samples with the gradient of this rank's, times ``ranks`` for the later average."""
    own = variance.detach()
    total, total_count = sum_over_ranks(torch.stack([own * count, torch.full_like(own, count)]), group).unbind()
    share = count * ranks / total_count
    return total / total_count + (variance - own) * share


def _check_options(weight: float, floor: float, eps: float) -> None:
    check_number("weight", weight, at_least=0)
    check_number("floor", floor)
    check_number("eps", eps, above=0)
