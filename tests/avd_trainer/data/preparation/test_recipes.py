"""The recipes that come with the package: the paper's values, and stages that take them."""

import pytest

from avd_trainer.data.preparation.recipe import bundled_recipes, load_recipe


def test_the_bundled_ones() -> None:
    assert bundled_recipes() == ("paper", "tiny")


@pytest.mark.parametrize("name", ["paper", "tiny"])
def test_their_stages_take_their_settings(name: str) -> None:
    recipe = load_recipe(name)
    assert {"probe", "cut", "span", "flow", "duplicates", "caption"} <= set(recipe.stages)
    for chosen in recipe.stages.values():
        chosen.stage(chosen.settings, recipe.head.clip)


def test_the_papers_values() -> None:
    """Sec. 6.2, and the order of its steps."""
    recipe = load_recipe("paper")
    settings = {name: chosen.settings.model_dump() for name, chosen in recipe.stages.items()}
    assert (recipe.head.clip.frames, recipe.head.clip.fps) == (81, 16.0)
    assert settings["size"]["min"] == 720
    for name, limit in (("hue", 0.60), ("sharpness", 20.0)):
        assert (settings[name]["at"], settings[name]["short_side"]) == ((1, 21, 41, 61), 480)
        assert settings[name]["min"] == limit
    assert (settings["flow"]["min"], settings["flow"]["unit_side"]) == (0.2, 480)
    assert settings["consistency"]["keep"] == settings["aesthetics"]["keep"] == 0.5
    assert settings["aesthetics"]["frames"] == 8
    order = [name for name in recipe.stages if name in ("size", "hue", "flow", "consistency", "aesthetics", "caption")]
    assert order == ["size", "hue", "flow", "consistency", "aesthetics", "caption"]


def test_the_tiny_one_needs_no_weights() -> None:
    recipe = load_recipe("tiny")
    assert [chosen.stage(chosen.settings, recipe.head.clip).missing() for chosen in recipe.stages.values()] == [
        None
    ] * len(recipe.stages)
