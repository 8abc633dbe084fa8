"""A forward that waits for the GPU stalls the whole loop. None of them may; callbacks say when they do."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import avd_core
from avd_core import (
    ClippedTemporalVarianceLoss,
    CollapseMonitor,
    FlowMatchingSchedule,
    GradientBalance,
    LatentStatistics,
    LossMeanCache,
    NonFiniteGuard,
    SpectralRolloffMonitor,
    SpectralStatistics,
    gradient_shares,
    shift_timesteps,
)
from avd_core._checks import RangeCheck
from loss_cases import LOSSES
from watchers import NoHostWait

DTYPES = [torch.float32, torch.bfloat16]


def balance_call(device: str) -> tuple[GradientBalance, list[Tensor]]:
    outputs = [torch.randn(2, 3, device=device, requires_grad=True) for _ in range(2)]
    return GradientBalance(target=0.5).to(device), [outputs[0].square().sum(), outputs[0], outputs[1].sum(), outputs[1]]


def schedule_calls(device: str) -> None:
    schedule, x = FlowMatchingSchedule(), torch.ones(2, 3, device=device)
    t = torch.ones(2, device=device)
    schedule.add_noise(x, x, t)
    schedule.velocity_to_x_0(x, x, t)
    schedule.x_0_to_velocity(x, x, t)
    shift_timesteps(t, 5.0)


class Looks(TorchFunctionMode):
    """Counts how often values are brought to the host, on any device."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__float__}
        return func(*args, **(kwargs or {}))


class Elsewhere(torch.Tensor):
    """A tensor with values that says it is on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


def test_timesteps_elsewhere_are_looked_at_until_they_are_right_once() -> None:
    check, good = RangeCheck(), torch.tensor([1.0, 2.0]).as_subclass(Elsewhere)
    wrong = torch.tensor([1.0, 5.0, math.nan]).as_subclass(Elsewhere)
    for _ in range(2):
        assert str(check.outside(wrong, 0, 3)) == "[5.0, nan]"
    with Looks() as looks:
        assert check.outside(good, 0, 3) == []
    assert looks.count == 1
    with Looks() as looks:
        assert check.outside(wrong, 0, 3) == []
    assert looks.count == 0


def test_timesteps_on_the_cpu_are_always_looked_at() -> None:
    check = RangeCheck()
    for _ in range(2):
        assert check.outside(torch.tensor([1.0]), 0, 3) == []
        assert check.outside(torch.tensor([4.0]), 0, 3) == [4.0]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_no_loss_reads_a_value(name: str, dtype: torch.dtype, training: bool) -> None:
    # Tensors on the meta device have none.
    module = LOSSES[name].make().to("meta").train(training)
    inputs = LOSSES[name].inputs(0, dtype, "meta")
    with NoHostWait():
        assert module(*inputs).loss.is_meta


def test_no_balance_schedule_or_cache_reads_a_value() -> None:
    balance, arguments = balance_call("meta")
    cache = LossMeanCache((1000, 900), auto_update=False).to("meta")
    with NoHostWait():
        assert balance(*arguments).loss.is_meta
        assert gradient_shares(arguments[1], {"regression": arguments[0]}).loss.is_meta
        schedule_calls("meta")
        assert cache(torch.ones(2, device="meta"), torch.ones(2, device="meta")).means.is_meta
        cache.update()


def test_no_reduction_over_ranks_reads_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is exchanged does not matter here, only how it is prepared.
    for module in (avd_core.motion, avd_core.cache, avd_core.balance):
        monkeypatch.setattr(module, "world_size", lambda group: 2)
        monkeypatch.setattr(module, "sum_over_ranks", lambda values, group: 2 * values)
    balance, arguments = balance_call("meta")
    regression = LOSSES["regression"].make().to("meta")
    regression_inputs = LOSSES["regression"].inputs(0, torch.float32, "meta")
    motion = ClippedTemporalVarianceLoss()
    x_0 = torch.ones(1, 2, 3, 4, 4, device="meta", requires_grad=True)
    with NoHostWait():
        assert balance(*arguments).loss.is_meta
        assert regression(*regression_inputs).loss.is_meta
        assert motion(x_0).loss.is_meta


def test_the_monitor_waits_only_when_it_looks() -> None:
    monitor = CollapseMonitor(LatentStatistics(1.0, (1.0, 1.0)), regression_weight=2.0, every=3, grace=0)
    metrics = {
        "x_0": torch.ones(1, 2, 3, 4, 4, device="meta"),
        "regression/weights": torch.ones(2, device="meta"),
        "balance/gradient_ratio": torch.ones((), device="meta"),
    }
    with NoHostWait():
        monitor.after_step(0, metrics)
        monitor.after_step(1, metrics)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        monitor.after_step(2, metrics)  # as documented, so the two before were asked


def test_the_spectrums_monitor_waits_only_when_it_looks() -> None:
    reference = SpectralStatistics((0, 2), (0.4, 0.1), (0.3, 0.1))
    monitor = SpectralRolloffMonitor(reference, every=3, grace=0, window=2)
    metrics = {"x_0": torch.ones(1, 3, 4, 5, 6, device="meta")}
    with NoHostWait():
        monitor.after_step(0, metrics)
        monitor.after_step(1, metrics)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        monitor.after_step(2, metrics)


def test_these_tests_can_fail() -> None:
    # What they rely on: a tensor on the meta device, or the watcher, refuses everything that waits.
    x = torch.ones(2, device="meta")
    for wait in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x[x > 0], x.tolist, x.cpu, lambda: float(x[0])):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()
    for upload in (lambda: x.new_tensor(1.0), lambda: torch.tensor([1.0], device="meta")):
        with pytest.raises(AssertionError, match="waits for it"), NoHostWait():
            upload()


# --- The same on a GPU, where the driver itself is asked


@contextlib.contextmanager
def refuse_waits() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_loss_waits_for_a_gpu(name: str, dtype: torch.dtype) -> None:
    module = LOSSES[name].make().cuda()
    module(*LOSSES[name].inputs(0, dtype, "cuda"))  # looks at the timesteps
    for seed in range(2):
        inputs = LOSSES[name].inputs(seed, dtype, "cuda")
        with refuse_waits():
            module(*inputs).loss.backward()
    assert all(x.grad.isfinite().all() for x in inputs if x.requires_grad)


@pytest.mark.gpu
def test_no_balance_or_schedule_waits_for_a_gpu() -> None:
    balance, arguments = balance_call("cuda")
    with refuse_waits():
        loss = balance(*arguments).loss
    assert loss.isfinite()
    x, t = torch.ones(2, 3, device="cuda"), torch.ones(2, device="cuda")
    schedule = FlowMatchingSchedule()
    schedule.add_noise(x, x, t)  # looks at the timesteps
    with refuse_waits():
        x_t = schedule.add_noise(x, x, t)
    assert x_t.isfinite().all()


@pytest.mark.gpu
def test_the_first_call_on_a_gpu_refuses_timesteps_in_another_unit() -> None:
    cache = LossMeanCache((1000, 900)).cuda()
    with pytest.raises(ValueError, match="outside the cache's grid"):
        cache(torch.tensor([0.9], device="cuda"), torch.ones(1, device="cuda"))
    with pytest.raises(ValueError, match="lie outside"):
        FlowMatchingSchedule(1).sigma(torch.tensor([900.0], device="cuda"), torch.ones(1, 2, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_the_cpus_loss_gradient_and_cache(name: str, dtype: torch.dtype) -> None:
    outcomes = []
    for device in ("cpu", "cuda"):
        module = LOSSES[name].make().to(device)
        for seed in range(3):
            inputs = LOSSES[name].inputs(seed, dtype, device)
            loss = module(*inputs).loss
        gradients = torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])
        outcomes.append((loss.cpu(), [g.cpu() for g in gradients], [b.cpu() for b in module.buffers()]))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outcomes[1][1], outcomes[0][1], rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(outcomes[1][2], outcomes[0][2], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_the_monitor_waits_for_a_gpu_only_when_it_looks() -> None:
    monitor = CollapseMonitor(LatentStatistics(1.0, (1.0, 1.0)), every=4, grace=0)
    x_0 = torch.randn(1, 2, 3, 4, 4, device="cuda")
    monitor.after_step(0, {"x_0": x_0})  # moves the reference to the device
    with refuse_waits():
        monitor.after_step(1, {"x_0": x_0})
        monitor.after_step(2, {"x_0": x_0})
    monitor.after_step(3, {"x_0": x_0})
    assert set(monitor.signals()) == {"variance", "saturation"}


@pytest.mark.gpu
def test_the_spectrums_monitor_waits_for_a_gpu_only_when_it_looks() -> None:
    reference = SpectralStatistics((0, 1), (0.4, 0.1), (0.3, 0.1))
    monitor = SpectralRolloffMonitor(reference, every=4, grace=0, window=3)
    x_0 = torch.randn(1, 2, 5, 4, 4, device="cuda")
    monitor.after_step(0, {"x_0": x_0})  # plans the transforms, and moves what there is to the device
    with refuse_waits():
        monitor.after_step(1, {"x_0": x_0})
        monitor.after_step(2, {"x_0": x_0})
    monitor.after_step(3, {"x_0": x_0})
    assert set(monitor.signals()) == {"spatial", "temporal"}


@pytest.mark.gpu
def test_the_guard_decides_on_a_gpu() -> None:
    guard = NonFiniteGuard()
    assert guard.before_step(0, {"loss": torch.ones((), device="cuda")}) is True
    assert guard.before_step(1, {"loss": torch.full((), float("nan"), device="cuda")}) is False
