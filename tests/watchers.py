"""What tensor operations do while a test looks: arithmetic, waits for a device, temporaries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class NoArithmetic(TorchDispatchMode):
    """Fails on the first operation on tensors: a check of shapes, types and devices needs none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran although the input is wrong")


class NoHostWait(TorchFunctionMode):
    """With tensors on the meta device: fails where a GPU would be waited for.

    Reading a value (``.item()``, ``bool()``, ``.tolist()``, a mask as an index) is impossible there and raises by
    itself. Building a tensor from Python numbers is possible, but on a GPU it is a blocking copy; this mode refuses it.
    """

    _uploads = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._uploads:
            raise AssertionError(f"{func.__name__} copies from the host to the device and waits for it")
        return func(*args, **(kwargs or {}))


class LargestTemporary(TorchDispatchMode):
    """The bytes of the largest tensor that any operation within this context allocates."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result
