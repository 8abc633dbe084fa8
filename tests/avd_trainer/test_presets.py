"""The values of the presets that come with the package."""

from typing import Any

import pytest

from avd_core import AVDConfig, MotionConfig, RegressionConfig
from avd_trainer.config.loading import load_config, presets
from avd_trainer.config.sections import ShapesData
from avd_trainer.data.sources import HELD_OUT
from avd_trainer.methods.registry import list_methods
from avd_trainer.methods.vpae import VPAEMethodConfig
from avd_trainer.training.config import TrainConfig

SHARDS = {"data": {"kind": "shards", "path": "clips"}}


@pytest.mark.parametrize(("name", "method"), [(name, kind) for name, kinds in presets().items() for kind in kinds])
def test_every_preset_is_valid_and_of_the_method_that_its_file_is_named_for(name: str, method: str) -> None:
    config = load_config(TrainConfig, name, replace={} if name.startswith("tiny") else SHARDS, method=method)
    assert config.method.kind == method


def test_every_method_has_values_for_the_tiny_models() -> None:
    assert presets()["tiny"] == tuple(method.kind for method in list_methods())


def test_every_method_that_distils_has_values_for_both_wans_and_for_open_captions() -> None:
    known = presets()
    distil = tuple(kind for kind in known["tiny"] if kind not in ("flow_matching", "frame_interpolation"))
    assert set(known["tiny-open"]) == {*distil, "flow_matching"}
    assert known["wan2.1-1.3b"] == known["wan2.1-14b"] == distil


@pytest.mark.parametrize("kind", [kind for kind in presets()["tiny-open"] if kind != "flow_matching"])
def test_open_captions_change_of_the_tiny_preset_what_belongs_to_the_teacher(kind: str) -> None:
    tiny, own = (load_config(TrainConfig, name, method=kind).model_dump() for name in ("tiny", "tiny-open"))
    assert (own["teacher"], own["data"]["captions"]) == ("bundled:tiny-open", "subjects")
    own["teacher"], own["data"]["captions"] = tiny["teacher"], tiny["data"]["captions"]
    # What belongs to a teacher.
    theirs, method = tiny["method"], own["method"]
    if kind != "regression":
        assert method.pop("guidance_scale") > theirs.pop("guidance_scale")
    if kind == "avd":
        assert method["motion"].pop("floor") > theirs["motion"].pop("floor")
    assert own == tiny


@pytest.mark.parametrize("kind", ["dmd2", "dcm", "vpae", "lcm", "pcm", "regression", "data_forcing"])
def test_the_larger_wan_has_other_blocks_and_no_other_values(kind: str) -> None:
    small, large = (
        load_config(TrainConfig, name, replace=SHARDS, method=kind).model_dump()
        for name in ("wan2.1-1.3b", "wan2.1-14b")
    )
    assert large.pop("teacher") == "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    assert small.pop("teacher") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    heads = [(own["method"].get("detail") or own["method"]).get("head") for own in (small, large)]
    if heads[0] is not None:
        assert [head.pop("blocks") for head in heads] == [(15, 22, 29), (20, 30, 39)]
    assert small == large


def test_the_larger_wan_has_rcms_own_values() -> None:
    """Of the authors' experiment wan2pt1_14B_res480p_t2v_rCM."""
    for kind in ("scm", "rcm"):
        method: Any = load_config(TrainConfig, "wan2.1-14b", replace=SHARDS, method=kind).method
        assert (method.log_sigma_mean, method.tangent_warmup, method.student.optimizer.lr) == (1.5, 0, 1e-6)
    assert (method.online_updates, method.online.optimizer.lr) == (9, 1e-7)


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.1-14b"])
@pytest.mark.parametrize("kind", ["avd", "dmd"])
def test_the_wan_presets_have_the_papers_values(name: str, kind: str) -> None:
    """Sec. 4.1 of You et al. 2026, and the released code where the paper is silent."""
    config = load_config(TrainConfig, name, replace=SHARDS, method=kind)
    method: Any = config.method
    assert config.teacher == f"Wan-AI/Wan2.1-T2V-{name.removeprefix('wan2.1-').upper()}-Diffusers"
    if kind == "avd":
        # A step is one iteration of the cache, however many micro-batches it has: the engine asks for its update.
        regression = RegressionConfig(auto_update=False)
        assert method.objective == AVDConfig(regression=regression, motion=MotionConfig(sync_ranks=False))
    assert (method.guidance_scale, method.matching_weight, method.online_updates) == (5, 1, 5)
    assert method.sampling_shift == 5
    assert (config.batch_size, config.micro_batch_size, config.max_gradient_norm) == (24, 1, 10)
    assert (method.score_timesteps.shift, method.score_timesteps.low, method.score_timesteps.high) == (5, 20, 980)
    for optimizer in (method.student.optimizer, method.online.optimizer):
        assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (2e-6, (0.9, 0.999), 0.01)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("wan2.1-1.3b", (15, 22, 29)), ("wan2.1-14b", (20, 30, 39)), ("wan2.1-i2v-14b-480p", (20, 30, 39))],
)
def test_vpae_of_wan_has_the_values_of_its_paper(name: str, blocks: tuple[int, ...]) -> None:
    config = load_config(TrainConfig, name, replace=SHARDS, method="vpae")
    method: Any = config.method
    assert (config.max_steps, method.priming_steps) == (1500, 500)
    assert (method.priming_rate * method.student.optimizer.lr, method.student.optimizer.lr) == (1e-6, 2e-6)
    assert (method.ema_decay, method.csds_weight, method.critic, method.head.kind) == (0.995, 10, "average", "semantic")
    assert method.head.blocks == blocks
    # The rest is what the class has by itself, so that options and presets cannot part.
    own = VPAEMethodConfig()
    for option in (
        "r1_weight",
        "csds_guidance",
        "critic_timesteps",
        "csds_timesteps",
        "score_timesteps",
        "priming_low",
    ):
        assert getattr(method, option) == getattr(own, option), option


@pytest.mark.parametrize("name", ["tiny", "wan2.1-1.3b", "wan2.1-14b"])
def test_avd_and_dmd_differ_in_the_two_terms_alone(name: str) -> None:
    """Or else a comparison of the two would be one of other values too."""
    avd, dmd = (load_config(TrainConfig, name, replace=SHARDS, method=kind).model_dump() for kind in ("avd", "dmd"))
    own = {"kind", "regression", "motion", "gradient_ratio", "balance"}
    assert {key: value for key, value in avd["method"].items() if key not in own} == {
        key: value for key, value in dmd["method"].items() if key != "kind"
    }
    del avd["method"], dmd["method"]
    assert avd == dmd


@pytest.mark.parametrize("name", ["tiny", "tiny-open"])
def test_the_teachers_preset_does_not_train_on_what_the_demo_holds_out(name: str) -> None:
    teacher, student = (load_config(TrainConfig, name, method=kind).data for kind in ("flow_matching", "avd"))
    assert isinstance(teacher, ShapesData)
    assert isinstance(student, ShapesData)
    assert teacher.seed != student.seed
    assert max(teacher.seed, student.seed) < HELD_OUT
