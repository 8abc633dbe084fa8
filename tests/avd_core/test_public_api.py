import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import avd_core

PUBLIC = [
    "AVDConfig",
    "AVDObjective",
    "AdaptiveRegressionLoss",
    "Callback",
    "CallbackList",
    "ClippedTemporalVarianceLoss",
    "CollapseFinding",
    "CollapseMonitor",
    "DistributionMatchingLoss",
    "EMACallback",
    "FlowMatchingSchedule",
    "GradientBalance",
    "HalfRateInterpolationSampler",
    "LatentFrameInterpolator",
    "LatentStatistics",
    "LossMeanCache",
    "LossOutput",
    "MotionConfig",
    "NonFiniteError",
    "NonFiniteGuard",
    "RegressionConfig",
    "SamplingStep",
    "adaptive_regression_loss",
    "classifier_free_guidance",
    "clipped_temporal_variance_loss",
    "derive_floor",
    "distribution_matching_loss",
    "interpolate_linearly",
    "kept_frames",
    "raise_frame_rate",
    "repeat_frames",
    "shift_timesteps",
    "standard_guidance_scale",
    "step_rates",
    "temporal_variance",
]

MODULES = [name for _, name, _ in pkgutil.walk_packages(avd_core.__path__, "avd_core.")]


def test_the_public_names_are_these():
    # A name that goes or changes breaks somebody's training loop: think, then change the list.
    assert sorted(avd_core.__all__) == PUBLIC
    assert all(hasattr(avd_core, name) for name in PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented_where_it_is_defined(name):
    value = getattr(avd_core, name)
    assert value.__module__.startswith("avd_core.")
    # Its own docstring, not one that it inherits.
    assert value.__doc__
    assert value.__doc__ not in {base.__doc__ for base in getattr(value, "__mro__", [])[1:]}


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        ("adaptive_regression_loss", "prediction target means sharpness weight"),
        ("clipped_temporal_variance_loss", "x_0 floor eps weight frame_dim sync_ranks process_group"),
        ("distribution_matching_loss", "x_0 real_x_0 fake_x_0 weight eps"),
        ("derive_floor", "x_0 frame_dim margin"),
        ("shift_timesteps", "timesteps shift num_train_timesteps"),
        ("AdaptiveRegressionLoss", "cache sharpness weight"),
        ("ClippedTemporalVarianceLoss", "floor eps weight frame_dim sync_ranks process_group"),
        ("DistributionMatchingLoss", "weight eps"),
        ("LossMeanCache", "timesteps decay order auto_update sync_ranks process_group"),
        ("GradientBalance", "target decay sync_ranks process_group"),
        ("EMACallback", "parameters decay warmup"),
        ("NonFiniteGuard", "max_consecutive name sync_ranks process_group"),
    ],
)
def test_names_and_order_of_arguments_are_pinned(function, parameters):
    assert list(inspect.signature(getattr(avd_core, function)).parameters) == parameters.split()


def test_a_loss_unpacks_into_value_and_metrics():
    loss, metrics = avd_core.temporal_variance(torch.randn(1, 2, 3)), {}
    assert avd_core.LossOutput(loss, metrics) == (loss, metrics)
    assert avd_core.LossOutput._fields == ("loss", "metrics")


def test_importing_the_package_imports_none_of_the_extras():
    code = (
        "import sys, avd_core\n"
        "roots = {name.partition('.')[0] for name in sys.modules}\n"
        "extras = {'diffusers', 'torch_ema', 'av', 'matplotlib', 'typer', 'omegaconf', 'safetensors', 'rich', 'PIL',\n"
        "          'avd_trainer', 'avd_integrations'}\n"
        "print(sorted(roots & extras), 'avd_core' in roots)\n"
    )
    root = Path(avd_core.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] True"


def test_the_package_is_typed():
    assert (Path(avd_core.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    examples = sum(len(test.examples) for test in doctest.DocTestFinder().find(module, name))
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.failed == 0
    assert results.attempted == examples


def test_every_loss_has_an_example():
    for name in ("AVDObjective", "AdaptiveRegressionLoss", "ClippedTemporalVarianceLoss", "DistributionMatchingLoss"):
        assert doctest.DocTestFinder(recurse=False).find(getattr(avd_core, name), name)[0].examples
