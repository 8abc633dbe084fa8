"""The FastVideo adapter without FastVideo; with it, see tests/hosts/test_fastvideo.py."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from avd_core import AVDConfig, MotionConfig, RegressionConfig
from avd_integrations import HostTerms, rectified_flow
from avd_integrations.fastvideo import PROVEN_ON, _CopiedState, avd_config, dmd2, dmd2_class

STEPS = [1000, 750, 500, 250]


@pytest.fixture(autouse=True)
def no_class_is_kept() -> Iterator[None]:
    dmd2_class.cache_clear()
    yield
    dmd2_class.cache_clear()


def whole_method(without: str | None = None, **others: Callable[..., Any]) -> type:
    method = type(
        "DMD2Method",
        (),
        {
            "__init__": lambda self, *, cfg, role_models: None,
            "single_train_step": lambda self, batch, iteration: None,
            "optimizers_schedulers_step": lambda self, iteration: None,
            "checkpoint_state": lambda self: {},
            "_dmd_loss": lambda self, generator_pred_x0, batch: None,
            "_get_denoising_step_list": lambda self, device: None,
            **others,
        },
    )
    if without is not None:
        delattr(method, without)
    return method


def model_of(predict_noise: Callable[..., Any] | None = None) -> type:
    return type(
        "ModelBase",
        (),
        {
            "prepare_batch": lambda self, raw_batch, *, generator, latents_source: None,
            "add_noise": lambda self, clean_latents, noise, timestep: None,
            "predict_noise": predict_noise
            or (lambda self, noisy_latents, timestep, batch, *, conditional, cfg_uncond, attn_kind: None),
        },
    )


def install(monkeypatch: pytest.MonkeyPatch, **modules: type) -> None:
    """Modules of a FastVideo that has only these classes."""
    for name, owner in modules.items():
        path = {
            "method": "fastvideo.train.methods.distribution_matching.dmd2",
            "model": "fastvideo.train.models.base",
        }[name]
        module = ModuleType(path)
        setattr(module, owner.__name__, owner)
        monkeypatch.setitem(sys.modules, path, module)
        for end in range(1, path.count(".") + 1):
            monkeypatch.setitem(sys.modules, path.rsplit(".", end)[0], ModuleType("package"))


@pytest.mark.skipif(importlib.util.find_spec("fastvideo") is not None, reason="FastVideo is installed")
def test_without_fastvideo_the_error_says_where_to_get_it() -> None:
    with pytest.raises(ImportError, match=r"FastVideo is needed here.*github.com/hao-ai-lab/FastVideo") as error:
        dmd2(cfg=None, role_models={})
    assert PROVEN_ON in str(error.value)


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        (whole_method(without="checkpoint_state"), model_of(), "dmd2 has no DMD2Method.checkpoint_state: "),
        (
            whole_method(_dmd_loss=lambda self, x_0, batch: None),
            model_of(),
            "DMD2Method._dmd_loss takes no argument generator_pred_x0",
        ),
        (
            whole_method(),
            model_of(lambda self, noisy_latents, timestep, batch, *, conditional: None),
            "ModelBase.predict_noise takes no argument cfg_uncond, attn_kind",
        ),
        (type("DMD3Method", (), {}), model_of(), "distribution_matching.dmd2 has no DMD2Method: "),
        (whole_method(), model_of(), "has no student, method_config, training_config"),
    ],
)
def test_a_fastvideo_that_has_moved_is_named_with_the_one_it_was_proven_on(
    monkeypatch: pytest.MonkeyPatch, method: type, model: type, message: str
) -> None:
    install(monkeypatch, method=method, model=model)
    with pytest.raises(RuntimeError, match=message) as error:
        dmd2(cfg=None, role_models={})
    assert PROVEN_ON in str(error.value)


def test_the_options_of_the_yaml_are_the_papers_by_default() -> None:
    assert avd_config(None, STEPS) == avd_config({}, STEPS) == AVDConfig(timesteps=STEPS)
    config = avd_config({"regression": {"weight": 0.5}, "motion": None}, STEPS)
    assert config == AVDConfig(timesteps=STEPS, regression=RegressionConfig(weight=0.5), motion=None)
    assert avd_config({"regression": None}, STEPS).motion == MotionConfig()


def test_accumulation_rounds_share_an_iteration_of_the_cache() -> None:
    assert avd_config(None, STEPS, 4).regression == RegressionConfig(auto_update=False)
    assert avd_config({"regression": None}, STEPS, 4).regression is None
    with pytest.raises(ValueError, match="needs auto_update=True"):
        avd_config({"regression": {"order": "update_first"}}, STEPS, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": STEPS}, "are method.dmd_denoising_steps"),
        ({"regression": {"auto_update": False}}, "gradient_accumulation_steps"),
        ({"regression": None, "motion": None}, "leaves out both terms"),
        ({"motion": {"flor": 0.6}}, "flor"),
    ],
)
def test_options_that_are_not_the_users_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        avd_config(options, STEPS)


class Student:
    """Its velocity is a multiple of what it sees."""

    num_train_timesteps, device = 1000, torch.device("cpu")

    def __init__(self) -> None:
        self.factor, self.seen, self.prepared = nn.Parameter(torch.tensor(0.3)), [], []

    def add_noise(self, clean_latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        sigma = (timestep / 1000).view(*clean_latents.shape[:2], 1, 1, 1)
        return (1 - sigma) * clean_latents + sigma * noise

    def predict_noise(
        self,
        noisy_latents: Tensor,
        timestep: Tensor,
        batch: SimpleNamespace,
        *,
        conditional: bool,
        cfg_uncond: Any,
        attn_kind: str,
    ) -> Tensor:
        self.seen.append((noisy_latents, timestep))
        return self.factor * noisy_latents

    def prepare_batch(
        self, raw_batch: dict[str, Tensor], *, generator: torch.Generator, latents_source: str
    ) -> SimpleNamespace:
        self.prepared.append((generator, latents_source))
        return SimpleNamespace(latents=raw_batch["clips"])


def method_with(
    monkeypatch: pytest.MonkeyPatch, avd: dict[str, Any] | None = None, mode: str = "data_latent", seed: int = 1
) -> Any:
    """The adapter on a FastVideo whose DMD loss is the sum of the samples in the batch."""

    def start(self: Any, *, cfg: Any, role_models: dict[str, Any]) -> None:
        self.student, self.cuda_generator = Student(), torch.Generator().manual_seed(seed)
        self.method_config, self._rollout_mode, self._cfg_uncond = {"avd": avd}, mode, None
        self.training_config = SimpleNamespace(
            loop=SimpleNamespace(gradient_accumulation_steps=1), data=SimpleNamespace(preprocessed_data_type="t2v")
        )

    def single_train_step(
        self: Any, batch: dict[str, Tensor], iteration: int
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        clips = torch.zeros_like(batch["clips"]) if mode == "simulate" else batch["clips"]
        return self._dmd_loss(batch["x_0"], SimpleNamespace(latents=clips)), {}, {"host": 1.0}

    host = whole_method(
        __init__=start,
        single_train_step=single_train_step,
        _dmd_loss=lambda self, generator_pred_x0, batch: generator_pred_x0.sum(),
        _get_denoising_step_list=lambda self, device: torch.tensor(STEPS),
    )
    install(monkeypatch, method=host, model=model_of())
    dmd2_class.cache_clear()
    return dmd2(cfg=None, role_models={})


def batch() -> dict[str, Tensor]:
    clips, x_0 = torch.randn(2, 8, 3, 4, 2, 2, generator=torch.Generator().manual_seed(5)).unbind()
    return {"clips": clips, "x_0": (0.1 * x_0).requires_grad_()}


def test_the_regressions_gradient_reaches_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss_at(factor: float) -> tuple[Tensor, Tensor]:
        method = method_with(monkeypatch, {"motion": None})
        method.student.factor.data.fill_(factor)
        return method.single_train_step(batch(), 1)[0], method.student.factor

    loss, factor = loss_at(0.8)
    loss.backward()
    # The first weights are 1, so the loss is a parabola in the factor, whose central differences are exact.
    expected = (loss_at(0.9)[0] - loss_at(0.7)[0]).item() / 0.2
    assert abs(expected) > 0.1
    assert factor.grad.item() == pytest.approx(expected, rel=1e-3)


def test_the_motion_terms_gradient_reaches_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch()
    x_0 = given["x_0"]
    method_with(monkeypatch, {"regression": None}).single_train_step(given, 1)[0].backward()
    motion = -0.05 * ((x_0 - x_0.mean(dim=1, keepdim=True)).square().mean() + 1e-6).log()
    (expected,) = torch.autograd.grad(motion, x_0)
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(x_0.grad - 1, expected, rtol=1e-3, atol=1e-6)  # 1 is of the host's own loss


def test_metrics_are_scalars_beside_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, _, metrics = method_with(monkeypatch).single_train_step(batch(), 1)
    assert metrics["host"] == 1.0
    added = [metrics[f"avd/{name}"] for name in ("matching_loss", "regression/loss", "motion/loss")]
    torch.testing.assert_close(sum(added), loss.detach())
    assert metrics["avd/matching_loss"] == batch()["x_0"].sum()
    assert all(value.ndim == 0 and not value.requires_grad for name, value in metrics.items() if name != "host")


def test_random_numbers_are_of_fastvideos_generator_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(seed: int) -> tuple[Tensor, list[float]]:
        method = method_with(monkeypatch, seed=seed)
        method.single_train_step(batch(), 1)
        ((x_t, times),) = method.student.seen
        return x_t, times.tolist()

    before = torch.get_rng_state()
    x_t, times = seen(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    same_x_t, same_times = seen(1)
    assert torch.equal(same_x_t, x_t)
    assert same_times == times
    other_x_t, other_times = seen(2)
    assert not torch.equal(other_x_t, x_t)
    assert other_times != times


def test_simulated_rollouts_have_their_batch_prepared_once_more_with_real_clips(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, given = method_with(monkeypatch, mode="simulate"), batch()
    method.single_train_step(given, 1)
    assert method.student.prepared == [(method.cuda_generator, "data")]
    ((x_t, times),) = method.student.seen
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(method.avd.draw_times(8, torch.device("cpu"), generator=generator), times)
    noise = torch.randn(x_t.shape, generator=generator)
    per_frame = times.repeat_interleave(x_t.shape[1])
    torch.testing.assert_close(x_t, method.student.add_noise(given["clips"], noise, per_frame))


def terms(steps: list[int]) -> HostTerms:
    return HostTerms(
        AVDConfig(timesteps=steps, motion=None), rectified_flow(), lambda x, t, b: x, lambda b: b, layout="BFCHW"
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_a_checkpoint_of_other_steps_does_not_become_this_runs(tmp_path: Path) -> None:
    saved = terms(STEPS)
    with torch.no_grad():
        saved(torch.randn(2, 3, 4, 2, 2))
    dcp.save({"avd": _CopiedState(saved)}, checkpoint_id=tmp_path)
    same, other = terms(STEPS), terms([1000, 760, 500, 250])
    dcp.load({"avd": _CopiedState(same)}, checkpoint_id=tmp_path)
    torch.testing.assert_close(same.state_dict(), saved.state_dict(), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="saved cache is for the grid"):
        dcp.load({"avd": _CopiedState(other)}, checkpoint_id=tmp_path)
    assert not other.objective.regression.cache.seen.any()
