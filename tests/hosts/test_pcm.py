import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from page_lines import PAGES, assert_in_order, assignments, call, page_lines, with_lines

pytestmark = pytest.mark.hosts

FLOW = [
    "text_to_image_sd3/train_pcm_lora_sd3.py",
    "text_to_image_sd3/train_pcm_lora_sd3_adv.py",
    "text_to_image_sd3/train_pcm_lora_sd3_adv_stochastic.py",
]
DDIM = [
    "text_to_image_sd15/train_pcm_lora_sd15.py",
    "text_to_image_sd15/train_pcm_lora_sd15_adv.py",
    "text_to_image_sdxl/train_pcm_lora_sdxl_adv.py",
]
READ = {
    "flow": {
        "prediction": "model_pred",
        "x_t": "noisy_model_input",
        "clips": "model_input",
        "noise": "noise",
        "index": "index",
        "end_index": "end_index",
    },
    "ddim": {
        "prediction": "noise_pred",
        "x_t": "noisy_model_input",
        "clips": "latents",
        "noise": "noise",
        "times": "start_timesteps",
    },
}


def blocks_for(script: str) -> list[tuple[str, str, str]]:
    """What a reader of the page inserts into one of the six scripts."""
    *flow, logs, ddim_create, ddim_term, adversarial_logs = page_lines("pcm.md")
    create, term = flow if script in FLOW else (ddim_create, ddim_term)
    if "_adv" not in script:
        return [create, term, logs]
    ((where, anchor),) = re.findall(r"The second block goes (after) `([^`]+)`", (PAGES / "pcm.md").read_text())
    return [create, (where.capitalize(), anchor, term[2]), adversarial_logs]


@pytest.fixture
def source(checkout: Callable[[str], Path]) -> Callable[[str], str]:
    return lambda script: (checkout("Phased-Consistency-Model") / "code" / script).read_text()


def test_the_script_steps_saves_and_continues(run_in_host: Callable[..., dict[str, Any]]) -> None:
    report = run_in_host("Phased-Consistency-Model", "pcm.py")
    assert len(report["added"]) == 2
    assert report["entries"] >= 2


@pytest.mark.parametrize("script", FLOW + DDIM)
def test_the_lines_pass_what_the_terms_take_and_fit(source: Callable[[str], str], script: str) -> None:
    blocks = blocks_for(script)
    compile(with_lines(source(script), blocks), script, "exec")
    create, term = (code for _, _, code in blocks[:2])
    assert call(create, "pcm_terms") == (["noise_scheduler", "solver"], {})
    assert call(term, "from_prediction") == ([], READ["flow" if script in FLOW else "ddim"])


@pytest.mark.parametrize("script", FLOW + DDIM)
def test_every_script_has_the_names_that_the_lines_read(source: Callable[[str], str], script: str) -> None:
    read = READ["flow" if script in FLOW else "ddim"]
    prediction, read = read["prediction"], set(read.values())
    # Up to the student's own backward, which is the last before its optimizer's step.
    names = assignments(source(script), "main", "optimizer.step()")
    assert {"noise_scheduler", "solver"} | read <= set(names)
    if script in FLOW:
        assert_in_order(
            names, ["solver", "noise", "index", "noisy_model_input", "model_pred", "end_index", "target", "loss"]
        )
    # Nothing overwrites them after the student's prediction, but for its way to the phase's end, which is the target's.
    after = names[names.index(prediction) + 1 :]
    assert read & set(after) == ({"model_pred", "end_index"} if script in FLOW else set())


@pytest.mark.parametrize("script", [script for script in FLOW + DDIM if "_adv" in script])
def test_adversarial_scripts_have_the_terms_on_the_generators_turn(source: Callable[[str], str], script: str) -> None:
    tree = ast.parse(with_lines(source(script), blocks_for(script)))
    turns = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "global_step % 2 == 0"]
    (turn,) = [n for n in turns if "accelerator.backward(loss)" in ast.unparse(n)]
    discriminators, generators = (ast.unparse(ast.Module(part, [])) for part in (turn.body, turn.orelse))
    assert "from_prediction" not in discriminators
    places = [generators.index(line) for line in ("loss += g_loss", "from_prediction(", "accelerator.backward(loss)")]
    assert places == sorted(places)


def test_the_logs_of_a_discriminators_turn_have_no_terms() -> None:
    *_, (_, _, code) = page_lines("pcm.md")
    names = {"logs": {"d_loss": 1.0}}
    exec(code, names)
    assert names["logs"] == {"d_loss": 1.0}
    with pytest.raises(NameError, match="avd_output"):
        exec(code, {"logs": {"loss_cm": 1.0}})


def test_method_pcm_has_the_loss_and_the_gradient_of_the_authors_lines(
    run_in_host: Callable[..., dict[str, Any]],
) -> None:
    assert run_in_host("Phased-Consistency-Model", "agree_pcm.py")
