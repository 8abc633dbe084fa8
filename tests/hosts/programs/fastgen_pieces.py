"""What FastGen's trainer alone does not show: its other noise schedules, images, its configuration, its sampler."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import fastgen_tiny as tiny  # first: torchvision can be imported after it

# isort: split
import pytest
import torch
from fastgen.callbacks.callback import Callback
from fastgen.configs.config_utils import override_config_with_opts, serialize_config
from fastgen.configs.methods.config_dmd2 import create_config
from fastgen.methods import CausVidModel, DMD2Model
from fastgen.methods.model import FastGenModel
from fastgen.networks.noise_schedule import get_noise_schedule
from torch import Tensor

import avd_integrations.fastgen as adapter
from avd_core import MotionConfig, RegressionConfig, interpolate_linearly


def video_model(folder: Path | str = ".", **changes: Any) -> Any:
    config = tiny.video_config(folder, 3).model
    for name, value in changes.items():
        setattr(config, name, value)
    model = DMD2Model(config)
    model.on_train_begin()
    model.init_optimizers()
    return model


def batch_of(model: Any, count: int = 3) -> dict[str, Tensor]:
    batch = next(iter(tiny.Clips(model.input_shape, count)))
    return {name: value.to(model.precision) for name, value in batch.items()}


def schedules_agree() -> float:
    """x_t as FastGen makes it, and noise - x_0 out of any of its predictions."""
    worst = 0.0
    alphas = {"alphas_cumprod": (1 - torch.linspace(0.03, 0.11, 1000, dtype=torch.float64) ** 2).cumprod(0)}
    for name, predictions, times in (
        ("rf", ("flow", "x0", "eps"), tiny.T_LIST[:-1]),
        ("edm", ("x0", "eps", "flow"), [80.0, 10.0, 1.0]),
        ("trig", ("x0", "eps", "flow"), [1.5, 1.0, 0.5]),
        ("alphas", ("x0", "eps", "v"), [0.999, 0.75, 0.29]),
    ):
        for asked in predictions:
            model = video_model()
            model.net.noise_scheduler = schedule = get_noise_schedule(name, **(alphas if name == "alphas" else {}))
            model.net.net_pred_type = asked
            model.config.sample_t_cfg.t_list = [*times, 0.0]
            terms = adapter.fastgen_terms(model, RegressionConfig(), None)
            x_0, noise = torch.randn(2, len(times), *tiny.SHAPE).unbind()
            t64 = torch.tensor(times, dtype=torch.float64)
            t32 = terms.objective.regression.cache.timesteps
            x_t = schedule.forward_process(x_0, noise, t64)
            torch.testing.assert_close(terms.parametrisation.add_noise(x_0, noise, t32), x_t, rtol=1e-5, atol=1e-5)
            host_prediction = adapter.terms._prediction_of(model.net)[0]
            output = schedule.convert_model_output(x_t.double(), x_0.double(), t64, "x0", host_prediction)
            velocity = terms.parametrisation.velocity(output, x_t.double(), t32)
            worst = max(worst, (velocity - (noise - x_0)).abs().max().item())
            assert worst < 1e-4, (name, asked, worst)
    return worst


def images_are_trained_without_motion(folder: Path) -> list[float]:
    """FastGen's own EDM network at 8 x 8: one step at sigma = 80, and a prediction of x_0."""
    config = create_config()
    options = ["-", "img_resolution=8", "channel_mult=[1]", "channel_mult_noise=1"]
    config.model.net = override_config_with_opts(config.model.net, options)
    config.model.device, config.model.input_shape = "cpu", [3, 8, 8]
    config.model.gan_loss_weight_gen, config.model.student_update_freq = 0, 1
    config.dataloader_train = tiny.L(tiny.ImageClips)(shape=[3, 8, 8], batch_size=2)
    config.trainer.checkpointer.save_dir, config.trainer.max_iter = str(folder / "images"), 3
    options = {"flags": {"allow_objects": True}}
    config.trainer.callbacks = tiny.DictConfig({"avd": tiny.L(adapter.avd_callback)()}, **options)
    with pytest.raises(ValueError, match=r"images have none: model.input_shape is \[3, 8, 8\]. Pass motion=None"):
        tiny.train(config)
    config.trainer.callbacks = tiny.DictConfig({"avd": tiny.L(adapter.avd_callback)(motion=None)}, **options)
    added = []

    class Check(Callback):
        def on_training_step_end(
            self,
            model: Any,
            data_batch: dict[str, Tensor],
            output_batch: dict[str, Any],
            loss_dict: dict[str, Tensor],
            iteration: int = 0,
        ) -> None:
            added.append((loss_dict["total_loss"] - loss_dict["vsd_loss"]).item())
            assert loss_dict["avd/regression/loss"].item() == pytest.approx(added[-1], rel=1e-4)
            assert not any("motion" in name for name in loss_dict)

    config.trainer.callbacks["check"] = tiny.L(Check)()
    _, model = tiny.train(config)
    # By hand, on a batch of its own: FastGen's schedule noises it, its network predicts, and x_0's error is divided
    # by what a velocity makes of it: noise - x_0 with noise = (x_t - x_0) / 80.
    terms = adapter.fastgen_terms(model, RegressionConfig(), None)
    batch = next(iter(tiny.ImageClips([3, 8, 8], 2)))
    calls = []
    with model.net.register_forward_hook(lambda net, given, output: calls.append((*given, output))):
        loss = terms((model, batch)).loss
    ((_, t, x_0),) = calls
    assert t.tolist() == pytest.approx([80.0, 80.0], rel=1e-3), t
    errors = ((1 + 1 / 80) ** 2 * (x_0 - batch["real"]) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, errors.mean(), rtol=1e-4, atol=1e-5)  # first losses: weight 1
    return added


def half_precision_trains(folder: Path) -> None:
    """Wan's configurations have everything in bfloat16."""
    config = tiny.video_config(folder / "bfloat16", 5)
    config.model.precision = "bfloat16"
    config.trainer.callbacks = tiny.DictConfig(
        {"avd": tiny.L(adapter.avd_callback)()}, flags={"allow_objects": True}
    )  # fmt: skip
    trainer, model = tiny.train(config)
    cache = trainer.callbacks._callbacks["avd"].terms.objective.regression.cache
    assert cache.means.dtype == torch.float32
    assert cache.means.isfinite().all()
    assert all(p.isfinite().all() for p in model.net.parameters())


def configuration(folder: Path) -> None:
    """Written to config.yaml, overridden from the command line, named as a string."""
    config = tiny.video_config(folder, 3)
    exec(tiny.lines_of_the_page(), {"config": config})
    written = serialize_config(config)["trainer"]["callbacks"]["avd"]
    assert float(written["motion"]["floor"]) == 0.6
    assert "avd_callback" in written["_target_"]
    changed = override_config_with_opts(
        config, ["-", "trainer.callbacks.avd.motion.floor=0.8", "trainer.callbacks.avd.regression=null"]
    )
    callback = tiny.instantiate(changed.trainer.callbacks["avd"])
    assert isinstance(callback, Callback)
    assert callback._motion == MotionConfig(floor=0.8)
    assert callback._regression is None
    named = tiny.instantiate(tiny.DictConfig({"_target_": "avd_integrations.fastgen.avd_callback"}))
    assert isinstance(named, adapter.AVDHooks)
    assert named._regression == RegressionConfig()


def few_steps_are_the_hosts() -> None:
    model = video_model(student_sample_steps=2)
    model.config.sample_t_cfg.t_list = None
    assert adapter.few_steps(model).tolist() == pytest.approx([0.999, 0.4995])
    with pytest.raises(ValueError, match="update_first"):
        adapter.fastgen_terms(model, RegressionConfig(order="update_first"), None, grad_accum_rounds=2)


def methods_without_a_sample_are_refused() -> None:
    model = video_model()
    callback = adapter.avd_callback()
    callback.config = tiny.video_config(".", 3)
    callback.on_load_checkpoint_start(model)
    _, outputs = model.single_train_step(batch_of(model), 2)
    outputs.pop("gen_rand_train")
    with pytest.raises(RuntimeError, match=r"DMD2Model puts no generated sample .* Pass motion=None"):
        callback.on_backward_begin(model, batch_of(model), outputs, {"total_loss": torch.zeros(())}, 2, 0)
    with pytest.raises(RuntimeError, match="no loss_dict"):
        callback.on_backward_begin(model, batch_of(model), outputs, {"loss": torch.zeros(())}, 2, 0)


def a_moved_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(self: Any, model: Any, batch: Any, losses: Any) -> None:
        pass

    adapter.callback._callback_class.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(Callback, "on_backward_begin", renamed)
        with pytest.raises(RuntimeError, match=r"on_backward_begin takes no argument .*not the FastGen .*34f30e8"):
            adapter.avd_callback()
    with monkeypatch.context() as patch:
        patch.delattr(FastGenModel, "_prepare_training_data")
        with pytest.raises(
            RuntimeError, match=r"has no FastGenModel._prepare_training_data: not the FastGen .*34f30e8"
        ):
            adapter.avd_callback()


def half_rate_sampling() -> None:
    """With no step at half rate it is FastGen's own loop, noise for noise; with two, they run on 3 of 5 frames."""
    model = video_model()
    noise, batch = torch.randn(3, *tiny.SHAPE), batch_of(model)
    options = {"net": model.net, "noise": noise, "condition": batch["condition"], "t_list": tiny.T_LIST,
               "student_sample_steps": 4, "student_sample_type": "sde"}  # fmt: skip

    def sample(method: Any, **changes: Any) -> tuple[Tensor, list[int]]:
        lengths = []
        with model.net.register_forward_hook(lambda net, given, output: lengths.append(given[0].shape[2])):
            torch.manual_seed(0)
            return method.generator_fn(**{**options, **changes}), lengths

    theirs, _ = sample(DMD2Model)
    full, _ = sample(adapter.half_rate(DMD2Model, half_rate_steps=0))
    torch.testing.assert_close(full, theirs, rtol=1e-5, atol=1e-6)
    halved = adapter.half_rate(DMD2Model, interpolate_linearly, 2)
    samples, lengths = sample(halved)
    assert lengths == [3, 3, 5, 5]
    assert samples.shape == theirs.shape
    assert issubclass(halved, DMD2Model)
    with pytest.raises(ValueError, match=r'needs model.student_sample_type="sde"'):
        sample(halved, student_sample_type="ode")
    with pytest.raises(ValueError, match="half_rate_steps must be from 0 to 4"):
        sample(adapter.half_rate(DMD2Model, half_rate_steps=5))
    with pytest.raises(ValueError, match="CausVidModel samples in a way of its own"):
        adapter.half_rate(CausVidModel)
    given_frames = copy.copy(model.net)
    given_frames.preserve_conditioning = lambda x, condition: x
    with pytest.raises(ValueError, match="is given frames"):
        sample(halved, net=given_frames)
    config = tiny.video_config(".", 3)
    exec(tiny.lines_of_the_page(1), {"config": config, "interpolator": interpolate_linearly, "L": tiny.L})
    config.model_class.config = config.model
    outputs = tiny.instantiate(config.model_class)._get_outputs(noise, condition=batch["condition"])
    assert outputs["gen_rand"]().shape == noise.shape  # as validation and logging sample
    assert outputs["gen_rand"].func.__self__.__name__ == "HalfRateDMD2Model"


def main(folder: Path) -> None:
    torch.manual_seed(0)
    worst = schedules_agree()
    added = images_are_trained_without_motion(folder)
    half_precision_trains(folder)
    configuration(folder)
    few_steps_are_the_hosts()
    methods_without_a_sample_are_refused()
    with pytest.MonkeyPatch.context() as monkeypatch:
        a_moved_host_is_named(monkeypatch)
    half_rate_sampling()
    print(json.dumps({"worst_velocity_error": worst, "added_on_images": added}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
