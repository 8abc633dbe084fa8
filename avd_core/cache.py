"""The mean of the regression losses of each timestep, Lbar_{t,s} of Eq. 6, and their spread."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from avd_core._checks import RangeCheck, check_floating, check_number, check_same_device, check_timesteps
from avd_core._distributed import sum_over_ranks, world_size

logger = logging.getLogger(__name__)

CacheOrder = Literal["weight_first", "update_first"]

# More micro-batches than any optimizer step has: a video model's forward takes seconds, so these would take an hour.
_FORGOTTEN = 1000


# The ends of a range belong to it, also after rounding.
_SLACK = 1 + 1e-5

# A spread this small beside its mean is float32's rounding.
_RESOLUTION = 1e-6

# States that were saved before spreads were kept lack these. They start at 0.
_OF_SPREAD = ("variances", "variance_shares", "pending_squares")


class LossStatistics(NamedTuple):
    """What the losses of a call are to be compared with.

    Attributes:
        means: ``[B]``, float32 at least: the mean loss at each sample's timestep. For an entry without a mean it is the
            loss itself, so that the deviation is 0.
        spreads: ``[B]``, same dtype, at least 0: the standard deviation there; 0 while it is unknown, see
            :attr:`LossMeanCache.spreads`.
    """

    means: Tensor
    spreads: Tensor


class LossMeanCache(nn.Module):
    """A running mean of the regression loss at each of the student's few timesteps, and its spread.

    After iteration ``s``, the entry of every timestep ``t`` that occurred in it becomes (Eq. 6)::

        Lbar_{t,s} = decay * Lbar_{t,s-1} + (1 - decay) * L_{t,s}
        V_{t,s}    = decay * V_{t,s-1}    + (1 - decay) * (S_{t,s} + decay * (L_{t,s} - Lbar_{t,s-1})^2)
        Q_{t,s}    = decay^2 * Q_{t,s-1}  + (1 - decay)^2 / n_{t,s}
        spread     = sqrt(V_{t,s} / (1 - Q_{t,s}))

    where ``L_{t,s}`` and ``S_{t,s}`` are mean and population variance of all ``n_{t,s}`` samples of that entry in the
    iteration, on all ranks. All but the first line is ours: ``V`` is the variance of all losses so far, each with the
    weight that it has in ``Lbar``, and ``Q`` the sum of the squares of these weights. If losses are independent and of
    one variance, ``V`` is on average the share ``1 - Q`` of it. An entry that has not occurred yet starts with its
    first ``L_{t,s}``, ``S_{t,s}`` and ``1 / n_{t,s}``. Losses that are not finite are left out. A variance that would
    overflow is left out, too, while the mean goes on.

    One iteration is one update:

    - *One call per optimizer step, one process*: nothing to do. Each call in training mode is an iteration.
    - *Several ranks*: nothing to do. Sums and counts are added over ranks before they are divided. All ranks must call
      equally often. ``sync_ranks=False`` keeps one cache per process.
    - *Gradient accumulation*: construct with ``auto_update=False`` and call :meth:`update` once per optimizer step.
      All micro-batches of the step are then weighted by the same means. If a thousand calls pass without
      :meth:`update`, a warning is logged once, since the means stay empty. (The opposite mistake, several calls per
      optimizer step with ``auto_update=True``, cannot be noticed: each call counts as an iteration.) Keep the cache
      out of modules that DDP wraps, or pass DDP ``broadcast_buffers=False``: otherwise it overwrites the running
      iteration of all ranks but the first.

    In evaluation mode (``cache.eval()``) means are read and not changed, like the statistics of a batch norm.

    The state is seven buffers, so the cache moves, saves and loads with the module that it is part of. The buffers stay
    float32 under ``.to(bfloat16)`` and ``.half()``, because in half precision a decay of 0.95 would not move the mean
    any more. If they are cast in another way, such as FSDP's ``buffer_dtype``, the next call raises an error.

    A state that was saved before spreads were kept loads, too: means go on, and each spread starts anew, as if its
    entry's mean were the one loss that it has seen. Standardised weights are then one half in the entry's first
    iteration.

    Args:
        timesteps: The grid, strictly rising or falling, in the unit in which timesteps are passed later. Each sample
            counts for the nearest entry, so 999 is found at 1000. For times drawn from a range see :meth:`uniform`.
        decay: ``alpha`` of Eq. 6, in [0, 1). The paper's is 0.95.
        order: ``"weight_first"`` compares a loss with the mean from before the iteration (Eq. 7). ``"update_first"``,
            as in the released code, compares it with a mean that already contains it. Absolute deviations are
            then ``decay`` times as large, like a sharpness of 2.85 in place of 3; of standardised ones the unit moves,
            too.
        auto_update: Whether each training call is an iteration of its own. See above.
        sync_ranks: Whether sums and counts are added over ranks.
        process_group: The ranks; None is the default group, where torch.distributed is initialised.

    Raises:
        ValueError: For an empty, unsorted or non-finite grid, a decay outside [0, 1), or ``order="update_first"`` with
            ``auto_update=False`` (the mean would be needed before the iteration's losses are known).
    """

    timesteps: Tensor
    means: Tensor
    variances: Tensor
    variance_shares: Tensor
    seen: Tensor
    pending: Tensor
    pending_squares: Tensor

    def __init__(
        self,
        timesteps: Sequence[float],
        *,
        decay: float = 0.95,
        order: CacheOrder = "weight_first",
        auto_update: bool = True,
        sync_ranks: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        grid = [float(t) for t in timesteps]
        if not grid:
            raise ValueError("timesteps must have at least one entry, got an empty grid.")
        steps = [b - a for a, b in pairwise(grid)]
        if not all(map(math.isfinite, grid)) or not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
            raise ValueError(f"timesteps must be finite and strictly rising or strictly falling, got {grid}.")
        check_number("decay", decay, at_least=0, below=1)
        if order not in ("weight_first", "update_first"):
            raise ValueError(f"order must be 'weight_first' or 'update_first', got {order!r}.")
        if order == "update_first" and not auto_update:
            raise ValueError(
                "order='update_first' needs auto_update=True: with gradient accumulation the mean would be needed "
                "before the iteration's losses are known. Use order='weight_first', which is the paper's."
            )
        self.decay = decay
        self.order = order
        self.auto_update = auto_update
        self.sync_ranks = sync_ranks
        self.process_group = process_group
        # A time farther from its nearest entry than another could be is of another unit (sigma in place of t, say).
        self._tolerance = _SLACK * max((abs(s) for s in steps), default=abs(grid[0]) or math.inf) / 2
        self._range = (min(grid), max(grid))
        self._range_check = RangeCheck()
        self._recorded = 0  # calls since the last update(), counted here as the host must not wait for the buffers
        self._warned = False
        self.register_buffer("timesteps", torch.tensor(grid, dtype=torch.float32))
        self.register_buffer("means", torch.zeros(len(grid), dtype=torch.float32))
        self.register_buffer("variances", torch.zeros(len(grid), dtype=torch.float32))
        self.register_buffer("variance_shares", torch.zeros(len(grid), dtype=torch.float32))  # 1 - Q
        self.register_buffer("seen", torch.zeros(len(grid), dtype=torch.bool))
        # Of the running iteration, on this rank: sums and counts, [2, K], and squared deviations from the mean so far.
        self.register_buffer("pending", torch.zeros(2, len(grid), dtype=torch.float32))
        self.register_buffer("pending_squares", torch.zeros(len(grid), dtype=torch.float32))

    @classmethod
    def uniform(cls, low: float, high: float, bins: int, **options: Any) -> Self:
        """A cache over ``bins`` equal parts of ``[low, high]``, for distillers that draw times from a range.

        Args:
            low: Lower end of the range, for example 0.
            high: Upper end, for example 1 for sigma, 1000 for timesteps, pi/2 for TrigFlow.
            bins: Number of parts, at least 1. With 20 and a decay of 0.95 a mean covers about 400 samples at batch 1.
            options: The constructor's.
        """
        if not (bins >= 1 and math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"uniform needs low < high and bins >= 1, got low={low}, high={high}, bins={bins}.")
        width = (high - low) / bins
        cache = cls([low + (i + 0.5) * width for i in range(bins)], **options)
        cache._tolerance = _SLACK * width / 2
        return cache

    @property
    def spreads(self) -> Tensor:
        """``[K]`` float32: the standard deviation of each entry's losses; never NaN.

        It is 0 before an entry has seen two losses, and as long as all are equal up to rounding. Its square is right on
        average from the second loss on, but a spread of few losses can be far too large or too small.
        """
        known = self.variance_shares > 0
        spreads = self.variances.sqrt() / torch.where(known, self.variance_shares, 1.0).sqrt()
        return torch.where(known & (spreads > _RESOLUTION * self.means.abs()), spreads, 0.0)

    @torch.no_grad()
    def forward(self, timesteps: Tensor, losses: Tensor) -> LossStatistics:
        """Read mean and spread for each sample and, in training mode, record the losses.

        Args:
            timesteps: ``[B]``, integer or floating, in the grid's unit.
            losses: ``[B]``, floating, unweighted: whatever is compared with its mean.

        Returns:
            LossStatistics: ``means`` and ``spreads``, ``[B]`` each: from before the call, or with its losses in them if
            ``order="update_first"``.

        Raises:
            TypeError: If ``losses`` is not floating, or if something has changed the dtype of the cache's own buffers.
            ValueError: If shapes or devices differ, or a timestep lies outside the grid by more than half the grid's
                widest gap. The values are looked at in every call on a CPU, where that costs nothing, and elsewhere in
                the first call only, which waits for the device.
        """
        check_floating("losses", losses)
        if losses.ndim != 1:
            raise ValueError(f"losses must have shape [B], one per sample, got {list(losses.shape)}.")
        check_timesteps(timesteps, losses)
        check_same_device("the cache", self.means, "losses", losses)
        floating = (buffer for buffer in self.buffers() if buffer is not self.seen)
        if any(buffer.dtype != torch.float32 for buffer in floating):
            raise TypeError(
                "The cache's buffers must be float32, and something has cast them in place, to a dtype in which the "
                "grid and a decay near 1 are lost. FSDP's MixedPrecision(buffer_dtype=...) does so: set it to "
                "torch.float32, or keep the cache out of the wrapped module."
            )
        self._check_range(timesteps)
        index = (timesteps.to(self.timesteps.dtype).unsqueeze(1) - self.timesteps).abs().argmin(dim=1)
        losses = losses.to(torch.promote_types(losses.dtype, self.means.dtype))
        if self.training and self.order == "update_first":
            self._record(index, losses)
            return self._read(index, losses)
        statistics = self._read(index, losses)
        if self.training:
            self._record(index, losses)
        return statistics

    @torch.no_grad()
    def update(self) -> None:
        """End the iteration: fold what was recorded since the last update into the means.

        Only to be called by who passed ``auto_update=False``, once per optimizer step and on every rank (it is a
        collective where ranks are synchronised).
        """
        (sums, counts), squares = self.pending.unbind(), self.pending_squares
        if self.sync_ranks and world_size(self.process_group) > 1:
            own_counts, own_means = counts, _divide(sums, counts)
            sums, counts = sum_over_ranks(self.pending, self.process_group).unbind()
            # Squares can be added once all ranks' are about one mean.
            squares = squares + own_counts * (own_means - _divide(sums, counts)).square()
            squares = sum_over_ranks(squares, self.process_group)
        current = _divide(sums, counts)
        jump = current - self.means
        variances = _divide(squares, counts)
        variances = torch.where(
            self.seen, torch.lerp(variances + self.decay * jump.square(), self.variances, self.decay), variances
        )
        new = 1 - self.decay
        shares = torch.where(
            self.seen,
            self.decay**2 * self.variance_shares + new * (1 + self.decay - new / counts.clamp_min(1)),
            1 - 1 / counts.clamp_min(1),
        )
        means = torch.where(self.seen, torch.lerp(current, self.means, self.decay), current)
        # The sum of finite losses can still overflow, and squares do so sooner.
        observed = (counts > 0) & current.isfinite()
        self.means.copy_(torch.where(observed, means, self.means))
        measured = observed & variances.isfinite()
        self.variances.copy_(torch.where(measured, variances, self.variances))
        self.variance_shares.copy_(torch.where(measured, shares, self.variance_shares))
        self.seen.logical_or_(observed)
        self.pending.zero_()
        self.pending_squares.zero_()
        self._recorded = 0

    @staticmethod
    def starting_anew(saved: Collection[str]) -> set[str]:
        """The buffers that start at 0 when a state is loaded that was saved before spreads were kept.

        ``load_state_dict`` does so by itself. This is for who reads tensors by name, such as a sharded checkpoint.

        Args:
            saved: All names in the state, with any prefixes. A cache is where ``means`` and ``pending`` stand together.

        Returns:
            set of str: Names of buffers, with their cache's prefix; empty if the spreads were saved.
        """
        prefixes = {name.removesuffix("means") for name in saved if name.endswith("means")}
        old = {p for p in prefixes if p + "pending" in saved and p + "variance_shares" not in saved}
        return {prefix + name for prefix in old for name in _OF_SPREAD}

    def reset(self) -> None:
        """Forget everything, as if newly constructed."""
        for buffer in self.buffers():
            if buffer is not self.timesteps:
                buffer.zero_()
        self._recorded = 0

    def extra_repr(self) -> str:
        entries = len(self.timesteps)
        return (
            f"{entries} entries in [{self._range[0]:g}, {self._range[1]:g}], decay={self.decay}, order={self.order!r}"
        )

    def _read(self, index: Tensor, losses: Tensor) -> LossStatistics:
        means = torch.where(self.seen[index], self.means[index].to(losses.dtype), losses)
        return LossStatistics(means, self.spreads[index].to(losses.dtype))

    def _record(self, index: Tensor, losses: Tensor) -> None:
        losses_B1 = losses.to(self.pending.dtype).unsqueeze(1)
        # Masks rather than scatter_add: the grid is tiny, and on CUDA atomics would make the sums irreproducible.
        entries_K = torch.arange(len(self.timesteps), device=index.device)
        counted_BK = (index.unsqueeze(1) == entries_K) & losses_B1.isfinite()
        counts = counted_BK.sum(dim=0).to(losses_B1.dtype)
        sums = torch.where(counted_BK, losses_B1, 0.0).sum(dim=0)
        means = _divide(sums, counts)
        squares = torch.where(counted_BK, losses_B1 - means, 0.0).square().sum(dim=0)
        # About the mean of this call and the calls before, without the cancellation of a mean square less a squared
        # mean: a spread is often far smaller than its mean.
        sums_before, counts_before = self.pending.unbind()
        pairs = _divide(counts * counts_before, counts + counts_before)
        squares = squares + pairs * (means - _divide(sums_before, counts_before)).square()
        self.pending.add_(torch.stack([sums, counts]))
        self.pending_squares.add_(squares)
        if self.auto_update:
            self.update()
        elif not torch.compiler.is_compiling():  # where each count would be compiled anew
            self._count()

    def _count(self) -> None:
        self._recorded += 1
        if self._recorded == _FORGOTTEN and not self._warned:
            self._warned = True
            logger.warning(
                "The cache has recorded the losses of %d calls since its last update(): with auto_update=False the "
                "means change in update() only. Call it once per optimizer step, or construct the cache with "
                "auto_update=True where each step has one call.",
                self._recorded,
            )

    def _check_range(self, timesteps: Tensor) -> None:
        low, high = self._range
        outside = self._range_check.outside(timesteps, low - self._tolerance, high + self._tolerance)
        if outside:
            raise ValueError(
                f"timesteps {outside} lie outside the cache's grid [{low:g}, {high:g}]. {_unit_hint(outside, high)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != before.dtype:
                self._buffers[name] = before.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "timesteps")
        own = self.timesteps
        if (
            isinstance(saved, Tensor)
            and not (saved.is_meta or own.is_meta)
            and (saved.shape != own.shape or not torch.allclose(saved.to(own), own))
        ):
            error_msgs = args[-1]
            error_msgs.append(
                f"{prefix}timesteps: the saved cache is for the grid {saved.tolist()}, this one for {own.tolist()}. "
                "Build the cache with the saved grid, or start with an empty cache."
            )
            return
        for name in self.starting_anew(state_dict):
            if name.startswith(prefix):
                state_dict[name] = torch.zeros_like(state_dict[prefix + "means"])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _divide(sums: Tensor, counts: Tensor) -> Tensor:
    """The mean of each entry, 0 where nothing was counted."""
    return sums / counts.clamp_min(1)


def _unit_hint(outside: Sequence[float], high: float) -> str:
    if not all(map(math.isfinite, outside)):
        return "They must be finite."
    if high > 1 and all(0 <= time <= 1 for time in outside):
        return "Multiply times in [0, 1] by the timestep of pure noise (often 1000), or build the grid in their unit."
    if high <= 1 and all(time > 1 for time in outside):
        return "Divide them by the timestep of pure noise (often 1000), or build the grid in their unit."
    return "Pass them in the grid's unit, or build the grid in theirs."
