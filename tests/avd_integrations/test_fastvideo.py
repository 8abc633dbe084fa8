"""The FastVideo adapter without FastVideo; with it, see tests/hosts/test_fastvideo.py."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
import torch.distributed.checkpoint as dcp

from avd_core import AVDConfig, MotionConfig, RegressionConfig
from avd_integrations import HostTerms, rectified_flow
from avd_integrations.fastvideo import PROVEN_ON, _CopiedState, avd_config, dmd2, dmd2_class

STEPS = [1000, 750, 500, 250]


@pytest.fixture(autouse=True)
def no_class_is_kept():
    dmd2_class.cache_clear()
    yield
    dmd2_class.cache_clear()


def whole_method(without=None, **others):
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
            "_should_update_student": lambda self, iteration: None,
            **others,
        },
    )
    if without is not None:
        delattr(method, without)
    return method


def model_of(predict_noise=None):
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


def install(monkeypatch, **modules):
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
def test_without_fastvideo_the_error_says_where_to_get_it():
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
def test_a_fastvideo_that_has_moved_is_named_with_the_one_it_was_proven_on(monkeypatch, method, model, message):
    install(monkeypatch, method=method, model=model)
    with pytest.raises(RuntimeError, match=message) as error:
        dmd2(cfg=None, role_models={})
    assert PROVEN_ON in str(error.value)


def test_the_options_of_the_yaml_are_the_papers_by_default():
    assert avd_config(None, STEPS) == avd_config({}, STEPS) == AVDConfig(timesteps=STEPS)
    config = avd_config({"regression": {"weight": 0.5}, "motion": None}, STEPS)
    assert config == AVDConfig(timesteps=STEPS, regression=RegressionConfig(weight=0.5), motion=None)
    assert avd_config({"regression": None}, STEPS).motion == MotionConfig()


def test_accumulation_rounds_share_an_iteration_of_the_cache():
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
def test_options_that_are_not_the_users_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        avd_config(options, STEPS)


def terms(steps):
    return HostTerms(
        AVDConfig(timesteps=steps, motion=None), rectified_flow(), lambda x, t, b: x, lambda b: b, layout="BFCHW"
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_a_checkpoint_of_other_steps_does_not_become_this_runs(tmp_path):
    saved = terms(STEPS)
    saved(torch.randn(2, 3, 4, 2, 2))
    dcp.save({"avd": _CopiedState(saved)}, checkpoint_id=tmp_path)
    same, other = terms(STEPS), terms([1000, 760, 500, 250])
    dcp.load({"avd": _CopiedState(same)}, checkpoint_id=tmp_path)
    torch.testing.assert_close(same.state_dict(), saved.state_dict(), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="saved cache is for the grid"):
        dcp.load({"avd": _CopiedState(other)}, checkpoint_id=tmp_path)
    assert not other.objective.regression.cache.seen.any()
