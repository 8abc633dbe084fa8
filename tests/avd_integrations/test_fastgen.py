"""What of FastGen's adapter runs without FastGen; the rest is in tests/hosts."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import avd_integrations.fastgen as adapter
from avd_core import MotionConfig, RegressionConfig
from avd_integrations._host import Host

T_LIST = [0.999, 0.937, 0.833, 0.624, 0.0]


class Schedule:
    t_precision, max_t = torch.float64, 0.999

    def alpha(self, t: Tensor) -> Tensor:
        assert ((t >= 0) & (t <= 0.999)).all(), t  # as FastGen's: in float64, for which float32's 0.999 is too large
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def get_t_list(self, sample_steps: int, device: torch.device) -> Tensor:
        return torch.linspace(self.max_t, 0, sample_steps + 1, device=device, dtype=self.t_precision)


class Net(nn.Conv3d):
    net_pred_type = "flow"

    def __init__(self) -> None:
        super().__init__(4, 4, 1)
        self.noise_scheduler, self.seen = Schedule(), []

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Tensor | None = None, fwd_pred_type: str | None = None
    ) -> Tensor:
        self.seen.append((t, fwd_pred_type, torch.is_autocast_enabled("cpu")))
        self.noise_scheduler.alpha(t)
        return super().forward(x_t)


class Model:
    device, input_shape = torch.device("cpu"), [4, 5, 2, 2]

    def __init__(self) -> None:
        self.net = Net()
        self.net_optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.config = SimpleNamespace(student_sample_steps=4, sample_t_cfg=SimpleNamespace(t_list=T_LIST))

    def get_optimizers(self, iteration: int) -> list[Any]:
        return [self.net_optimizer if iteration % 2 == 0 else object()]

    def _prepare_training_data(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor, None]:
        return data["real"], data["condition"], None

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def without_fastgen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks on stand-ins for what they take from FastGen."""
    stand_in = SimpleNamespace(RFNoiseSchedule=Schedule)
    monkeypatch.setattr(Host, "load", lambda *_: stand_in)


def hooks(
    regression: Any = adapter.callback._PAPER, motion: Any = adapter.callback._PAPER, rounds: int = 1
) -> adapter.AVDHooks:
    callback = adapter.AVDHooks(regression, motion)
    callback.config = SimpleNamespace(trainer=SimpleNamespace(grad_accum_rounds=rounds))
    return callback


def batch() -> dict[str, Tensor]:
    return {"real": torch.randn(3, 4, 5, 2, 2), "condition": torch.zeros(3)}


def backward(callback: adapter.AVDHooks, model: Model, iteration: int, samples: Any = None) -> dict[str, Tensor]:
    samples = torch.randn(3, 4, 5, 2, 2, requires_grad=True) if samples is None else samples
    losses = {"total_loss": torch.tensor(1.0, requires_grad=True)}
    callback.on_backward_begin(model, batch(), {"gen_rand_train": samples}, losses, iteration, 0)
    return losses


def test_a_missing_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastgen", None)
    for name in [name for name in sys.modules if name.startswith("fastgen.")]:
        monkeypatch.delitem(sys.modules, name)
    adapter.callback._callback_class.cache_clear()
    for call in (
        adapter.avd_callback,
        lambda: adapter.half_rate(object),
        lambda: adapter.fastgen_terms(Model(), None, None),
    ):
        with pytest.raises(ImportError, match=r"FastGen is needed here.*NVlabs/FastGen 34f30e8"):
            call()


@pytest.mark.parametrize(
    ("regression", "motion", "message"),
    [
        (None, None, "nothing would be added"),
        ({"wait": 2.0}, None, "wait"),
        ({"weight": -1}, None, "weight"),
        ({}, {"floor": float("nan")}, "floor"),
        ({"auto_update": False}, None, "follows FastGen's trainer.grad_accum_rounds"),
    ],
)
def test_wrong_options_are_refused(
    regression: dict[str, Any] | None, motion: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        adapter.AVDHooks(regression, motion)


def test_nothing_happens_before_there_is_a_model() -> None:
    for call in (hooks().state_dict, lambda: hooks().load_state_dict({})):
        with pytest.raises(RuntimeError, match="knows no model yet"):
            call()


@pytest.mark.usefixtures("without_fastgen")
def test_the_student_alone_gets_the_terms() -> None:
    callback, model = hooks(), Model()
    callback.on_load_checkpoint_start(model)
    assert set(backward(callback, model, 1)) == {"total_loss"}
    assert not model.net.seen
    losses = backward(callback, model, 2)
    added = losses["avd/regression/loss"] + losses["avd/motion/loss"]
    torch.testing.assert_close(losses["total_loss"] - 1, added, atol=1e-5, rtol=1e-5)
    losses["total_loss"].backward()
    assert model.net.weight.grad.abs().sum() > 0
    ((times, asked, autocast),) = model.net.seen
    assert times.dtype == torch.float64
    assert set(times.tolist()) <= set(T_LIST)
    assert asked == "flow"
    assert autocast


@pytest.mark.usefixtures("without_fastgen")
def test_the_cache_moves_once_per_optimizer_step_and_is_the_state() -> None:
    callback, model = hooks(rounds=2), Model()
    callback.on_load_checkpoint_start(model)
    cache = callback.terms.objective.regression.cache
    for _ in range(2):
        backward(callback, model, 2)
        assert not cache.seen.any()
    callback.on_optimizer_step_begin(model, 3)
    assert not cache.seen.any()
    callback.on_optimizer_step_begin(model, 2)
    assert cache.seen.any()
    other = hooks(rounds=2)
    other.on_load_checkpoint_start(model)
    other.load_state_dict(callback.state_dict())
    other.on_load_checkpoint_end(model, 2)
    torch.testing.assert_close(other.terms.objective.regression.cache.means, cache.means)


@pytest.mark.usefixtures("without_fastgen")
def test_images_have_no_motion() -> None:
    for shape in ([4, 2, 2], [4, 1, 2, 2]):
        model = Model()
        model.input_shape = shape
        with pytest.raises(ValueError, match="Pass motion=None to avd_callback"):
            hooks().on_load_checkpoint_start(model)
        hooks(motion=None).on_load_checkpoint_start(model)


@pytest.mark.usefixtures("without_fastgen")
def test_a_sample_without_gradient_is_refused_before_anything_is_recorded() -> None:
    callback, model = hooks(), Model()
    callback.on_load_checkpoint_start(model)
    for samples in (torch.randn(3, 4, 5, 2, 2), lambda: None):
        with pytest.raises(RuntimeError, match="Model puts no generated sample with gradient"):
            backward(callback, model, 2, samples)
    assert not callback.terms.objective.regression.cache.seen.any()


@pytest.mark.usefixtures("without_fastgen")
def test_few_steps() -> None:
    model = Model()
    assert adapter.few_steps(model).tolist() == T_LIST[:-1]
    model.config.sample_t_cfg.t_list = None
    model.config.student_sample_steps = 2
    assert adapter.few_steps(model).tolist() == pytest.approx([0.999, 0.4995])
    model.config.student_sample_steps = 1
    assert adapter.few_steps(model).tolist() == [0.999]


@pytest.mark.usefixtures("without_fastgen")
@pytest.mark.parametrize(
    ("asked", "path", "expected"),
    [
        ("flow", Schedule(), ("flow", "velocity")),
        ("flow", object(), ("x0", "x_0")),
        ("x0", object(), ("x0", "x_0")),
        ("eps", object(), ("eps", "noise")),
        ("v", object(), ("v", "v")),
    ],
)
def test_predictions_have_our_names(asked: str, path: object, expected: tuple[str, str]) -> None:
    assert adapter.terms._prediction_of(SimpleNamespace(net_pred_type=asked, noise_scheduler=path)) == expected


@pytest.mark.usefixtures("without_fastgen")
def test_a_new_prediction_is_refused() -> None:
    with pytest.raises(RuntimeError, match="predicts 'score'"):
        adapter.terms._prediction_of(SimpleNamespace(net_pred_type="score", noise_scheduler=Schedule()))


@pytest.mark.usefixtures("without_fastgen")
def test_terms_without_motion_and_without_regression() -> None:
    model = Model()
    terms = adapter.fastgen_terms(model, RegressionConfig(), None)
    assert terms.objective.motion is None
    assert terms((model, batch())).loss.isfinite()
    terms = adapter.fastgen_terms(model, None, MotionConfig(floor=0.8))
    assert terms.objective.motion.floor == 0.8
    assert terms((model, batch()), torch.randn(3, 4, 5, 2, 2, requires_grad=True)).loss.isfinite()
    with pytest.raises(ValueError, match="update_first"):
        adapter.fastgen_terms(model, RegressionConfig(order="update_first"), None, grad_accum_rounds=2)
