from pathlib import Path

from avd_trainer.data.preparation.needs import package_missing, weights_missing


def test_what_is_at_hand_is_not_missing(clip_folder: Path) -> None:
    assert package_missing("flow", "numpy", "prepare") is None
    assert weights_missing("consistency", "clip", str(clip_folder)) is None


def test_a_package_names_its_extra() -> None:
    said = package_missing("flow", "no_such_package", "prepare")
    assert said is not None
    assert 'pip install "avd-core[prepare]"' in said


def test_weights_say_how_to_get_them(tmp_path: Path) -> None:
    hub = weights_missing("consistency", "dino", "nobody/no-such-model")
    assert hub is not None
    assert "hf download nobody/no-such-model" in hub
    folder = weights_missing("consistency", "dino", str(tmp_path))
    assert folder is not None
    assert "hf download" not in folder
    assert "consistency.dino" in folder
