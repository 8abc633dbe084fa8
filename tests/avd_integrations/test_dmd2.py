"""What needs no DMD2: refusals, and the regression's arithmetic on a model of the same shape as its ``SDUniModel``."""

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avd_core import AVDConfig, AVDObjective, RegressionConfig
from avd_integrations import variance_preserving
from avd_integrations.dmd2 import sd_uni_model

ALPHAS = torch.linspace(0.9999, 0.005, 1000)


class Context:
    """In place of the host's autocast."""

    entered = False

    def __enter__(self) -> None:
        self.entered = True

    def __exit__(self, *_: object) -> None:
        self.entered = False


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.seen = []
        self.context = Context()

    def forward(
        self, x_t: Tensor, times: Tensor, text: Tensor, added_cond_kwargs: dict[str, Tensor]
    ) -> types.SimpleNamespace:
        assert self.context.entered, "the host runs its generator in network_context_manager"
        self.seen.append((x_t, times, text, added_cond_kwargs))
        return types.SimpleNamespace(sample=self.scale * x_t)


class SDUniModel(nn.Module):
    """The attributes and arguments of the host's that are read."""

    def __init__(self, args: types.SimpleNamespace, accelerator: Any) -> None:
        super().__init__()
        self.accelerator = accelerator
        self.feedforward_model, self.guidance_model = Generator(), nn.Linear(1, 1)
        self.alphas_cumprod, self.num_train_timesteps = args.alphas_cumprod, 1000
        self.denoising, self.conditioning_timestep = args.denoising, 399
        self.num_denoising_step = args.num_denoising_step
        self.denoising_step_list = torch.tensor(range(999, 0, -(1000 // args.num_denoising_step)))
        self.network_context_manager = self.feedforward_model.context

    def forward(
        self,
        noise: Tensor | None,
        text: Tensor | None,
        real_train_dict: dict[str, Any] | None = None,
        compute_generator_gradient: bool = True,
        generator_turn: bool = False,
        guidance_turn: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return ({"loss_dm": torch.tensor(7.0)} if generator_turn and compute_generator_gradient else {}), {}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``main.sd_unified_model`` with a class of the test's choice."""

    def install(model: type[nn.Module] | None = SDUniModel) -> None:
        module = types.ModuleType("main.sd_unified_model")
        if model is not None:
            module.SDUniModel = model
        monkeypatch.setitem(sys.modules, "main", types.ModuleType("main"))
        monkeypatch.setitem(sys.modules, "main.sd_unified_model", module)

    return install


def options(**changes: Any) -> types.SimpleNamespace:
    of_the_host = {"gan_alone": False, "cls_on_clean_image": True, "denoising": True, "num_denoising_step": 4}
    return types.SimpleNamespace(**of_the_host | {"alphas_cumprod": ALPHAS} | changes)


def build(regression: RegressionConfig | None = None, **changes: Any) -> Any:
    accelerator = types.SimpleNamespace(unwrap_model=lambda model: model)
    return sd_uni_model(regression)(options(**changes), accelerator)


def batch(count: int = 6) -> dict[str, Any]:
    return {
        "images": torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        "text_embedding": torch.zeros(count, 3, 2),
        "unet_added_conditions": {"time_ids": torch.zeros(count, 6)},
    }


def test_without_dmd2_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "main", None)
    with pytest.raises(ImportError, match=r"DMD2 is needed here.*Run from a checkout.*proven on tianweiy/DMD2 8d8fa55"):
        sd_uni_model()


def test_another_package_of_that_name_is_not_taken_for_it(host: Callable[..., None]) -> None:
    host(None)
    with pytest.raises(RuntimeError, match=r"has no SDUniModel: not the DMD2"):
        sd_uni_model()


def test_a_forward_that_has_moved_is_named(host: Callable[..., None]) -> None:
    class Moved(SDUniModel):
        def forward(
            self, noise: Any, text: Any, generator_turn: bool = False
        ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            return {}, {}

    host(Moved)
    with pytest.raises(RuntimeError, match=r"no argument real_train_dict, compute_generator_gradient: .*DMD2 8d8fa55"):
        sd_uni_model()


@pytest.mark.parametrize("name", ["denoising_step_list", "num_denoising_step"])
def test_an_attribute_that_has_moved_is_named(host: Callable[..., None], name: str) -> None:
    class Moved(SDUniModel):
        def __init__(self, args: types.SimpleNamespace, accelerator: Any) -> None:
            super().__init__(args, accelerator)
            delattr(self, name)

    host(Moved)
    with pytest.raises(RuntimeError, match=rf"has no {name}: .*DMD2 8d8fa55"):
        build()


@pytest.mark.parametrize("name", ["gan_alone", "cls_on_clean_image"])
def test_an_option_that_has_moved_is_named(host: Callable[..., None], name: str) -> None:
    host()
    arguments = options()
    delattr(arguments, name)
    with pytest.raises(RuntimeError, match=rf"has no {name}: not the DMD2.*DMD2 8d8fa55"):
        sd_uni_model()(arguments, None)


@pytest.mark.parametrize("key", ["images", "text_embedding", "unet_added_conditions"])
def test_a_batch_that_has_moved_is_named(host: Callable[..., None], key: str) -> None:
    host()
    data = batch()
    del data[key]
    with pytest.raises(RuntimeError, match=rf"real_train_dict has no {key}: not the DMD2.*DMD2 8d8fa55"):
        build()(None, None, real_train_dict=data, generator_turn=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"gan_alone": True}, "--gan_alone"), ({"cls_on_clean_image": False}, "--cls_on_clean_image")],
)
def test_runs_without_matching_or_without_images_are_refused(
    host: Callable[..., None], changes: dict[str, bool], message: str
) -> None:
    host()
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_cache_that_nothing_would_update_is_refused(host: Callable[..., None]) -> None:
    with pytest.raises(ValueError, match="does not accumulate gradients"):
        sd_uni_model(RegressionConfig(auto_update=False))


def test_a_configuration_of_everything_is_refused(host: Callable[..., None]) -> None:
    host()
    with pytest.raises(TypeError, match="must be a RegressionConfig or None, got AVDConfig"):
        sd_uni_model(AVDConfig())


def test_the_regression_is_added_on_generator_updates_alone(host: Callable[..., None]) -> None:
    host()
    model = build()
    data = batch()
    for turns in ({"guidance_turn": True}, {"generator_turn": True, "compute_generator_gradient": False}):
        losses, logs = model(None, None, real_train_dict=data, **turns)
        assert not losses
        assert "avd" not in logs
    assert not model.feedforward_model.seen
    losses, logs = model(None, None, real_train_dict=data, generator_turn=True)
    x_t, times, text, conditions = model.feedforward_model.seen[0]
    assert times.dtype == torch.long
    assert text is data["text_embedding"]
    assert conditions is data["unet_added_conditions"]
    path = variance_preserving(ALPHAS)
    target = variance_preserving(ALPHAS, "x_0").velocity(data["images"], x_t, times)
    config = AVDConfig(timesteps=(999, 749, 499, 249), motion=None)
    velocity = path.velocity(0.3 * x_t, x_t, times).requires_grad_()
    by_hand = AVDObjective(config).on_clips(velocity, target, times)
    torch.testing.assert_close(losses["loss_dm"], 7 + by_hand.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logs["avd"]["regression/loss"], by_hand.metrics["regression/loss"])
    losses["loss_dm"].backward()
    assert model.feedforward_model.scale.grad.abs() > 0


def test_the_first_step_sees_noise_alone_and_the_others_see_the_image(host: Callable[..., None]) -> None:
    host()
    model, data = build(), batch(200)
    model(None, None, real_train_dict=data, generator_turn=True)
    x_t, times, *_ = model.feedforward_model.seen[0]
    assert set(times.tolist()) == {999, 749, 499, 249}
    for time in (999, 249):
        chosen = times == time
        product = (x_t[chosen] * data["images"][chosen]).mean().item()
        assert product == pytest.approx(0.0 if time == 999 else ALPHAS[249].sqrt().item(), abs=0.06)


def test_a_step_that_the_host_never_draws_is_none_here(host: Callable[..., None]) -> None:
    """1000 is no multiple of 6, and the host's list has 3 as a seventh."""
    host()
    model = build(num_denoising_step=6)
    assert len(model.denoising_step_list) == 7
    steps = [999, 833, 667, 501, 335, 169]
    assert model.guidance_model.avd.objective.regression.cache.timesteps.tolist() == steps
    model(None, None, real_train_dict=batch(200), generator_turn=True)
    _, times, *_ = model.feedforward_model.seen[0]
    assert set(times.tolist()) == set(steps)


def test_everything_is_brought_to_where_the_host_computes(host: Callable[..., None]) -> None:
    class Elsewhere(torch.Tensor):
        """Has values, which the constructor looks at, and says that they are on another device."""

        device = torch.device("meta")

    host()
    model = build(alphas_cumprod=ALPHAS.as_subclass(Elsewhere))
    assert {buffer.device.type for buffer in model.guidance_model.avd.buffers()} == {"meta"}
    model.feedforward_model.to("meta")
    losses, _ = model(None, None, real_train_dict=batch(), generator_turn=True)
    x_t, times, *_ = model.feedforward_model.seen[0]
    assert x_t.device.type == times.device.type == losses["loss_dm"].device.type == "meta"


def test_a_one_step_generator_sees_noise_at_its_conditioning_time(host: Callable[..., None]) -> None:
    host()
    model, data = build(denoising=False), batch(50)
    model(None, None, real_train_dict=data, generator_turn=True)
    x_t, times, *_ = model.feedforward_model.seen[0]
    assert set(times.tolist()) == {399}
    assert abs((x_t * data["images"]).mean()) < 0.06
    assert model.guidance_model.avd.objective.regression.cache.timesteps.tolist() == [399]


def test_the_cache_is_in_the_state_of_the_guidance_model(host: Callable[..., None]) -> None:
    host()
    model = build(RegressionConfig(weight=0.5))
    model(None, None, real_train_dict=batch(), generator_turn=True)
    other = build(RegressionConfig(weight=0.5))
    other.guidance_model.load_state_dict(model.guidance_model.state_dict())
    saved, loaded = (m.guidance_model.avd.objective.regression for m in (model, other))
    assert saved.cache.seen.any()
    torch.testing.assert_close(loaded.cache.means, saved.cache.means)
    assert saved.weight == 0.5
    # Nothing of it is trained, and the generator's own file stays as it was.
    assert len(list(model.guidance_model.avd.parameters())) == 0
    assert set(model.feedforward_model.state_dict()) == {"scale"}
