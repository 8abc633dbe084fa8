import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avd_trainer.methods.dmd2 import DMD2MethodConfig

pytestmark = pytest.mark.hosts


def functions(path: Path) -> dict[str, str]:
    tree = ast.parse(path.read_text())
    return {node.name: ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_trainer_steps_saves_and_continues(run_in_host: Callable[..., dict[str, Any]], kind: str) -> None:
    report = run_in_host("DMD2", "dmd2.py", kind)
    assert len(report["added"]) == (2 if kind == "sd" else 6)
    assert len(report["means"]) == (1 if kind == "sd" else 4)


def test_the_trainer_sums_what_the_adapter_counts_on(checkout: Callable[[str], Path]) -> None:
    """``loss_dm`` is in the generator's loss, and the guidance model is saved whole, its buffers as they are."""
    methods = functions(checkout("DMD2") / "main" / "train_sd.py")
    step = methods["train_one_step"]
    assert "generator_loss += generator_loss_dict['loss_dm'] * self.args.dm_loss_weight" in step
    assert "real_train_dict = next(self.real_dataloader)" in step
    assert "self.fsdp_state_dict(self.model.guidance_model)" in methods["save"]
    assert "self.accelerator.save_state(output_path)" in methods["save"]
    assert "mixed_precision='no'" in methods["__init__"]
    assert "MixedPrecision" not in (checkout("DMD2") / "main" / "train_sd.py").read_text()


def test_the_model_draws_the_first_of_its_steps(checkout: Callable[[str], Path]) -> None:
    methods = functions(checkout("DMD2") / "main" / "sd_unified_model.py")
    assert "torch.randint(0, self.num_denoising_step, " in methods["prepare_denoising_data"]
    assert "self.denoising_step_list.to(noise.device)[indices]" in methods["prepare_denoising_data"]
    assert "torch.randint(low=0, high=self.num_denoising_step, " in methods["sample_backward"]
    assert "self.denoising_step_list[selected_step]" in methods["sample_backward"]


def test_the_losses_of_method_dmd2_are_its_own(run_in_host: Callable[..., dict[str, Any]]) -> None:
    """Values and gradients on the same tensors, weights and draws; what is compared is named in the program."""
    report = run_in_host("DMD2", "dmd2_losses.py")
    assert len(report) == 9
    assert {name: value for name, value in report.items() if not value <= 1e-5} == {}


def test_the_weights_of_method_dmd2_are_those_of_its_script_for_four_steps(
    checkout: Callable[[str], Path],
) -> None:
    (script,) = (checkout("DMD2") / "experiments" / "sdxl").glob("*lr5e-7_denoising4step*")
    options = dict(re.findall(r"--(\w+) ([\d.e-]+)", script.read_text()))
    config = DMD2MethodConfig()
    assert float(options["gen_cls_loss_weight"]) == config.gan_weight
    assert float(options["guidance_cls_loss_weight"]) == config.discriminator_weight
    assert float(options["diffusion_gan_max_timestep"]) == config.gan_timesteps.high
    assert int(options["dfake_gen_update_ratio"]) == config.online_updates
