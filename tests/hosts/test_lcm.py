from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from page_lines import assert_in_order, assignments, call, page_lines, with_lines

pytestmark = pytest.mark.hosts

FOLDER = "examples/consistency_distillation"
SCRIPTS = [
    "train_lcm_distill_sd_wds.py",
    "train_lcm_distill_sdxl_wds.py",
    "train_lcm_distill_lora_sd_wds.py",
    "train_lcm_distill_lora_sdxl.py",
    "train_lcm_distill_lora_sdxl_wds.py",
]


def test_the_script_steps_saves_and_continues(run_in_host: Callable[..., dict[str, Any]]) -> None:
    report = run_in_host("diffusers", "lcm.py")
    assert len(report["added"]) == 2
    assert report["entries"] == 2


def test_the_lines_pass_what_the_terms_take() -> None:
    create, term, _ = (code for _, _, code in page_lines("lcm.md"))
    assert call(create, "lcm_terms") == (["noise_scheduler", "solver.ddim_timesteps"], {})
    assert call(term, "from_prediction") == (
        [],
        {
            "prediction": "model_pred",
            "x_t": "noisy_model_input",
            "clips": "latents",
            "noise": "noise",
            "times": "start_timesteps",
        },
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_the_names_that_the_lines_read(checkout: Callable[[str], Path], script: str) -> None:
    source = (checkout("diffusers") / FOLDER / script).read_text()
    compile(with_lines(source, page_lines("lcm.md")), script, "exec")
    names = assignments(source, "main", "accelerator.backward(loss)")
    assert_in_order(
        names, ["noise_scheduler", "solver", "start_timesteps", "noise_pred", "model_pred", "target", "loss"]
    )
    assert {"latents", "noise", "noisy_model_input"} <= set(names)
    # Nothing overwrites what is read between the student's prediction and the loss.
    after = names[names.index("model_pred") + 1 :]
    assert not {"model_pred", "latents", "noise", "noisy_model_input", "start_timesteps"} & set(after)


def test_method_lcm_has_the_loss_and_the_gradient_of_the_authors_lines(
    run_in_host: Callable[..., dict[str, Any]],
) -> None:
    """Where the script is for another path of noise: in its notation."""
    assert run_in_host("diffusers", "agree_lcm.py")
