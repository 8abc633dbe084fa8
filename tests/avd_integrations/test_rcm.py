"""What of rCM's adapter needs no rCM. rCM itself: tests/hosts."""

import dataclasses
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from avd_core import AVDConfig
from avd_integrations import rcm, trigflow
from references import ReferenceCache

SHAPE = (2, 3, 5, 4, 4)
CLIPS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def configuration(**changes: Any) -> types.SimpleNamespace:
    options = {
        "net_fake_score": {"_target_": "Wan"},
        "loss_scale_dmd": 1.0,
        "sigma_max": 80,
        "backward_timesteps": [1.5, 1.4, 1.0],
        "tangent_warmup": 1,
    }
    return types.SimpleNamespace(**{**options, **changes})


@dataclasses.dataclass
class DenoisePrediction:
    x0: torch.Tensor
    F: torch.Tensor = None


def host_class() -> type[nn.Module]:
    class T2VDistillModel_rCM(nn.Module):  # noqa: N801
        def __init__(self, config: types.SimpleNamespace) -> None:
            super().__init__()
            self.config, self.net = config, nn.Conv3d(3, 3, 1)
            self.closures = ["dmd"]

        def sync(self, *args: Tensor) -> tuple[Tensor, ...]:
            return args

        def is_student_phase(self, iteration: int) -> bool:
            return iteration < 1 or iteration % 2 == 1

        def _make_training_ctx(
            self, x0_B_C_T_H_W: Tensor, condition: Any, uncondition: Any, iteration: int
        ) -> tuple[Tensor, Any, Any]:
            return x0_B_C_T_H_W, condition, uncondition

        def denoise(
            self, xt_B_C_T_H_W: Tensor, time: Tensor, condition: Any, net_type: str = "teacher"
        ) -> DenoisePrediction:
            output = self.net(xt_B_C_T_H_W).double()
            return DenoisePrediction(x0=output, F=output)

        def backward_simulation(
            self, condition: Any, x_B_C_T_H_W_size: torch.Size, n_steps: int, with_grad: bool = False
        ) -> tuple[Tensor, None]:
            return self.net(torch.ones(x_B_C_T_H_W_size) * torch.arange(5).view(5, 1, 1)), None

        def _student_dmd_step(self, ctx: tuple[Tensor, None, None], iteration: int) -> tuple[dict[str, Tensor], Tensor]:
            video, _ = self.backward_simulation(ctx[1], ctx[0].shape, 2, with_grad=True)
            return {"G_x0": video.detach()}, 0 * video.sum(dim=(1, 2, 3, 4))

        def training_step_closures(
            self, data_batch: Tensor, iteration: int
        ) -> Iterator[tuple[str, Callable[..., Any] | None, bool]]:
            ctx = self._make_training_ctx(data_batch, None, None, iteration)
            if not self.is_student_phase(iteration):
                yield "critic", None, True
                return
            yield "scm", None, iteration < 1
            if iteration >= 1:
                for name in self.closures:
                    yield name, lambda: self._student_dmd_step(ctx, iteration), True

        def on_before_zero_grad(self, optimizer: Any, scheduler: Any, iteration: int) -> None:
            pass

        def state_dict(self) -> dict[str, Tensor]:
            return self.net.state_dict(prefix="net.")

        def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> None:
            assert all(name.startswith("net.") for name in state_dict), "unknown keys"

    return T2VDistillModel_rCM


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class in the place of the host's."""
    module = types.ModuleType("rcm.models.t2v_model_distill_rcm")
    module.T2VDistillModel_rCM, module.DenoisePrediction = host_class(), DenoisePrediction
    for name in ("rcm", "rcm.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def take(model: Any, iteration: int) -> tuple[list[str], dict[str, Any]]:
    """One iteration: the names of its closures, and the losses and logs of those that are run."""
    names, results = [], {}
    for name, closure, _ in model.training_step_closures(CLIPS, iteration):
        names.append(name)
        if closure is not None:
            results[name] = closure()
    return names, results


def test_a_missing_host_is_named() -> None:
    with pytest.raises(ImportError, match=r"rCM is needed here.*github\.com/NVlabs/rcm.*rcm 5b41aa9"):
        rcm.avd_model(configuration())


def step(model: Any, iteration: int, batches: int = 1) -> list[dict[str, Any]]:
    """One optimizer step as the host's trainer takes it."""
    results = [take(model, iteration)[1] for _ in range(batches)]
    model.on_before_zero_grad(None, None, iteration)
    return results


@pytest.mark.parametrize("gone", sorted(rcm._USED))
def test_a_moved_version_is_refused_by_name(host: Any, gone: str) -> None:
    host.T2VDistillModel_rCM = type(
        "T2VDistillModel_rCM", (), {n: getattr(host_class(), n) for n in {*rcm._USED} - {gone}}
    )
    with pytest.raises(RuntimeError, match=rf"has no T2VDistillModel_rCM.{gone}: not the rCM .*rcm 5b41aa9"):
        rcm.model_class()
    if rcm._USED[gone]:
        setattr(host.T2VDistillModel_rCM, gone, lambda self, data: None)
        with pytest.raises(RuntimeError, match=rf"{gone} takes no argument .*: not the rCM"):
            rcm.model_class()
    del host.T2VDistillModel_rCM
    with pytest.raises(RuntimeError, match=r"t2v_model_distill_rcm has no T2VDistillModel_rCM: "):
        rcm.model_class()


def test_a_moved_prediction_is_refused(host: Any) -> None:
    host.DenoisePrediction = dataclasses.make_dataclass("DenoisePrediction", ["x0", "v"])
    with pytest.raises(RuntimeError, match=r"DenoisePrediction takes no argument F: not the rCM .*rcm 5b41aa9"):
        rcm.model_class()
    del host.DenoisePrediction
    with pytest.raises(RuntimeError, match=r"has no DenoisePrediction: not the rCM .*rcm 5b41aa9"):
        rcm.model_class()


@pytest.mark.parametrize("gone", vars(configuration()))
def test_a_moved_configuration_is_refused_by_name(host: Any, gone: str) -> None:
    config = configuration()
    delattr(config, gone)
    with pytest.raises(RuntimeError, match=rf"has no {gone}: not the rCM .*rcm 5b41aa9"):
        rcm.avd_model(config)


def test_the_regression_comes_with_distribution_matching(host: Any) -> None:
    model = rcm.avd_model(configuration())
    assert take(model, 0)[0] == ["scm"]  # tangent warm-up
    assert take(model, 1)[0] == ["scm", "avd_regression", "dmd"]
    assert take(model, 2)[0] == ["critic"]
    assert take(rcm.avd_model(configuration(), {"regression": None}), 1)[0] == ["scm", "dmd"]
    model.closures = ["dmd2"]
    with pytest.raises(RuntimeError, match=r"gave \['scm', 'dmd2'\] and no 'dmd'"):
        take(model, 1)


def test_ranks_that_share_a_sample_share_its_time_and_noise(host: Any) -> None:
    """What ``sync`` returns is what the student sees."""
    seen = []

    def denoise(
        self: Any, xt_B_C_T_H_W: Tensor, time: Tensor, condition: Any, net_type: str = "teacher"
    ) -> DenoisePrediction:
        seen.append((xt_B_C_T_H_W, time))
        return original(self, xt_B_C_T_H_W, time, condition, net_type)

    original, host.T2VDistillModel_rCM.denoise = host.T2VDistillModel_rCM.denoise, denoise
    host.T2VDistillModel_rCM.sync = lambda self, times, noise: (torch.full_like(times, 1.4), torch.zeros_like(noise))
    take(rcm.avd_model(configuration()), 1)
    ((x_t, times),) = seen
    torch.testing.assert_close(x_t, math.cos(1.4) * CLIPS)
    assert times.tolist() == pytest.approx([1.4, 1.4])


def test_closures_give_a_loss_per_sample_in_the_hosts_scale(host: Any) -> None:
    model = rcm.avd_model(configuration(), {"motion": {"floor": -20}})  # not a constant
    _, results = take(model, 1)
    values = 2 * math.prod(SHAPE[1:])
    for closure, name in (("avd_regression", "avd/regression/loss"), ("dmd", "avd/motion/loss")):
        log, loss = results[closure]
        assert loss.shape == SHAPE[:1]
        gradient = torch.autograd.grad(loss.sum(), model.net.weight, retain_graph=True)[0]
        assert gradient.abs().max() > 0  # the host's own is zero here
        torch.testing.assert_close(loss.sum().float(), SHAPE[0] * values * log[name], rtol=1e-5, atol=0)
        assert not log[name].requires_grad
    without = take(rcm.avd_model(configuration(), {"motion": None}), 1)[1]["dmd"]
    assert without[1].sum() == 0
    assert set(without[0]) == {"G_x0"}


def test_the_steps_are_those_of_the_hosts_sampler_or_given(host: Any) -> None:
    assert rcm.avd_model(configuration()).avd.objective.config.timesteps == (math.atan(80), 1.5, 1.4, 1.0)
    given = rcm.avd_model(configuration(), AVDConfig(timesteps=(1.5, 1.0)))
    assert given.avd.objective.config.timesteps == (1.5, 1.0)
    with pytest.raises(ValueError, match=r"TrigFlow times in \(0, pi/2\]"):
        rcm.avd_model(configuration(), AVDConfig(timesteps=(1000, 500)))
    with pytest.raises(ValueError, match="Extra inputs"):
        rcm.avd_model(configuration(), {"regresion": None})


@pytest.mark.parametrize("changes", [{"net_fake_score": None}, {"loss_scale_dmd": 0.0}])
def test_without_distribution_matching_there_is_no_scale(host: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="this configuration has none"):
        rcm.avd_model(configuration(**changes))


def test_the_cache_goes_with_the_models_state(host: Any) -> None:
    model, other = rcm.avd_model(configuration()), rcm.avd_model(configuration())
    step(model, 1)
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {"net", "avd"}
    other.load_state_dict(state, strict=False)
    cache = other.avd.objective.regression.cache
    assert cache.seen.any()
    torch.testing.assert_close(cache.means, model.avd.objective.regression.cache.means)
    state["avd.objective.regression.cache.means"].zero_()  # the host loads in place
    assert model.avd.objective.regression.cache.means.any()
    other.load_state_dict(host.T2VDistillModel_rCM.state_dict(model))  # of a run without the adapter


@pytest.mark.parametrize("batches", [1, 3])
def test_an_optimizer_step_is_one_iteration_of_the_cache(host: Any, batches: int) -> None:
    model = rcm.avd_model(configuration(), AVDConfig(timesteps=(1.0,)))
    cache, expected = model.avd.objective.regression.cache, ReferenceCache()
    for iteration in (1, 3, 5):
        before = cache.means.clone()
        logs = [results["avd_regression"][0] for results in step(model, iteration, batches)]
        if iteration > 1:
            for log in logs:
                torch.testing.assert_close(log["avd/regression/means"], before.expand(SHAPE[0]))
        losses = torch.cat([log["avd/regression/sample_losses"] for log in logs])
        expected.iterate((1.0, loss) for loss in losses.tolist())
        torch.testing.assert_close(cache.means.tolist(), [expected.means[1.0]])
        with mock.patch.object(model.avd, "update", side_effect=AssertionError):  # a collective of several ranks
            step(model, iteration + 1, batches)  # the critic's


def test_the_released_order_works_with_one_batch_per_step_only(host: Any) -> None:
    settings = {"timesteps": (1.0,), "regression": {"order": "update_first"}}
    model = rcm.avd_model(configuration(), settings)
    for iteration in range(4):
        results = step(model, iteration)
    cache = model.avd.objective.regression.cache
    torch.testing.assert_close(results[0]["avd_regression"][0]["avd/regression/means"], cache.means.expand(SHAPE[0]))
    with pytest.raises(ValueError, match=r"'update_first' needs trainer\.grad_accum_iter=1"):
        step(rcm.avd_model(configuration(), settings), 0, batches=2)  # before a cache is looked at, in the warm-up
    step(rcm.avd_model(configuration(), {"regression": None}), 1, batches=2)


@pytest.mark.parametrize("avd", [{"regression": {"auto_update": False}}, AVDConfig(regression={"auto_update": False})])
def test_auto_update_is_not_to_be_set(host: Any, avd: AVDConfig | dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"auto_update is not to be set: .*trainer\.grad_accum_iter"):
        rcm.avd_model(configuration(), avd)


def test_the_hosts_f_is_the_v_of_trigflow() -> None:
    """F is (cos t x_t - x_0) / sin t there; its network predicts the velocity of rectified flow."""
    noise, times = torch.randn(SHAPE), torch.tensor([math.atan(80), 0.6], dtype=torch.float64)
    x_t = trigflow().add_noise(CLIPS, noise, times)
    cosine, sine = (f(times).view(-1, 1, 1, 1, 1) for f in (torch.cos, torch.sin))
    f = ((cosine * x_t - CLIPS) / sine).float()
    torch.testing.assert_close(trigflow().velocity(f, x_t, times), noise - CLIPS, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trigflow().x_0(f, x_t, times), CLIPS, rtol=1e-5, atol=1e-5)
