"""Directional derivatives of a transformer by forward differentiation, in one forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

QUERIES = 1024
"""Queries of which attention is computed at once: for 32,760 tokens and 12 heads, weights of 1.5 GiB in float32."""

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
"""Of PyTorch's attention, in order."""


def directional_derivative(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], directions: tuple[Tensor, ...]
) -> Tensor:
    """How a function changes as its inputs move along directions; no graph is kept.

    Flash and memory-efficient attention have no forward derivative in PyTorch. Attention is computed by matrix
    products in their place, some queries at a time, which keeps memory low and is slower.

    Args:
        function: Of tensors to a tensor; it may call transformers whose attention is PyTorch's.
        inputs: Its arguments.
        directions: Shaped as these.

    Returns:
        ``d/dh function(inputs + h directions)`` at 0, shaped as what the function returns.

    Raises:
        ValueError: If attention has a mask or is causal.
    """
    # Dual tensors and not torch.func.jvp, in which FSDP2 of older PyTorch cannot gather parameters. Compiled blocks
    # would let go of the derivative without a word.
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), forward_ad.dual_level(), _AttentionByParts():
        duals = map(forward_ad.make_dual, inputs, directions)
        value = function(*duals)
        derivative: Tensor | None = forward_ad.unpack_dual(value).tangent  # type: ignore[no-untyped-call]
        return torch.zeros_like(value) if derivative is None else derivative


class _AttentionByParts(TorchFunctionMode):
    """Attention in a form that has a forward derivative, of some queries at a time."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        values = {**dict(zip(_PARAMETERS, args, strict=False)), **kwargs}
        query = values.pop("query")
        if values.get("attn_mask") is not None or values.get("is_causal"):
            raise ValueError(
                "attention with a mask or is_causal has no derivative by parts here, since a mask is of all queries. "
                "Differentiate a transformer without masks, or set method.derivative=differences."
            )
        with sdpa_kernel(SDPBackend.MATH):
            return torch.cat([func(part, **values) for part in query.split(QUERIES, dim=-2)], dim=-2)
