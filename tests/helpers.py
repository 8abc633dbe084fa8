"""What several test files share: references in plain Python, processes as ranks, and watchers of tensor operations."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from avd_core import (
    AdaptiveRegressionLoss,
    AVDConfig,
    AVDObjective,
    ClippedTemporalVarianceLoss,
    DistributionMatchingLoss,
    LossMeanCache,
)

GRID = (1000, 900, 757, 522)

# --- References: loops over lists of floats. Without torch, so that no mistake is made twice.


def flatten(nested: Any) -> list[float]:
    """The numbers of a nested list, in order."""
    if isinstance(nested, list):
        return [number for part in nested for number in flatten(part)]
    return [nested]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def reference_sample_losses(prediction: list[Any], target: list[Any]) -> list[float]:
    """L of Eq. 5 for each sample."""
    return [
        mean([(p - y) ** 2 for p, y in zip(flatten(sample), flatten(wanted), strict=True)])
        for sample, wanted in zip(prediction, target, strict=True)
    ]


def reference_weights(losses: list[float], means: list[float], sharpness: float, weight: float) -> list[float]:
    """Eq. 7 as printed: one minus the logistic function of the deviation."""
    deviations = [loss - usual for loss, usual in zip(losses, means, strict=True)]
    return [weight * (1 - 1 / (1 + math.exp(-sharpness * deviation))) for deviation in deviations]


def reference_regression(
    prediction: list[Any], target: list[Any], means: list[float], sharpness: float = 3.0, weight: float = 2.0
) -> float:
    losses = reference_sample_losses(prediction, target)
    weights = reference_weights(losses, means, sharpness, weight)
    return mean([w * loss for w, loss in zip(weights, losses, strict=True)])


class ReferenceCache:
    """Eq. 6 over a dictionary."""

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = decay
        self.means: dict[float, float] = {}

    def read(self, timestep: float, loss: float) -> float:
        return self.means.get(timestep, loss)

    def iterate(self, samples: Iterable[tuple[float, float]]) -> None:
        """One iteration over (timestep of the grid, loss)."""
        by_timestep: dict[float, list[float]] = {}
        for timestep, loss in samples:
            if math.isfinite(loss):
                by_timestep.setdefault(timestep, []).append(loss)
        for timestep, losses in by_timestep.items():
            current = mean(losses)
            before = self.means.get(timestep, current)
            self.means[timestep] = self.decay * before + (1 - self.decay) * current


def reference_temporal_variance(x_BCFHW: list[Any]) -> float:
    """Variance along frames of every position, divided by the number of frames, averaged."""
    variances = []
    for sample in x_BCFHW:
        for channel_FHW in sample:
            for position in zip(*(flatten(frame) for frame in channel_FHW), strict=True):
                center = mean(position)
                variances.append(mean([(value - center) ** 2 for value in position]))
    return mean(variances)


def reference_motion(x_BCFHW: list[Any], floor: float = 0.6, eps: float = 1e-6, weight: float = 0.05) -> float:
    return weight * max(-math.log(reference_temporal_variance(x_BCFHW) + eps), floor)


def reference_matching_gradients(x_0: list[Any], real: list[Any], online: list[Any], eps: float) -> list[list[float]]:
    """g of Eq. 4 for each sample."""
    gradients = []
    for x, r, o in zip(map(flatten, x_0), map(flatten, real), map(flatten, online), strict=True):
        normalizer = max(mean([abs(a - b) for a, b in zip(x, r, strict=True)]), eps)
        gradients.append([(b - a) / normalizer for a, b in zip(r, o, strict=True)])
    return gradients


def central_differences(
    function: Callable[[list[float]], float], values: list[float], step: float = 1e-5
) -> list[float]:
    """The gradient of ``function`` at ``values``, by moving one number at a time."""
    gradient = []
    for i, value in enumerate(values):
        above, below = ([*values[:i], moved, *values[i + 1 :]] for moved in (value + step, value - step))
        gradient.append((function(above) - function(below)) / (2 * step))
    return gradient


# --- Tensors


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend on the arguments alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state that later calls do not change."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(actual: Any, expected: Any) -> None:
    """Bit for bit, through mappings and sequences."""
    assert type(actual) is type(expected), f"{actual!r} and {expected!r}"
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for name in expected:
            assert_same_state(actual[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same_state(a, e)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert actual == expected


def cut(items: list[Any], cuts: list[bool]) -> list[list[Any]]:
    """Consecutive parts of ``items``; ``cuts[i]`` says whether one ends behind item ``i``. Every split can be drawn."""
    parts: list[list[Any]] = [[]]
    for item, end in zip(items, [*cuts, False], strict=True):
        parts[-1].append(item)
        if end:
            parts.append([])
    return parts


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


# --- Every loss with input that fits it, for the tests that all of them have to pass

_shape = (2, 2, 3, 4, 4)
_timesteps = torch.tensor([1000, 522])


@dataclass(frozen=True)
class Case:
    """A loss, its arguments, and which of them have a gradient."""

    make: Callable[[], nn.Module]
    arguments: Callable[[int], list[Tensor]]
    differentiable: tuple[int, ...]

    def inputs(self, seed: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """Fresh leaves that depend on seed and dtype alone."""
        tensors = [
            tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype) for tensor in self.arguments(seed)
        ]
        return [tensor.requires_grad_(i in self.differentiable) for i, tensor in enumerate(tensors)]


LOSSES = {
    "regression": Case(
        lambda: AdaptiveRegressionLoss(LossMeanCache(GRID)),
        lambda seed: [randn(seed, *_shape), randn(seed + 1, *_shape), _timesteps],
        (0,),
    ),
    "motion": Case(ClippedTemporalVarianceLoss, lambda seed: [0.3 * randn(seed, *_shape)], (0,)),
    "matching": Case(DistributionMatchingLoss, lambda seed: [randn(seed + i, *_shape) for i in range(3)], (0,)),
    "objective": Case(
        AVDObjective,
        lambda seed: [0.3 * randn(seed, *_shape), randn(seed + 1, *_shape), randn(seed + 2, *_shape), _timesteps],
        (0, 1),
    ),
    "released code": Case(
        lambda: AVDObjective(AVDConfig.released_code()),
        lambda seed: [0.3 * randn(seed, *_shape), randn(seed + 1, *_shape), randn(seed + 2, *_shape), _timesteps],
        (0, 1),
    ),
}


# --- Ranks


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``function(rank, *args)`` in ``world_size`` processes of one gloo group and return the results by rank.

    ``function`` lives at the top of a module and returns something that pickles.

    Raises:
        RuntimeError: If a process cannot start, raises, dies or takes longer than ``timeout`` seconds. There is no
            fallback to fewer processes: a test of several ranks that ran on one would prove nothing.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run_rank, args=(function, rank, world_size, folder, timeout, args), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + timeout
            while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
                if any(process.exitcode for process in processes):
                    break  # The others may wait for this one in a collective: no use in waiting for them.
                time.sleep(0.02)
            problems = [
                _problem(Path(folder), rank, process.exitcode)
                for rank, process in enumerate(processes)
                if process.exitcode != 0
            ]
            if problems:
                raise RuntimeError("\n".join(problems))
            return [pickle.loads(_result(Path(folder), rank).read_bytes()) for rank in range(world_size)]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _run_rank(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=(Path(folder) / "rendezvous").as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        assert dist.get_world_size() == world_size
        _result(Path(folder), rank).write_bytes(pickle.dumps(function(rank, *args)))
        dist.destroy_process_group()
    except BaseException:
        _error(Path(folder), rank).write_text(traceback.format_exc())
        raise SystemExit(1) from None


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result_{rank}.pickle"


def _error(folder: Path, rank: int) -> Path:
    return folder / f"error_{rank}.txt"


def _problem(folder: Path, rank: int, exitcode: int | None) -> str:
    if _error(folder, rank).exists():
        return f"rank {rank} raised:\n{_error(folder, rank).read_text()}"
    if exitcode is None:
        return f"rank {rank} had not finished when the run was stopped"
    return f"rank {rank} ended with exit code {exitcode} and no result"


# --- The machine


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes; the writer sees what a full disk shows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
