import ast

import pytest

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_trainer_steps_saves_and_continues(run_in_host, kind):
    report = run_in_host("DMD2", "dmd2.py", kind)
    assert len(report["added"]) == (2 if kind == "sd" else 6)
    assert len(report["means"]) == (1 if kind == "sd" else 4)


def test_the_trainer_sums_what_the_adapter_counts_on(checkout):
    """``loss_dm`` is in the generator's loss, and the guidance model is saved whole."""
    trainer = ast.parse((checkout("DMD2") / "main" / "train_sd.py").read_text())
    methods = {node.name: ast.unparse(node) for node in ast.walk(trainer) if isinstance(node, ast.FunctionDef)}
    step = methods["train_one_step"]
    assert "generator_loss += generator_loss_dict['loss_dm'] * self.args.dm_loss_weight" in step
    assert "real_train_dict = next(self.real_dataloader)" in step
    assert "self.fsdp_state_dict(self.model.guidance_model)" in methods["save"]
    assert "self.accelerator.save_state(output_path)" in methods["save"]
