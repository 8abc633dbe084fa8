"""The size of the regression's gradient, relative to that of the matching term."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from avd_core._checks import check_floating, check_number
from avd_core._distributed import sum_over_ranks, world_size
from avd_core.output import LossOutput


class GradientBalance(nn.Module):
    """Measures the ratio of two losses' gradients at the student's output, and holds it if ``target`` is set.

    The effect of a regression depends on this ratio, and not on its weight alone. At pure noise a regression wants the
    mean of everything that fits the caption. If it dominates, the student ends up blurred and still; if it vanishes,
    distribution matching oversaturates. With ``target=None`` the regression's loss is unchanged and the ratio is only
    reported. Otherwise the loss is multiplied by ``target / ratio``, with the ratio taken over recent calls.

    The ratio is ``sqrt(E|dL_reg/dv|^2 / E|dL_dm/dv'|^2)``, with ``v`` and ``v'`` the student's outputs for the two
    losses, and E a running mean over calls and ranks, so that one extreme sample changes it little. Both gradients are
    taken at the outputs, so no backward pass through the student is added.

    Each call in training mode measures both gradients and moves the means before the ratio is taken. A call whose
    gradients are not finite is left out. In evaluation mode the ratio is that of the means so far. The state is two
    buffers: ``means`` ``[2]``, the means of the squared gradient norms (regression, matching), and ``calls``, the
    number of calls that they contain.

    Args:
        target: The ratio to hold, positive, or None to leave the loss alone. (The paper has a constant weight.)
        decay: Decay of the running means per call in training mode, in [0, 1).
        sync_ranks: Whether the means are over all ranks; a collective. If False, each rank has a ratio of its own.
        process_group: The ranks; None is the default group.
    """

    means: Tensor
    calls: Tensor

    def __init__(
        self,
        *,
        target: float | None = None,
        decay: float = 0.9,
        sync_ranks: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if target is not None:
            check_number("target", target, above=0)
        check_number("decay", decay, at_least=0, below=1)
        self.target = target
        self.decay = decay
        self.sync_ranks = sync_ranks
        self.process_group = process_group
        self.register_buffer("means", torch.zeros(2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(
        self, regression_loss: Tensor, regression_output: Tensor, matching_loss: Tensor, matching_output: Tensor
    ) -> LossOutput:
        """Compare two losses, before any of them is passed to ``backward()``.

        Args:
            regression_loss: Scalar, with gradient.
            regression_output: The generator's output that it was computed from, ``[B, ...]``.
            matching_loss: Scalar, with gradient.
            matching_output: The generator's output that it was computed from, in the same parametrisation (both
                velocities, or both x_0), ``[B, ...]``.

        Returns:
            LossOutput: ``loss`` is the regression's loss, scaled where a target is set; metrics ``gradient_ratio``
            (before scaling; NaN before the first call, infinite without a matching gradient) and ``scale``, scalars.

        Raises:
            TypeError: If an output is not floating.
            ValueError: In training mode, if a loss has no gradient with respect to its output.
        """
        self.check_inputs(regression_loss, regression_output, matching_loss, matching_output)
        if self.training:
            regression = _squared_norm("regression", regression_loss, regression_output)
            matching = _squared_norm("matching", matching_loss, matching_output)
            self._record(torch.stack([regression, matching]).to(self.means.dtype))
        ratio = (self.means[0] / self.means[1]).sqrt()
        # A side without gradient (a term at zero, no finite call yet) gives nothing to hold a ratio to.
        usable = ratio.isfinite() & (ratio > 0) & (self.target is not None)
        scale = torch.where(usable, (self.target or 0.0) / ratio, torch.ones_like(ratio))
        return LossOutput(regression_loss * scale, {"gradient_ratio": ratio, "scale": scale})

    def check_inputs(
        self,
        regression_loss: Tensor | None,
        regression_output: Tensor,
        matching_loss: Tensor,
        matching_output: Tensor,
    ) -> None:
        """Raise what :meth:`forward` would, without computing anything; a loss that is yet to come may be None."""
        for name, loss, output in (
            ("regression", regression_loss, regression_output),
            ("matching", matching_loss, matching_output),
        ):
            check_floating(f"{name}_output", output)
            if self.training and not (output.requires_grad and (loss is None or loss.requires_grad)):
                raise ValueError(_not_connected(name))

    @torch.no_grad()
    def _record(self, current: Tensor) -> None:
        if self.sync_ranks and world_size(self.process_group) > 1:
            current = sum_over_ranks(current, self.process_group)  # of a ratio, a sum is as good as a mean
        finite = current.isfinite().all()
        moved = torch.where(self.calls > 0, torch.lerp(current, self.means, self.decay), current)
        self.means.copy_(torch.where(finite, moved, self.means))
        self.calls.add_(finite)


def _squared_norm(name: str, loss: Tensor, output: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, output, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(_not_connected(name))
    return gradient.float().square().sum()


def _not_connected(name: str) -> str:
    return (
        f"{name}_loss has no gradient with respect to {name}_output. Pass the very tensor that the generator returned "
        "and the loss was computed from, with gradients enabled and before backward()."
    )
