"""Recipes: what comes with the package, what a file may change, and mistakes in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from avd_trainer.config.loading import ConfigError
from avd_trainer.data.preparation.recipe import build_recipe, bundled_recipes, load_recipe
from toy_stages import TOYS


@pytest.mark.parametrize("name", bundled_recipes())
def test_a_bundled_recipe_is_valid_and_survives_being_written(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert next(iter(recipe.stages)) == "probe"


def test_the_papers_recipe_decides_in_the_papers_order() -> None:
    deciding = {
        name: chosen.settings.model_dump(include={"min", "max", "keep"}, exclude_none=True)
        for name, chosen in load_recipe("paper").stages.items()
        if name != "framing"  # whose limit is ours: the paper does not say what it does with upright videos
    }
    assert {name: values for name, values in deciding.items() if values} == {
        "size": {"min": 720},
        "hue": {"min": 0.6},
        "sharpness": {"min": 20},
        "flow": {"min": 0.2},
        "consistency": {"keep": 0.5},
        "aesthetics": {"keep": 0.5},
    }
    order = ["size", "hue", "sharpness", "flow", "consistency", "aesthetics"]
    assert [name for name, values in deciding.items() if values] == order


def test_a_file_changes_another_and_leaves_stages_out(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: tiny\nflow: off\nhue: {min: 2}\nclip: {frames: 21}\nsize:\n")
    (tmp_path / "more.yaml").write_text("extends: mine\nhue: {max: 5}\n")
    tiny, more = load_recipe("tiny"), load_recipe(tmp_path / "more.yaml", ["hue.keep=0.25", "repeats=off"])
    assert set(more.stages) == set(tiny.stages) - {"flow", "repeats"} | {"size"}
    hue = more.stages["hue"].settings.model_dump()
    assert (hue["min"], hue["max"], hue["keep"]) == (2, 5, 0.25)
    assert more.head.clip.frames == 21
    assert more.head.clip.fps == tiny.head.clip.fps


def test_digests_follow_what_results_depend_on() -> None:
    before = {name: chosen.digest for name, chosen in load_recipe("tiny").stages.items()}

    def changed(*overrides: str) -> set[str]:
        after = load_recipe("tiny", overrides).stages
        return {name for name, chosen in after.items() if chosen.digest != before[name]}

    assert changed("flow.min=3", "hue.keep=0.5", "duplicates.distance=1", "flow.time_limit=9", "memory_gb=2") == set()
    assert changed("flow.pairs=4") == {"flow"}
    assert changed("framing.sizes=[[64,64]]") == {"framing", "latents"}
    assert changed("caption.frames=4") == {"caption", "text"}
    # Clips of another length are other clips to all that look at them; files are cut as before.
    assert not changed("clip.frames=21") & {"probe", "cut", "framing"}
    assert changed("clip.frames=21") >= {"span", "hue", "flow", "latents"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: tiny\nhues: {}", "there is no stage hues: did you mean hue?"),
        ("extends: tiny\nhue: {least: 3}", "hue.least: there is no such field"),
        ("extends: tiny\nflow: {keep: 2}", "flow.keep: Input should be less than or equal to 1, got 2"),
        ("extends: tiny\nspan: off", "lacks the stage span"),
        ("extends: tiny\nprobe: off", "framing reads what probe found. Put it above framing, or leave framing out"),
        ("hue: {}\nspan: {}", "span reads what cut found"),
        ("extends: small", "small is neither a recipe .encode, paper, tiny. nor a YAML file"),
        ("extends: recipe", "extends itself: recipe -> recipe"),
        ("[1, 2]", "expected keys and values"),
        ("clip: {frames: 1}", "clip.frames: Input should be greater than or equal to 2, got 1"),
    ],
)
def test_mistakes_are_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_what_is_left_out_has_defaults() -> None:
    recipe = build_recipe(TOYS, {"brightness": None, "contrast": {"gain": 2}})
    assert recipe.head.clip.frames == 81
    assert recipe.stages["contrast"].settings.gain == 2  # type: ignore[attr-defined]


def test_the_papers_limits_have_the_settings_that_give_them_a_meaning() -> None:
    recipe = load_recipe("paper")
    settings = {name: chosen.settings.model_dump() for name, chosen in recipe.stages.items()}
    assert (recipe.head.clip.frames, recipe.head.clip.fps) == (81, 16.0)
    for name in ("hue", "sharpness"):
        assert (settings[name]["at"], settings[name]["short_side"]) == ((1, 21, 41, 61), 480)
    assert (settings["flow"]["algorithm"], settings["flow"]["unit_side"]) == ("farneback", 480)
    assert settings["aesthetics"]["frames"] == 8


def test_the_tiny_one_needs_no_weights() -> None:
    recipe = load_recipe("tiny")
    stages = [chosen.stage(chosen.settings, recipe.head.clip) for chosen in recipe.stages.values()]
    assert [stage.missing() for stage in stages] == [None] * len(stages)
