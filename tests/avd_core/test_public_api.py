import doctest
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import avd_core
from loss_cases import LOSSES

PUBLIC = [
    "AVDConfig",
    "AVDObjective",
    "AdaptiveRegressionLoss",
    "BalanceConfig",
    "Callback",
    "ClippedTemporalVarianceLoss",
    "CollapseFinding",
    "CollapseMonitor",
    "ConditionalScoreDistillationLoss",
    "DistributionMatchingLoss",
    "EMACallback",
    "FlowMatchingSchedule",
    "GradientBalance",
    "HalfRateInterpolationSampler",
    "HingeLoss",
    "LatentFrameInterpolator",
    "LatentStatistics",
    "LogisticLoss",
    "LossMeanCache",
    "LossOutput",
    "LossStatistics",
    "MAX_SWITCHED",
    "MIN_WEIGHT_SPREAD",
    "MotionConfig",
    "NamedCallbacks",
    "NonFiniteError",
    "NonFiniteGuard",
    "OUTER_WEIGHTS",
    "PAPER_SPREAD",
    "RegressionConfig",
    "SamplingStep",
    "SpatioTemporalR1Loss",
    "SpectralRolloffMonitor",
    "SpectralStatistics",
    "adaptive_regression_loss",
    "classifier_free_guidance",
    "clipped_temporal_variance_loss",
    "conditional_score_distillation_loss",
    "derive_floor",
    "distribution_matching_loss",
    "gradient_shares",
    "interpolate_linearly",
    "kept_frames",
    "raise_frame_rate",
    "repeat_frames",
    "shift_timesteps",
    "spatio_temporal_r1_loss",
    "spectral_rolloff",
    "standard_guidance_scale",
    "step_rates",
    "temporal_rolloff",
    "temporal_variance",
]

CONSTANTS = {"MAX_SWITCHED", "MIN_WEIGHT_SPREAD", "OUTER_WEIGHTS", "PAPER_SPREAD"}

MODULES = [name for _, name, _ in pkgutil.walk_packages(avd_core.__path__, "avd_core.")]


def test_the_public_names_are_these() -> None:
    # A name that goes or changes breaks somebody's training loop: think, then change the list.
    assert sorted(avd_core.__all__) == PUBLIC
    assert all(hasattr(avd_core, name) for name in PUBLIC)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in CONSTANTS])
def test_every_public_name_is_documented_where_it_is_defined(name: str) -> None:
    value = getattr(avd_core, name)
    assert value.__module__.startswith("avd_core.")
    # Its own docstring, not one that it inherits.
    assert value.__doc__
    assert value.__doc__ not in {base.__doc__ for base in getattr(value, "__mro__", [])[1:]}


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        ("adaptive_regression_loss", "prediction target means * weight sharpness spreads judged"),
        (
            "clipped_temporal_variance_loss",
            "x_0 * weight floor eps frame_dim channels sync_ranks process_group",
        ),
        ("distribution_matching_loss", "x_0 real_x_0 online_x_0 * weight eps"),
        ("conditional_score_distillation_loss", "x_0 real_x_0 * weight"),
        (
            "spatio_temporal_r1_loss",
            "discriminator x_t logits * spatial_noise temporal_noise weight sigma_spatial sigma_temporal step_spatial "
            "frame_dim",
        ),
        ("derive_floor", "x_0 * margin frame_dim eps"),
        ("temporal_variance", "x_0 * frame_dim"),
        ("spectral_rolloff", "x * share pool_dim"),
        ("temporal_rolloff", "x * share"),
        ("shift_timesteps", "timesteps shift num_train_timesteps"),
        ("AdaptiveRegressionLoss", "cache * weight sharpness deviation judged"),
        ("ClippedTemporalVarianceLoss", "* weight floor eps frame_dim channels sync_ranks process_group"),
        ("DistributionMatchingLoss", "* weight eps"),
        ("ConditionalScoreDistillationLoss", "* weight"),
        ("SpatioTemporalR1Loss", "* weight sigma_spatial sigma_temporal step_spatial frame_dim"),
        ("LossMeanCache", "timesteps * decay order auto_update sync_ranks process_group"),
        ("GradientBalance", "* target decay sync_ranks process_group"),
        ("EMACallback", "parameters decay * warmup held_in"),
        ("NonFiniteGuard", "max_consecutive * name sync_ranks process_group"),
    ],
)
def test_names_and_order_of_arguments_are_pinned(function: str, parameters: str) -> None:
    pinned = parameters.split()
    keyword_only = len(pinned)
    if "*" in pinned:
        keyword_only = pinned.index("*")
        pinned.remove("*")
    signature = inspect.signature(getattr(avd_core, function)).parameters
    assert list(signature) == pinned
    assert [name for name, p in signature.items() if p.kind is p.KEYWORD_ONLY] == pinned[keyword_only:]


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("RegressionConfig", ("AdaptiveRegressionLoss", "LossMeanCache")),
        ("MotionConfig", ("ClippedTemporalVarianceLoss",)),
        ("BalanceConfig", ("GradientBalance",)),
    ],
)
def test_an_option_has_one_default_and_one_order_everywhere(config: str, parts: tuple[str, ...]) -> None:
    config = getattr(avd_core, config)()
    options = {}
    for part in parts:
        signature = inspect.signature(getattr(avd_core, part)).parameters.values()
        options |= {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}
    # What no file can hold, what the configuration of the whole says, and what five dimensions need not be told.
    options = {k: v for k, v in options.items() if k not in ("process_group", "target")}
    configured = config.model_dump()
    assert configured.pop("frame_dim", 2) == 2
    assert options.pop("frame_dim", None) is None
    assert configured == options
    assert list(configured) == list(options)


def test_ranks_are_synchronised_by_default_everywhere() -> None:
    names = set(avd_core.__all__) - {"NonFiniteError", *CONSTANTS}  # these have no signature
    signatures = {name: inspect.signature(getattr(avd_core, name)).parameters for name in names}
    defaults = {name: p["sync_ranks"].default for name, p in signatures.items() if "sync_ranks" in p}
    assert len(defaults) == 8
    assert set(defaults.values()) == {True}


def test_a_loss_unpacks_into_value_and_metrics() -> None:
    loss, metrics = avd_core.temporal_variance(torch.randn(1, 2, 3, 1, 1)), {}
    assert avd_core.LossOutput(loss, metrics) == (loss, metrics)
    assert avd_core.LossOutput._fields == ("loss", "metrics")


def test_scalars_are_means_as_python_numbers() -> None:
    metrics = {
        "weights": torch.tensor([1.0, 2.0, 6.0]),
        "variance": torch.tensor(0.5, dtype=torch.float64),
        "ratio": torch.tensor(float("nan")),
    }
    scalars = avd_core.LossOutput(torch.tensor(0.0), metrics).scalars()
    assert list(scalars) == list(metrics)
    assert all(type(value) is float for value in scalars.values())
    assert (scalars["weights"], scalars["variance"]) == (3.0, 0.5)
    assert scalars["ratio"] != scalars["ratio"]
    assert avd_core.LossOutput(torch.tensor(0.0), {}).scalars() == {}


@pytest.mark.parametrize("name", LOSSES)
def test_the_scalars_of_every_loss_go_to_a_logger(name: str) -> None:
    scalars = LOSSES[name].make()(*LOSSES[name].inputs(0, torch.float32)).scalars()
    assert scalars
    assert json.loads(json.dumps(scalars)) == scalars


def test_importing_the_package_imports_none_of_the_extras() -> None:
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


def test_the_package_is_typed() -> None:
    assert (Path(avd_core.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    examples = sum(len(test.examples) for test in doctest.DocTestFinder().find(module, name))
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.failed == 0
    assert results.attempted == examples


def test_every_loss_has_an_example() -> None:
    losses = [name for name in PUBLIC if name == "AVDObjective" or name.endswith("Loss")]
    assert len(losses) == 8
    for name in losses:
        assert doctest.DocTestFinder(recurse=False).find(getattr(avd_core, name), name)[0].examples
