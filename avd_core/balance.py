"""Sizes of gradients at the student's output: a regression's beside the matching term's, and several terms' shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from avd_core._checks import check_floating, check_number
from avd_core._distributed import sum_over_ranks, world_size
from avd_core.output import LossOutput


class GradientBalance(nn.Module):
    """Measures the ratio of two losses' gradients at the student's output, and holds it if ``target`` is set.

    The effect of a regression depends on this ratio, and not on its weight alone. At pure noise a regression wants the
    mean of everything that fits the caption. If it dominates, the student ends up blurred; if it vanishes,
    distribution matching oversaturates. With ``target=None`` the regression's loss is unchanged and the ratio is only
    reported. Otherwise the loss is multiplied by ``target / ratio``, with the ratio taken over recent calls.

    The ratio is ``sqrt(E|dL_reg/dv|^2 / E|dL_dm/dv'|^2)``, with ``v`` and ``v'`` the student's outputs for the two
    losses, and E a running mean over calls and ranks, so that one extreme sample changes it little. Both gradients are
    taken at the outputs, so no backward pass through the student is added. Where the matching loss is of several
    outputs, the squares of its gradients at them add up, as those of independent gradients do.

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
        self,
        regression_loss: Tensor,
        regression_output: Tensor,
        matching_loss: Tensor,
        matching_output: Tensor | Sequence[Tensor],
    ) -> LossOutput:
        """Compare two losses, before any of them is passed to ``backward()``.

        Args:
            regression_loss: Scalar, with gradient.
            regression_output: The generator's output that it was computed from, ``[B, ...]``.
            matching_loss: Scalar, with gradient.
            matching_output: The generator's output that it was computed from, in the same parametrisation (both
                velocities, or both x_0), ``[B, ...]``; or several of them.

        Returns:
            LossOutput: ``loss`` is the regression's loss, scaled where a target is set; metrics ``gradient_ratio``
            (before scaling; NaN before the first call, infinite without a matching gradient) and ``scale``, scalars.

        Raises:
            TypeError: If an output is not floating.
            ValueError: In training mode, if a loss has no gradient with respect to its output.
        """
        self.check_inputs(regression_loss, regression_output, matching_loss, matching_output)
        if self.training:
            regression = _gradient("regression_loss", regression_loss, "regression_output", regression_output)
            matching = [
                _gradient("matching_loss", matching_loss, "matching_output", output)
                for output in _several(matching_output)
            ]
            squares = torch.stack([_squared_norm(regression), torch.stack([*map(_squared_norm, matching)]).sum()])
            self._record(squares.to(self.means.dtype))
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
        matching_output: Tensor | Sequence[Tensor],
    ) -> None:
        """Raise what :meth:`forward` would, without computing anything; a loss that is yet to come may be None."""
        for name, loss, output in (
            ("regression", regression_loss, regression_output),
            *(("matching", matching_loss, output) for output in _several(matching_output)),
        ):
            check_floating(f"{name}_output", output)
            if self.training and not (output.requires_grad and (loss is None or loss.requires_grad)):
                raise ValueError(_not_connected(f"{name}_loss", f"{name}_output"))

    @torch.no_grad()
    def _record(self, current: Tensor) -> None:
        if self.sync_ranks and world_size(self.process_group) > 1:
            current = sum_over_ranks(current, self.process_group)  # of a ratio, a sum is as good as a mean
        finite = current.isfinite().all()
        moved = torch.where(self.calls > 0, torch.lerp(current, self.means, self.decay), current)
        self.means.copy_(torch.where(finite, moved, self.means))
        self.calls.add_(finite)


def gradient_shares(output: Tensor, losses: Mapping[str, Tensor]) -> LossOutput:
    r"""Add up losses of one output, and say how much of the gradient is each one's.

    .. math::
        \mathrm{share}_i = |\partial L_i / \partial x| \,/\, \sum_j |\partial L_j / \partial x|

    Weights alone do not tell which term trains a generator: in V-PAE an adversarial one and conditional score
    distillation. The measure is ours. Gradients of opposite directions cancel in the sum, which shares do not show. To
    hold the ratio of two terms, see :class:`GradientBalance`.

    Each loss is differentiated here, once and down to ``output``. The loss that is returned has that gradient already,
    so its backward pass starts at ``output``: measuring adds no pass through a discriminator. Hence a gradient reaches
    the parameters below ``output`` and no others.

    Where a loss goes through a module that ``torch.compile`` has compiled, such as a discriminator, set
    ``torch._functorch.config.donated_buffer = False`` before it first runs. Without that PyTorch refuses this.

    Args:
        output: ``[B, ...]`` that all losses were computed from, floating, with gradient: the sample, or the generator's
            velocity.
        losses: Scalars with gradient by name, at least one, weighted as they are to be added.

    Returns:
        LossOutput: ``loss``, the sum; metrics, the share of each loss by its name, scalars that add up to 1, of this
        rank's batch. They are NaN where all gradients are 0, and mean nothing where one of them is not finite.

    Raises:
        TypeError: If ``output`` is not floating.
        ValueError: If there are no losses, or one has no gradient with respect to ``output``.

    Example:
        >>> x_0 = torch.zeros(2, 3, requires_grad=True)
        >>> terms = {"adversarial": -x_0.sum(), "distillation": 3 * (x_0 - 1).square().mean()}
        >>> loss, shares = gradient_shares(x_0, terms)
        >>> {name: round(share.item(), 2) for name, share in shares.items()}
        {'adversarial': 0.5, 'distillation': 0.5}
        >>> loss.backward()
    """
    check_floating("output", output)
    if not losses:
        raise ValueError("losses must name at least one loss, got none.")
    for name, loss in losses.items():
        if not (output.requires_grad and loss.requires_grad):
            raise ValueError(_not_connected(f"losses[{name!r}]", "output"))
    gradients = [_gradient(f"losses[{name!r}]", loss, "output", output) for name, loss in losses.items()]
    norms = torch.stack([_squared_norm(gradient) for gradient in gradients]).sqrt()
    shares = dict(zip(losses, (norms / norms.sum()).unbind(), strict=True))
    # 0 in value, and the gradient in its derivative.
    known = ((output - output.detach()) * torch.stack(gradients).sum(dim=0)).sum()
    return LossOutput(torch.stack([loss.detach() for loss in losses.values()]).sum() + known, shares)


def _several(output: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [output] if isinstance(output, Tensor) else output


def _gradient(loss_name: str, loss: Tensor, output_name: str, output: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, output, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(_not_connected(loss_name, output_name))
    return gradient


def _squared_norm(gradient: Tensor) -> Tensor:
    return gradient.float().square().sum()


def _not_connected(loss_name: str, output_name: str) -> str:
    return (
        f"{loss_name} has no gradient with respect to {output_name}. Pass the very tensor that the generator returned "
        "and the loss was computed from, with gradients enabled and before backward()."
    )
