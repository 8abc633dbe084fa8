from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from avd_trainer.config.loading import ConfigError, load_config, presets, save_config
from avd_trainer.config.sections import Section
from avd_trainer.methods.dmd2 import DMD2MethodConfig
from avd_trainer.methods.scm import SCMMethodConfig
from avd_trainer.models.discriminators.discriminator import HeadConfig
from avd_trainer.training.config import TrainConfig


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_overrides_reach_nested_fields() -> None:
    overrides = ["method.regression.weight=0.25", "method.motion=null", "method.student.optimizer.lr=3e-5"]
    method = load_config(TrainConfig, "tiny", overrides).model_dump()["method"]
    assert method["regression"]["weight"] == 0.25
    assert method["motion"] is None
    assert method["student"]["optimizer"]["lr"] == 3e-5


def test_what_a_part_of_a_section_leaves_out_has_the_default_of_where_it_stands() -> None:
    """DMD2's head is light and learns at 2e-6; HeadConfig alone is semantic, 4e-6, with other betas."""
    whole = DMD2MethodConfig(few_steps=(1000.0,)).head
    assert (whole.kind, whole.optimizer.lr) == ("light", 2e-6)
    assert HeadConfig().kind == "semantic"
    some = DMD2MethodConfig.model_validate({"few_steps": [1000], "head": {"width": 64, "optimizer": {"lr": 1e-3}}}).head
    assert some == whole.model_copy(update={"width": 64, "optimizer": whole.optimizer.model_copy(update={"lr": 1e-3})})
    assert some.optimizer.betas != HeadConfig().optimizer.betas
    scm = SCMMethodConfig.model_validate({"few_steps": [1000], "student": {"optimizer": {"lr": 1e-3}}})
    assert scm.student.optimizer.weight_decay == SCMMethodConfig(few_steps=(1000.0,)).student.optimizer.weight_decay > 0


def test_of_sections_of_several_kinds_a_default_of_another_kind_is_no_default() -> None:
    class Round(Section):
        kind: Literal["round"] = "round"
        radius: float = 1.0

    class Square(Section):
        kind: Literal["square"] = "square"
        side: float = 1.0

    class Picture(Section):
        shape: Annotated[Round | Square, Field(discriminator="kind")] = Round(radius=3.0)
        frame: Square | None = Square(side=2.0)

    found = Picture.model_validate({"shape": {"kind": "square"}, "frame": {}})
    assert (found.shape, found.frame) == (Square(), Square(side=2.0))
    assert Picture.model_validate({"frame": None}).frame is None


@pytest.mark.parametrize(
    ("method", "told"),
    [("data-forcing", None), ("dmd3", "Did you mean dmd"), ("data_forcin", "Did you mean data_forcing?"), ("xyz", "")],
)
def test_a_method_may_be_spelled_with_a_dash_and_a_misspelled_one_is_answered(method: str, told: str | None) -> None:
    if told is None:
        assert load_config(TrainConfig, "tiny", [], method=method).method.kind == "data_forcing"
        return
    with pytest.raises(ConfigError) as raised:
        load_config(TrainConfig, "tiny", [], method=method)
    assert told in str(raised.value)
    assert ("Did you mean" in str(raised.value)) == bool(told)


def test_a_misspelled_preset_is_answered() -> None:
    with pytest.raises(ConfigError, match=r"nor a YAML file.*Did you mean tiny-open\?"):
        load_config(TrainConfig, "tiny_open")


def test_values_are_replaced_and_taken_where_there_are_none() -> None:
    data = {"data": {"kind": "shards", "path": "here"}}
    replaced = load_config(TrainConfig, "tiny", replace=data, missing={"seed": 3, "max_steps": 1})
    assert replaced.model_dump()["data"]["path"] == (Path("here"),)
    assert (replaced.seed, replaced.max_steps) == (3, 200)


@pytest.mark.parametrize("kind", ["avd", "flow_matching"])
def test_a_saved_configuration_loads_as_the_same_and_says_which_command_wrote_it(tmp_path: Path, kind: str) -> None:
    config = load_config(TrainConfig, "tiny", ["seed=7"], method=kind)
    path = tmp_path / "config.yaml"
    save_config(config, path, "avd train")
    assert path.read_text().startswith("command: avd train\n")
    assert load_config(TrainConfig, str(path)) == config
    assert load_config(TrainConfig, str(path), method=kind) == config


# --- Presets and methods


def test_a_preset_of_several_methods_is_of_avd_unless_told_otherwise() -> None:
    assert load_config(TrainConfig, "tiny").method.kind == "avd"
    assert load_config(TrainConfig, "tiny", method="dmd").method.kind == "dmd"
    data = {"data": {"kind": "shards", "path": "clips"}}
    assert presets()["wan2.1"] == ("frame_interpolation",)
    assert load_config(TrainConfig, "wan2.1", replace=data).method.kind == "frame_interpolation"


def test_a_method_that_a_preset_has_no_values_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Preset wan2\.1 has no values for method 'avd'\. It has frame_interp"):
        load_config(TrainConfig, "wan2.1", method="avd")


def test_a_file_says_its_method_itself(tmp_path: Path) -> None:
    path = write(
        tmp_path, "method: {kind: dmd}\nteacher: bundled:tiny\nmax_steps: 1\nbatch_size: 1\ndata: {kind: shapes}"
    )
    assert load_config(TrainConfig, path, method="dmd").method.kind == "dmd"
    with pytest.raises(ConfigError, match=r"is of method dmd, and --method says avd\. Leave --method out for a file"):
        load_config(TrainConfig, path, method="avd")


def test_a_file_may_extend_a_preset_and_changes_single_values_of_it(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: tiny/avd\nbatch_size: 3\nmethod:\n  motion:\n    weight: 0.7\n")
    preset = load_config(TrainConfig, "tiny").model_dump()
    preset["batch_size"] = 3
    preset["method"]["motion"]["weight"] = 0.7
    assert load_config(TrainConfig, path).model_dump() == preset


def test_what_extends_an_extending_preset_has_the_values_of_all_three() -> None:
    """tiny/avd changes tiny/dmd; so does what changes it."""
    data = {"data": {"kind": "shards", "path": "clips"}}
    small, large = (load_config(TrainConfig, f"wan2.1-{size}", replace=data).model_dump() for size in ("1.3b", "14b"))
    assert small.pop("teacher") != large.pop("teacher")
    assert small == large


@pytest.mark.parametrize("base", ["tiny", "tiny/dmd3", "huge/avd", "tiny/avd/more", "[tiny]"])
def test_a_preset_that_is_not_there_cannot_be_extended(tmp_path: Path, base: str) -> None:
    path = write(tmp_path, f"extends: {base}\n")
    with pytest.raises(
        ConfigError, match=r"config\.yaml: extends .*, expected one of tiny/avd, .*tiny/dmd, .*wan2\.1-14b/dmd"
    ):
        load_config(TrainConfig, path)


# --- Mistakes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=0", r"  batch_size: .*greater than or equal to 1, got 0"),
        ("method.regression.sharpnes=3", r"  method\.regression\.sharpnes: there is no such field"),
        ("objective.motion.floor=3", r"  objective: there is no such field"),
        ("method.student.optimizer.lr=fast", r"  method\.student\.optimizer\.lr: .*valid number.*got 'fast'"),
        ("data.clips=1", r"  data\.clips: .*greater than or equal to 2, got 1"),
        ("data.kind=films", r"  data\.kind: .*'films'"),
        ("method.kind=dmd", r"--set method\.kind leaves .* Choose a method by --method KIND"),
        ("method.motion.floor=.nan", r"  method\.motion\.floor: .*finite number"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, "tiny", [override])


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)batch_size.*seed|seed.*batch_size"):
        load_config(TrainConfig, "tiny", ["batch_size=0", "seed=-1"])


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'huge' is neither a preset \(tiny, .*\) nor a YAML file"):
        load_config(TrainConfig, "huge")


@pytest.mark.parametrize("text", ["max_steps: [", "- a\n- list\n", "just words", "", "method: avd"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(TrainConfig, write(tmp_path, text))
