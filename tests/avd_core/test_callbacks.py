import gc
import inspect
import io
import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from avd_core import (
    Callback,
    CollapseMonitor,
    EMACallback,
    HingeLoss,
    LatentStatistics,
    NamedCallbacks,
    NonFiniteError,
    NonFiniteGuard,
    SpectralRolloffMonitor,
    SpectralStatistics,
)
from tensors import assert_same_state, randn

# --- The contract of every callback


def clips(seed: int, motion: float = 1.0, spread: float = 1.0, shape: tuple[int, ...] = (2, 3, 4, 2, 2)) -> Tensor:
    """Latents [B, C, F, H, W]; ``motion`` scales what changes along frames, ``spread`` everything."""
    still = randn(seed, *shape)[:, :, :1].float()
    moving = randn(seed + 1, *shape).float()
    return spread * (still + motion * (moving - moving.mean(2, keepdim=True)))


REFERENCE = LatentStatistics.measure(clips(1000, shape=(64, 3, 4, 2, 2)))
SPECTRUM = SpectralStatistics.measure(clips(1000, shape=(64, 3, 4, 2, 2)))


def metrics_at(step: int) -> dict[str, Tensor]:
    """What a loop reports at a step: now and then a loss that is not finite, samples that move less and less."""
    return {
        "loss": torch.tensor(math.nan if step in (3, 4, 9) else 1.0),
        "gradient_norm": torch.tensor(2.0),
        "x_0": clips(step, motion=1 / (1 + step)),
        "regression/weights": torch.tensor([2.0, 1.5]) / (1 + step),
        "balance/gradient_ratio": torch.tensor(0.2 * step),
        **of_logits(torch.tensor([1 - 0.2 * step, 1.0]), torch.tensor([0.0, 1.0])),
        "discriminator/hinge_loss": torch.tensor(1 / (1 + step) ** 2),
    }


def of_logits(clip_logits: Tensor, sample_logits: Tensor) -> dict[str, Tensor]:
    """What a loop reports of a discriminator's logits, but for the loss."""
    metrics = HingeLoss().eval().discriminator(clip_logits, sample_logits).metrics
    return {f"discriminator/{name}": value for name, value in metrics.items() if name != "hinge_loss"}


# Given in every test, which is about what a limit does and not about where it is best.
LIMITS = {
    "variance_range": (0.5, 3.0),
    "saturation_range": (0.8, 1.2),
    "min_weight": 0.05,
    "max_switched": 0.5,
    "min_weight_spread": 0.02,
    "max_gradient_ratio": 1.0,
    "min_ranked": 0.55,
    "min_hinge_loss": 0.05,
    "patience": 4,
}


def make_monitor(model: nn.Module | None) -> CollapseMonitor:
    return CollapseMonitor(REFERENCE, regression_weight=2.0, every=2, grace=1, decay=0.5, window=6, **LIMITS)


def make_spectrum(model: nn.Module | None) -> SpectralRolloffMonitor:
    return SpectralRolloffMonitor(SPECTRUM, every=2, grace=1, window=5, spatial_margin=0.1, temporal_margin=0.1)


FACTORIES = {
    "Callback": lambda model: Callback(),
    "EMACallback": lambda model: EMACallback(model.parameters(), decay=0.9),
    "EMACallback without warmup": lambda model: EMACallback(model.parameters(), decay=0.9, warmup=False),
    "CollapseMonitor": make_monitor,
    "SpectralRolloffMonitor": make_spectrum,
    "NonFiniteGuard": lambda model: NonFiniteGuard(max_consecutive=5),
    "NamedCallbacks": lambda model: NamedCallbacks(
        {
            "guard": NonFiniteGuard(max_consecutive=5),
            "ema": EMACallback(model.parameters()),
            "monitor": make_monitor(model),
            "inner": NamedCallbacks({"guard": NonFiniteGuard(max_consecutive=7)}),
        }
    ),
}


@dataclass
class Run:
    """A training loop of a model with one weight vector, as :class:`Callback` describes it."""

    name: str
    answers: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            self.model.weight.fill_(1.0)
        self.callback = FACTORIES[self.name](self.model)

    def steps(self, steps: Iterable[int], **extra: Tensor) -> None:
        for step in steps:
            metrics = {**metrics_at(step), **extra}
            self.answers.append(self.callback.before_step(step, metrics))
            if self.answers[-1]:
                with torch.no_grad():
                    self.model.weight += randn(step, 1, 3).float()
                self.callback.after_step(step, metrics)


@pytest.fixture(params=FACTORIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("hook", ["before_step", "after_step", "state_dict", "load_state_dict"])
def test_hooks_have_the_protocols_signature(name: str, hook: str) -> None:
    def parameters(callback: Callback) -> list[tuple[str, Any]]:
        return [(p.name, p.kind) for p in inspect.signature(getattr(type(callback), hook)).parameters.values()]

    callback = Run(name).callback
    assert isinstance(callback, Callback)
    assert parameters(callback) == parameters(Callback())


def test_before_step_returns_a_bool_and_after_step_nothing(name: str) -> None:
    run = Run(name)
    assert run.callback.before_step(0, metrics_at(0)) is True
    assert run.callback.after_step(0, metrics_at(0)) is None


def test_unknown_metrics_are_ignored(name: str) -> None:
    run, other = Run(name), Run(name)
    run.steps(range(6))
    other.steps(range(6), **{"something/else": torch.full((3,), math.nan), "x_1": torch.zeros(0)})
    assert other.answers == run.answers
    assert_same_state(other.callback.state_dict(), run.callback.state_dict())


def test_metrics_and_parameters_are_left_alone(name: str) -> None:
    run = Run(name)
    metrics = metrics_at(3)
    copies = {key: value.clone() for key, value in metrics.items()}
    weights = run.model.weight.clone()
    run.callback.before_step(3, metrics)
    run.callback.after_step(3, metrics)
    assert_same_state(metrics, copies)
    assert torch.equal(run.model.weight, weights)


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 8])
def test_going_on_after_a_restart_gives_the_same_as_not_stopping(name: str, stop: int) -> None:
    whole = Run(name)
    whole.steps(range(12))
    first = Run(name)
    first.steps(range(stop))
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "callback": first.callback.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # so the state holds tensors, numbers, strings and containers only
    second = Run(name)
    second.model.load_state_dict(saved["model"])
    second.callback.load_state_dict(saved["callback"])
    assert_same_state(second.callback.state_dict(), first.callback.state_dict())
    second.steps(range(stop, 12))
    assert first.answers + second.answers == whole.answers
    assert_same_state(second.callback.state_dict(), whole.callback.state_dict())
    if isinstance(whole.callback, CollapseMonitor | SpectralRolloffMonitor):
        assert second.callback.findings == whole.callback.findings
        assert whole.callback.findings


# --- NamedCallbacks


class Recorder(Callback):
    def __init__(self, log: list[tuple[str, str, int]], name: str, answer: bool = True) -> None:
        self.log, self.name, self.answer = log, name, answer

    def before_step(self, step: int, metrics: Mapping[str, Tensor]) -> bool:
        self.log.append(("before", self.name, step))
        return self.answer

    def after_step(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        self.log.append(("after", self.name, step))


def test_a_list_asks_every_callback_in_order_even_after_a_refusal() -> None:
    # An answer can be a collective: a callback that is asked on one rank and not on another would wait forever.
    log = []
    callbacks = NamedCallbacks({"a": Recorder(log, "a"), "b": Recorder(log, "b", False), "c": Recorder(log, "c")})
    assert callbacks.before_step(7, {}) is False
    callbacks.after_step(7, {})
    assert log == [(hook, name, 7) for hook in ("before", "after") for name in "abc"]


def test_an_empty_list_lets_every_step_pass() -> None:
    assert NamedCallbacks({}).before_step(0, {}) is True


def test_a_list_refuses_what_is_no_callback() -> None:
    with pytest.raises(TypeError, match="callback 'print' must be a Callback, got builtin_function_or_method"):
        NamedCallbacks({"print": print})


def test_a_list_refuses_the_state_of_other_callbacks() -> None:
    saved = NamedCallbacks({"guard": NonFiniteGuard()}).state_dict()
    with pytest.raises(ValueError, match=r"\['guard'\].*\['monitor'\].*Construct the same callbacks"):
        NamedCallbacks({"monitor": make_monitor(None)}).load_state_dict(saved)


# --- EMACallback


def play_ema(decay: float, warmup: bool, values: list[float]) -> float:
    """The average after the parameter took each of the values, the first before any step."""
    parameter = nn.Parameter(torch.tensor([values[0]], dtype=torch.float64))
    ema = EMACallback([parameter], decay, warmup=warmup)
    for step, value in enumerate(values[1:]):
        parameter.data.fill_(value)
        ema.after_step(step, {})
    with ema.average_parameters():
        return parameter.item()


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(0, 0.999))
def test_the_average_is_exponential(values: list[float], decay: float) -> None:
    average = values[0]
    for value in values[1:]:
        average = decay * average + (1 - decay) * value
    assert play_ema(decay, False, values) == pytest.approx(average, rel=1e-9, abs=1e-9)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(0, 0.999))
def test_with_warmup_the_decay_rises_with_the_number_of_updates(values: list[float], decay: float) -> None:
    average = values[0]
    for n, value in enumerate(values[1:], start=1):
        warm = min(decay, (1 + n) / (10 + n))
        average = warm * average + (1 - warm) * value
    assert play_ema(decay, True, values) == pytest.approx(average, rel=1e-9, abs=1e-9)


def test_warmup_forgets_the_initial_weights_sooner() -> None:
    assert play_ema(0.99, True, [100.0, 0.0, 0.0, 0.0]) < 2
    assert play_ema(0.99, False, [100.0, 0.0, 0.0, 0.0]) > 97


def test_the_context_restores_the_weights_also_on_an_error() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    ema = EMACallback([parameter], 0.5, warmup=False)
    parameter.data.fill_(3.0)
    ema.after_step(0, {})

    def fail_within() -> None:
        with ema.average_parameters():
            assert parameter.item() == 2.0
            raise KeyError("sampling failed")

    with pytest.raises(KeyError, match="sampling failed"):
        fail_within()
    assert parameter.item() == 3.0
    assert parameter.requires_grad


def test_after_the_context_the_weights_are_in_memory_once() -> None:
    parameter = nn.Parameter(torch.ones(12_345))
    ema = EMACallback([parameter])
    with ema.average_parameters():
        pass
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and x.numel() == 12_345]
    assert len({x.untyped_storage().data_ptr() for x in alive}) == 2  # the weights and their average


def test_a_checkpoint_within_the_context_holds_no_weights_that_were_set_aside() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    ema = EMACallback([parameter])
    with ema.average_parameters():
        saved = ema.state_dict()
    assert set(saved) == {"decay", "num_updates", "shadow_params"}
    ema.load_state_dict(saved)
    with ema.average_parameters():
        assert parameter.item() == 1.0


def test_ema_of_half_precision_weights_does_not_stand_still() -> None:
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = EMACallback([weight], decay=0.99, warmup=False)
    weight.data.fill_(1.25)
    for step in range(1000):
        ema.after_step(step, {})
    with ema.average_parameters():
        assert weight.dtype == torch.bfloat16
        assert weight.item() == 1.25
    assert weight.item() == 1.25


def test_averages_are_kept_where_they_are_to_be_held() -> None:
    parameter, copy = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([7.0]), requires_grad=False)
    ema = EMACallback([parameter], 0.5, warmup=False, held_in=[copy])
    assert copy.item() == 1.0
    parameter.data.fill_(3.0)
    ema.after_step(0, {})
    assert copy.item() == 2.0
    saved = {**ema.state_dict(), "shadow_params": [torch.tensor([5.0])]}
    ema.load_state_dict(saved)
    assert copy.item() == 5.0  # and still the very tensor that follows
    ema.after_step(1, {})
    assert copy.item() == 4.0
    with ema.average_parameters():
        assert parameter.item() == 4.0


@pytest.mark.parametrize(
    ("held_in", "found"),
    [
        ([], "0 for 1"),
        ([torch.ones(2)], r"\(torch.Size\(\[2\]\), torch.float32\) for \(torch.Size\(\[1\]\), torch.float32\)"),
        ([torch.ones(1, dtype=torch.bfloat16)], "torch.bfloat16"),
    ],
)
def test_what_holds_the_averages_must_fit(held_in: list[torch.Tensor], found: str) -> None:
    with pytest.raises(ValueError, match=f"held_in must have a tensor for each .* got .*{found}.*Pass the parameters"):
        EMACallback([nn.Parameter(torch.ones(1))], held_in=held_in)


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_ema_refuses_a_decay_outside_its_range(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be a finite number at least 0 and below 1"):
        EMACallback([nn.Parameter(torch.ones(1))], decay)


def test_ema_refuses_no_parameters() -> None:
    with pytest.raises(ValueError, match="at least one parameter"):
        EMACallback(iter([]))


def test_ema_without_torch_ema_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_ema", None)
    with pytest.raises(ImportError, match=r"pip install \"avd-core\[ema\]\""):
        EMACallback([nn.Parameter(torch.ones(1))])


# --- NonFiniteGuard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["loss", "gradient_norm"])
def test_the_guard_skips_a_step_that_is_not_finite(bad: float, key: str, caplog: pytest.LogCaptureFixture) -> None:
    guard = NonFiniteGuard()
    metrics = {"loss": torch.tensor(1.0), "gradient_norm": torch.tensor(1.0)}
    assert guard.before_step(0, metrics) is True
    assert guard.before_step(1, {**metrics, key: torch.tensor(bad)}) is False
    assert f"Step 1 of the model skipped, not finite: {key} on 1 rank(s) (1 in a row)" in caplog.text


@given(st.lists(st.booleans(), max_size=12))
def test_the_guard_counts_skipped_steps_and_those_in_a_row(finite: list[bool]) -> None:
    guard = NonFiniteGuard(max_consecutive=100)
    for step, ok in enumerate(finite):
        assert guard.before_step(step, {"loss": torch.tensor(0.0 if ok else math.nan)}) is ok
    assert guard.skipped == finite.count(False)
    assert guard.consecutive == (len(finite) if True not in finite else finite[::-1].index(True))


@pytest.mark.parametrize("limit", [1, 3])
def test_the_guard_stops_after_too_many_in_a_row(limit: int) -> None:
    guard = NonFiniteGuard(limit)
    bad = {"gradient_norm": torch.tensor(math.inf)}
    for step in range(limit - 1):
        assert guard.before_step(step, bad) is False
    with pytest.raises(NonFiniteError, match=rf"gradient_norm on 1 rank\(s\); {limit} in a row.*learning rate"):
        guard.before_step(limit, bad)


def test_a_finite_step_starts_the_row_anew() -> None:
    guard = NonFiniteGuard(2)
    for value in (math.nan, 1.0, math.nan, 1.0):
        guard.before_step(0, {"loss": torch.tensor(value)})
    assert (guard.skipped, guard.consecutive) == (2, 0)


def test_the_guard_watches_what_is_there() -> None:
    assert NonFiniteGuard().before_step(0, {"loss": torch.tensor(1.0), "x_0": torch.tensor(math.nan)}) is True
    assert NonFiniteGuard().before_step(0, {"gradient_norm": torch.tensor(1.0)}) is True
    with pytest.raises(ValueError, match=r"needs one of the metrics \['loss', 'gradient_norm'\], got \['x_0'\]"):
        NonFiniteGuard().before_step(0, {"x_0": torch.tensor(1.0)})


def test_the_guard_refuses_a_limit_below_one() -> None:
    with pytest.raises(ValueError, match="max_consecutive must be at least 1, got 0"):
        NonFiniteGuard(0)


# --- CollapseMonitor


def watch(monitor: CollapseMonitor, stream: list[dict[str, Tensor]]) -> list[str]:
    """Feed metrics; returns the kinds found, in order."""
    for step, metrics in enumerate(stream):
        monitor.after_step(step, metrics)
    return [finding.kind for finding in monitor.findings]


def samples(count: int, **options: Any) -> list[dict[str, Tensor]]:
    return [{"x_0": clips(10 * step, **options)} for step in range(count)]


def ratios(*values: float) -> list[dict[str, Tensor]]:
    return [{"balance/gradient_ratio": torch.tensor(value)} for value in values]


def weights_of(*batches: Any) -> list[dict[str, Tensor]]:
    """The metrics of one step with all weights, or of a step for each list of weights."""
    rows = batches if isinstance(batches[0], list) else [list(batches)]
    return [{"regression/weights": torch.tensor(row)} for row in rows]


def prompt_monitor(**options: Any) -> CollapseMonitor:
    """Judges every step by itself."""
    return CollapseMonitor(REFERENCE, **{"every": 1, "grace": 0, "decay": 0.0, "window": 2} | LIMITS | options)


def test_statistics_are_the_variance_along_frames_and_the_spread_of_each_channel() -> None:
    x_BCFHW = torch.zeros(1, 2, 2, 1, 2)
    x_BCFHW[0, 0, :, 0, :] = torch.tensor([[1.0, 3.0], [-1.0, -3.0]])  # variances 1 and 9 along two frames
    x_BCFHW[0, 1] = torch.tensor([[4.0, -4.0]])  # stands still
    expected = LatentStatistics(temporal_variance=2.5, channel_std=(math.sqrt(5), 4.0))
    for measured in (LatentStatistics.measure(x_BCFHW), LatentStatistics.measure(x_BCFHW.transpose(1, 2), frame_dim=1)):
        assert measured.temporal_variance == pytest.approx(expected.temporal_variance)
        assert measured.channel_std == pytest.approx(expected.channel_std)


def test_statistics_can_be_measured_on_samples_with_gradient() -> None:
    assert LatentStatistics.measure(clips(1000, shape=(64, 3, 4, 2, 2)).requires_grad_()) == REFERENCE


def test_a_healthy_stream_has_no_findings() -> None:
    monitor = prompt_monitor(regression_weight=2.0, decay=0.8)
    healthy = {"regression/weights": torch.tensor([1.0, 0.8]), "balance/gradient_ratio": torch.tensor(0.4)}
    # 8 clips a batch, so that chance alone crosses no limit.
    assert watch(monitor, [x | healthy for x in samples(40, shape=(8, 3, 4, 2, 2))]) == []
    signals = monitor.signals()
    assert signals["variance"] == pytest.approx(1, abs=0.2)
    assert signals["saturation"] == pytest.approx(1, abs=0.1)
    assert signals["weight"] == pytest.approx(0.45)
    assert signals["gradient_ratio"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        (["frozen"], {"motion": 0.3, "spread": 1.1}),
        (["jitter", "oversaturated"], {"motion": 2.5}),
        (["oversaturated"], {"spread": 1.4}),
        (["washed_out"], {"spread": 0.75}),
        (["frozen", "washed_out"], {"spread": 0.3}),
    ],
)
def test_a_failing_stream_is_named(kinds: list[str], options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    monitor = CollapseMonitor(REFERENCE, grace=0, **LIMITS)
    assert watch(monitor, samples(20, **options, shape=(16, 3, 4, 2, 2))) == kinds
    for finding, record in zip(monitor.findings, caplog.records, strict=True):
        assert finding.step == 9  # the first look: every tenth step, counted from zero
        assert (finding.value > finding.limit) == (finding.kind in ("jitter", "oversaturated"))
        assert (record.message, record.levelno) == (finding.message, logging.WARNING)
        assert finding.message.startswith("Step 9: the samples")
        assert f"limit {finding.limit:g}" in finding.message


def test_each_channel_is_compared_with_its_own() -> None:
    # The same spread overall, in the wrong channels: a mean of ratios, not a ratio of means.
    reference = LatentStatistics(1.0, (0.1, 1.0))
    x_0 = clips(0, shape=(64, 2, 4, 4, 4))
    x_0 = x_0 / x_0.transpose(0, 1).flatten(1).std(1).view(1, 2, 1, 1, 1)
    monitor = CollapseMonitor(reference, every=1, grace=0)
    watch(monitor, [{"x_0": x_0 * torch.tensor([1.0, 0.1]).view(1, 2, 1, 1, 1)}])
    assert monitor.signals()["saturation"] == pytest.approx((10 + 0.1) / 2, rel=1e-2)


@pytest.mark.parametrize("small", [1e-6, 0.0])
def test_a_channel_that_holds_next_to_nothing_does_not_drown_the_others(small: float) -> None:
    # Grey clips leave a colour channel at 1e-6 of the others, or at 0; a rounding error is no oversaturation.
    reference = LatentStatistics(1.0, (small, 1.0))
    x_0 = clips(0, shape=(64, 2, 4, 4, 4))
    x_0 = x_0 / x_0.transpose(0, 1).flatten(1).std(1).view(1, 2, 1, 1, 1)
    monitor = CollapseMonitor(reference, every=1, grace=0)
    watch(monitor, [{"x_0": x_0 * torch.tensor([1e-3, 1.0]).view(1, 2, 1, 1, 1)}])
    assert monitor.signals()["saturation"] == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("small", [0.0, 1e-6, 0.009, 0.011])
def test_the_reference_clips_themselves_are_neither_washed_out_nor_oversaturated(small: float) -> None:
    x_0 = clips(0, shape=(16, 4, 4, 4, 4)) * torch.tensor([1.0, small, small, small]).view(1, 4, 1, 1, 1)
    monitor = CollapseMonitor(LatentStatistics.measure(x_0), every=1, grace=0)
    assert watch(monitor, [{"x_0": x_0}]) == []
    assert monitor.signals()["saturation"] == pytest.approx(1)


def test_the_gradient_ratio_counts_as_it_is_after_scaling() -> None:
    held = {"balance/gradient_ratio": torch.tensor(8.0), "balance/scale": torch.tensor(0.1)}
    monitor = prompt_monitor()
    assert watch(monitor, [held]) == []
    assert monitor.signals()["gradient_ratio"] == pytest.approx(0.8)
    assert watch(prompt_monitor(), [{**held, "balance/scale": torch.tensor(0.2)}]) == ["regression_dominates"]


def test_the_regressions_signals_are_judged() -> None:
    weights = {"regression/weights": torch.tensor([0.01, 0.1])}  # of at most 2
    assert watch(prompt_monitor(regression_weight=2.0), [weights]) == ["regression_silent"]
    equal = {"regression/weights": torch.tensor([0.01, 0.01])}  # silent, which says all
    assert watch(prompt_monitor(regression_weight=2.0), [equal]) == ["regression_silent"]
    on = {"regression/weights": torch.tensor([1.9, 1.9])}  # in the outer tenth, yet equal
    assert watch(prompt_monitor(regression_weight=2.0), [on]) == ["weights_constant"]
    assert watch(prompt_monitor(regression_weight=0.5), [weights]) == []
    assert watch(prompt_monitor(regression_weight=None), [weights]) == []
    assert watch(prompt_monitor(), ratios(1.5)) == ["regression_dominates"]
    assert watch(prompt_monitor(), ratios(0.9)) == []


@pytest.mark.parametrize(
    ("options", "stream", "kinds"),
    [
        ({"variance_range": (0.01, 3.0)}, samples(1, motion=0.3, spread=1.1), []),
        ({"variance_range": (0.5, 20.0)}, samples(1, motion=2.5), ["oversaturated"]),
        ({"variance_range": (5.0, 9.0), "saturation_range": (0.1, 9.0)}, samples(1), ["frozen"]),
        ({"saturation_range": (0.1, 9.0)}, samples(1, spread=1.4), []),
        (
            {"min_weight": 0.6, "regression_weight": 1.0},
            weights_of(0.4, 0.6),
            ["regression_silent"],
        ),
        ({"max_switched": 0.4, "regression_weight": 1.0}, weights_of(0.5, 0.95), ["weights_switch"]),
        ({"max_switched": 0.9, "min_weight": 0.0, "regression_weight": 2.0}, weights_of(0.1, 1.0), []),
        ({"min_weight_spread": 0.2, "regression_weight": 1.0}, weights_of(0.4, 0.6), ["weights_constant"]),
        ({"max_gradient_ratio": 3.0}, ratios(2.0), []),
    ],
)
def test_the_limits_can_be_set(options: dict[str, Any], stream: list[dict[str, Tensor]], kinds: list[str]) -> None:
    assert watch(prompt_monitor(**options), stream) == kinds


def test_a_finding_is_said_once_and_again_only_after_a_recovery() -> None:
    monitor = prompt_monitor()
    watch(monitor, ratios(0.5, 2.0, 2.0, 3.0, 0.5, 0.5, 2.0, 2.0))
    assert [finding.step for finding in monitor.findings] == [1, 6]


@given(st.lists(st.floats(0, 3, width=32), min_size=1, max_size=8), st.sampled_from([0.0, 0.5, 0.8]))
def test_signals_are_smoothed(values: list[float], decay: float) -> None:
    monitor = prompt_monitor(decay=decay)
    smoothed = None
    for step, value in enumerate(values):
        monitor.after_step(step, ratios(value)[0])
        smoothed = value if smoothed is None else decay * smoothed + (1 - decay) * value
        assert monitor.signals()["gradient_ratio"] == pytest.approx(smoothed, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("every", [1, 4])
@given(st.lists(st.floats(0, 3, width=32), min_size=1, max_size=6))
def test_the_smoothing_is_over_steps_also_where_a_signal_is_not_shown(every: int, values: list[float]) -> None:
    monitor = prompt_monitor(decay=0.9)
    smoothed = values[0]
    for step, value in enumerate(values):
        monitor.after_step(every * step, ratios(value)[0])
        for rest in range(1, every):
            monitor.after_step(every * step + rest, {})
        smoothed = smoothed if step == 0 else 0.9**every * smoothed + (1 - 0.9**every) * value
        assert monitor.signals()["gradient_ratio"] == pytest.approx(smoothed, rel=1e-5, abs=1e-6)


def test_a_restart_does_not_forget_how_long_a_signal_was_not_shown() -> None:
    whole, restarted = prompt_monitor(decay=0.9), prompt_monitor(decay=0.9)
    watch(whole, [*ratios(1.0), {}, {}])
    restarted.load_state_dict(whole.state_dict())
    for monitor in (whole, restarted):
        watch(monitor, ratios(2.0))
    assert restarted.signals() == whole.signals()
    assert whole.signals()["gradient_ratio"] == pytest.approx(2 - 0.9**3)


def normal_losses_weights(spread: float, count: int) -> Tensor:
    """Weights of the paper's sharpness, at most 2, for losses that scatter by ``spread``."""
    return 2 * torch.sigmoid(-3 * spread * randn(0, count).float())


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    ("spread", "kinds"),
    [(0.3, []), (1.5, ["weights_switch"]), (0.02, []), (0.005, ["weights_constant"]), (0.0, ["weights_constant"])],
)
def test_weights_that_are_a_switch_or_a_constant_are_named(spread: float, kinds: list[str], batch: int) -> None:
    monitor = CollapseMonitor(REFERENCE, regression_weight=2.0, grace=0)
    weights = normal_losses_weights(spread, 200)
    stream = [{"regression/weights": part} for part in weights.split(batch)]
    assert watch(monitor, stream[:-1]) == []  # not yet as many as the window takes
    assert watch(monitor, stream[-1:] * 10) == kinds
    for finding in monitor.findings:
        assert (
            'deviation="standardized" with a sharpness of 3, or the sharpness to 3 * 0.3 / the spread'
            in finding.message
        )
        assert (finding.value > finding.limit) == (kinds == ["weights_switch"])
        assert ("right where losses fall into two groups" in finding.message) == (kinds == ["weights_switch"])


@pytest.mark.parametrize("at_each", [25, 50, 500])
@pytest.mark.parametrize(
    ("spreads", "kinds"),
    [
        ((0.3, 0.3, 0.3, 0.3), []),
        ((1.4, 1.4, 0.3, 0.3), ["weights_switch"]),  # 0.27 of all weights are in the outer tenths
        ((0.3, 0.3, 0.3, 0.005), ["weights_constant"]),
        ((1.4, 0.3, 0.3, 0.005), ["weights_switch", "weights_constant"]),
    ],
)
def test_each_few_step_is_judged_by_itself(spreads: tuple[float, ...], kinds: list[str], at_each: int) -> None:
    monitor = prompt_monitor(regression_weight=2.0, window=4 * at_each)
    weights = torch.stack([normal_losses_weights(spread, at_each) for spread in spreads], 1)
    timesteps = torch.tensor([1000, 900, 757, 522])
    stream = [{"regression/weights": row, "regression/timesteps": timesteps} for row in weights]
    restarted = prompt_monitor(regression_weight=2.0, window=4 * at_each)
    watch(monitor, stream[:-1])
    restarted.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    for each in (monitor, restarted):
        assert watch(each, stream[-1:]) == kinds


def test_a_few_step_of_few_clips_is_not_judged_by_itself() -> None:
    at_rare = [{"regression/weights": torch.tensor([1.0]), "regression/timesteps": torch.tensor([522])}] * 10
    stream = [
        {"regression/weights": part, "regression/timesteps": torch.tensor([900])}
        for part in normal_losses_weights(0.3, 50).split(1)
    ]
    assert watch(prompt_monitor(regression_weight=2.0, window=60), at_rare + stream) == []


def test_weights_at_drawn_times_are_judged_together() -> None:
    stream = [{"regression/weights": normal_losses_weights(1.4, 50), "regression/timesteps": torch.linspace(0, 1, 50)}]
    assert watch(prompt_monitor(regression_weight=2.0, window=50), stream) == ["weights_switch"]


def test_the_averages_of_batches_hide_what_the_weights_of_clips_show() -> None:
    on_and_off = [0.0, 2.0, 0.01, 1.99]
    monitor = prompt_monitor(regression_weight=2.0, window=8)
    assert watch(monitor, weights_of(on_and_off, on_and_off)) == ["weights_switch"]
    assert monitor.signals()["weight"] == pytest.approx(0.5)


@given(st.lists(st.lists(st.floats(0.1, 1.9), min_size=1, max_size=5), min_size=1, max_size=6))
def test_the_window_holds_the_last_weights(batches: list[list[float]]) -> None:
    monitor = prompt_monitor(regression_weight=2.0, window=4)
    watch(monitor, weights_of(*batches))
    last = torch.tensor([weight / 2 for batch in batches for weight in batch][-4:])
    if len(last) < 4:
        assert "weight" not in monitor.signals()
    else:
        assert monitor.signals()["weight"] == pytest.approx(last.mean().item(), rel=1e-5)
        if last.mean() < 0.05:
            assert "switched" not in monitor.signals()
            return
        assert monitor.signals()["weight_spread"] == pytest.approx(last.std(correction=0).item(), rel=1e-3, abs=1e-6)
        switched = ((last < 0.1) | (last > 0.9)).float().mean().item()
        assert monitor.signals()["switched"] == (switched if last.std(correction=0) >= 0.02 else 0)


def test_a_weight_that_is_not_finite_is_left_out() -> None:
    monitor = prompt_monitor(regression_weight=1.0, window=4)
    watch(monitor, weights_of(0.2, math.nan, 0.6, 0.4))
    assert monitor.signals()["weight"] == pytest.approx(0.4)


def test_a_state_from_before_weights_were_kept_loads() -> None:
    old = {"signals": {"gradient_ratio": 2.0, "weight": 0.4}, "active": [], "steps": 7, "findings": []}
    monitor = prompt_monitor(decay=0.5, regression_weight=2.0, window=2)
    monitor.load_state_dict(old)
    assert monitor.signals() == {"gradient_ratio": 2.0}
    monitor.after_step(7, ratios(1.0)[0] | weights_of(0.5, 1.0)[0])
    assert monitor.signals()["gradient_ratio"] == 1.5
    assert monitor.signals()["weight"] == pytest.approx(0.375)


def test_one_outlier_is_no_finding() -> None:
    assert watch(prompt_monitor(decay=0.8), ratios(*[0.5] * 5, 2.9, *[0.5] * 5)) == []
    assert watch(prompt_monitor(decay=0.8), ratios(*[0.5] * 5, *[2.9] * 5)) == ["regression_dominates"]


# --- CollapseMonitor: the discriminator


def ranks(*values: float) -> list[dict[str, Tensor]]:
    return [{"discriminator/ranked": torch.tensor(value)} for value in values]


def hinge_losses(*values: float) -> list[dict[str, Tensor]]:
    return [{"discriminator/hinge_loss": torch.tensor(value)} for value in values]


# The steps at the start that are not judged.
HEALTHY = [a | b for a, b in zip(ranks(*[0.8] * 4), hinge_losses(*[1.0] * 4), strict=True)]


@pytest.mark.parametrize(
    ("stream", "kinds"),
    [
        (ranks(*[0.52] * 5), ["discriminator_blind"]),
        (ranks(*[0.3] * 5), ["discriminator_blind"]),  # wrong on average is blind, too
        (ranks(*[0.52] * 4), []),
        (ranks(*[0.56] * 9), []),
        (ranks(0.5, 0.5, 0.5, 0.6, 0.5, 0.5, 0.5, 0.5), []),  # never five looks in a row
        (ranks(0.5, 0.5, 0.52, *[0.8] * 9), []),  # learns
        (ranks(*[0.8] * 9, *[0.5] * 5), ["discriminator_blind"]),  # forgets
        (ranks(*[0.5] * 9, 0.8, *[0.5] * 5), ["discriminator_blind"] * 2),  # recovers in between
        (ranks(*[1.0] * 9), []),  # always right alone is no victory
        (hinge_losses(*[0.04] * 5), ["discriminator_won"]),
        (hinge_losses(*[0.04] * 4), []),
        (hinge_losses(2.0, 2.0, *[0.06] * 9), []),
        ([*ranks(1.0), *hinge_losses(*[0.0] * 5)], ["discriminator_won"]),
    ],
)
def test_what_lasts_is_said_of_the_discriminator(stream: list[dict[str, Tensor]], kinds: list[str]) -> None:
    monitor = prompt_monitor()
    assert watch(monitor, HEALTHY + stream) == kinds
    for finding in monitor.findings:
        assert "the discriminator" in finding.message
        assert finding.message.endswith(f"limit {finding.limit:g}, for 4 steps).")


def test_the_discriminators_limits_and_the_patience_can_be_set() -> None:
    assert watch(prompt_monitor(min_ranked=0.51), ranks(*[0.52] * 9)) == []
    assert watch(prompt_monitor(min_hinge_loss=0.01), hinge_losses(*[0.04] * 9)) == []
    assert watch(prompt_monitor(patience=0), ranks(0.52)) == ["discriminator_blind"]
    assert watch(prompt_monitor(patience=10), ranks(*[0.52] * 20)) == []
    assert watch(prompt_monitor(patience=10), ranks(*[0.52] * 21)) == ["discriminator_blind"]


def test_a_discriminator_has_its_patience_to_learn_before_it_is_judged() -> None:
    assert watch(prompt_monitor(), ranks(*[0.5] * 8)) == []
    assert watch(prompt_monitor(), ranks(*[0.5] * 9)) == ["discriminator_blind"]
    assert watch(prompt_monitor(grace=7), ranks(*[0.5] * 11)) == []  # nothing is judged before
    assert watch(prompt_monitor(grace=7), ranks(*[0.5] * 12)) == ["discriminator_blind"]


def noisy_gaps(seed: int, steps: int, gap: float, batch: int, opening: int) -> list[dict[str, Tensor]]:
    """A discriminator that starts blind, and opens a gap within some steps; its logits spread by 0.2."""
    clip_logits, sample_logits = randn(seed, steps, batch), randn(seed + 1000, steps, batch)
    opened = (torch.arange(steps) / opening).clamp(max=1) * gap
    return [of_logits(0.2 * (c + g), 0.2 * s) for c, g, s in zip(clip_logits, opened, sample_logits, strict=True)]


@pytest.mark.parametrize("batch", [8, 1])
def test_by_default_a_gap_that_opens_slowly_is_no_finding_in_noise_and_one_that_stays_closed_is(batch: int) -> None:
    before = samples(1) * 110  # an adversarial phase that begins late in a run
    opens, stays = [], []
    for seed in range(10):
        for gap, found in ((1.0, opens), (0.0, stays)):
            monitor = CollapseMonitor(REFERENCE)
            found.append("discriminator_blind" in watch(monitor, before + noisy_gaps(seed, 1000, gap, batch, 400)))
    assert not any(opens)
    assert sum(stays) >= 5


@pytest.mark.parametrize(("gap", "kinds"), [(0.05, []), (0.0, ["discriminator_blind"])])
def test_logits_that_wander_together_do_not_hide_what_is_told_apart(gap: float, kinds: list[str]) -> None:
    """They differ by far more from step to step, and from one caption and timestep to another, than the sides do."""
    offset, own, noise = randn(1, 600, 1), randn(2, 600, 8), 0.02 * randn(3, 2, 600, 8)
    clip_logits, sample_logits = 3 + offset + own + noise
    stream = [of_logits(clip + gap, sample) for clip, sample in zip(clip_logits, sample_logits, strict=True)]
    assert set(watch(CollapseMonitor(REFERENCE, grace=0), stream)) == set(kinds)


def test_micro_batches_are_judged_as_the_batch_they_make() -> None:
    """Metrics of micro-batches are averaged before a callback sees them."""
    clip_logits, sample_logits = randn(1, 9, 8) + 3.3, randn(2, 9, 8) + 3.0
    whole, parts = prompt_monitor(decay=0.5), prompt_monitor(decay=0.5)
    for step, (clip, sample) in enumerate(zip(clip_logits, sample_logits, strict=True), 1):
        whole.after_step(step, of_logits(clip, sample))
        singles = [of_logits(c, s) for c, s in zip(clip.split(1), sample.split(1), strict=True)]
        parts.after_step(step, {name: torch.stack([one[name] for one in singles]).mean() for name in singles[0]})
    assert parts.signals()["ranked"] == pytest.approx(whole.signals()["ranked"], rel=1e-4)


def test_the_grace_of_a_signal_begins_when_it_is_first_shown() -> None:
    monitor = prompt_monitor(grace=3, patience=1)
    watch(monitor, [*ratios(*[0.5] * 5), *[a | b for a, b in zip(ratios(*[2.0] * 4), ranks(*[0.5] * 4), strict=True)]])
    assert [(f.step, f.kind) for f in monitor.findings] == [(5, "regression_dominates"), (7, "discriminator_blind")]


def test_a_restart_does_not_forget_how_long_a_gap_was_closed() -> None:
    monitor, restarted = prompt_monitor(), prompt_monitor()
    watch(monitor, ranks(*[0.5] * 7))
    restarted.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    for step in (8, 9):
        restarted.after_step(step, ranks(0.5)[0])
    assert [(finding.kind, finding.step) for finding in restarted.findings] == [("discriminator_blind", 9)]


def test_samples_count_as_judged_from_the_first_look_beyond_their_grace() -> None:
    monitor, judged = prompt_monitor(every=3, grace=4), []
    for step in range(12):
        samples = {"x_0": clips(0, shape=(2, 3, 4, 2, 2))} if step >= 3 else {}
        monitor.after_step(step, samples)
        judged.append(monitor.samples_judged)
    assert judged == [False] * 8 + [True] * 4  # the look at the ninth step, the sixth with samples
    later = prompt_monitor(every=3, grace=4)
    assert not later.samples_judged
    later.load_state_dict(monitor.state_dict())
    assert later.samples_judged


def test_looks_are_every_so_many_steps_and_not_before_the_grace_ends() -> None:
    monitor = prompt_monitor(every=3, grace=6)
    watch(monitor, ratios(*[2.0] * 6))
    assert not monitor.findings
    watch(monitor, ratios(*[2.0] * 2))
    assert not monitor.findings
    monitor.after_step(8, ratios(2.0)[0])
    assert [finding.step for finding in monitor.findings] == [8]


def test_by_default_the_first_hundred_steps_are_not_judged() -> None:
    # A few-step student starts out blurred and still: that is no news.
    monitor = CollapseMonitor(REFERENCE)
    watch(monitor, samples(100, motion=0.3))
    assert not monitor.findings
    watch(monitor, samples(10, motion=0.3))
    assert monitor.findings


def test_the_other_layout_of_frames() -> None:
    stream = [{"x_0": x["x_0"].transpose(1, 2)} for x in samples(1, spread=2.5)]
    assert watch(prompt_monitor(frame_dim=1), stream) == ["jitter", "oversaturated"]


def test_samples_in_bfloat16_are_measured_in_float32() -> None:
    full, half = prompt_monitor(), prompt_monitor()
    for monitor, dtype in ((full, torch.float32), (half, torch.bfloat16)):
        x_0 = (100 + clips(0, shape=(8, 3, 4, 2, 2))).bfloat16()
        watch(monitor, [{"x_0": x_0.to(dtype)}])
    assert half.signals() == full.signals()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_sample_does_not_blind_the_monitor(bad: float) -> None:
    x_0 = clips(0)
    x_0[0, 0, 0, 0, 0] = bad
    first, later, clean = (prompt_monitor(decay=0.8) for _ in range(3))
    assert "jitter" in watch(first, [{"x_0": x_0}, *samples(20, spread=2.5)])
    # Later on it is left out: the signals stay where they were.
    watch(clean, samples(3))
    watch(later, [*samples(2), {"x_0": x_0}, *samples(3)[2:]])
    assert later.signals() == clean.signals()


def test_the_monitor_lets_every_step_pass() -> None:
    monitor = prompt_monitor()
    watch(monitor, ratios(9.0))
    assert monitor.before_step(1, ratios(9.0)[0]) is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"grace": -1}, "grace must be at least 0"),
        ({"decay": 1.0}, "decay must be a finite number at least 0 and below 1"),
        ({"window": 1}, "window must be at least 2"),
        ({"patience": -1}, "patience must be at least 0"),
        ({"min_ranked": math.nan}, "min_ranked must be a finite number at least 0 and below 1"),
        ({"min_hinge_loss": -1.0}, "min_hinge_loss must be a finite number at least 0"),
        ({"variance_range": (2.0, 1.0)}, "variance_range must be"),
        ({"saturation_range": (0.0, 1.0)}, "saturation_range must be"),
    ],
)
def test_the_monitor_refuses_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CollapseMonitor(REFERENCE, **options)


@pytest.mark.parametrize("reference", [LatentStatistics(0.0, (1.0,)), LatentStatistics(1.0, (0.0, 0.0))])
def test_the_monitor_refuses_a_reference_that_does_not_move(reference: LatentStatistics) -> None:
    with pytest.raises(ValueError, match="Measure clips that move"):
        CollapseMonitor(reference)


@pytest.mark.parametrize(
    ("x_0", "message"),
    [
        (torch.ones(1, 4, 3, 2, 2), "has 4 channels, the reference has 3"),
        (torch.ones(3, 4, 2, 2), r"must be \[B, C, F, H, W\]"),
        (torch.ones(1, 3, 1, 2, 2), "at least 2 frames"),
    ],
)
def test_the_monitor_refuses_samples_of_another_kind(x_0: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_monitor().after_step(0, {"x_0": x_0})
