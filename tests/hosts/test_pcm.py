import pytest

from page_lines import assert_in_order, assignments, page_lines, with_lines

pytestmark = pytest.mark.hosts

FLOW = ["train_pcm_lora_sd3.py", "train_pcm_lora_sd3_adv.py", "train_pcm_lora_sd3_adv_stochastic.py"]
DDIM = [
    "text_to_image_sd15/train_pcm_lora_sd15.py",
    "text_to_image_sd15/train_pcm_lora_sd15_adv.py",
    "text_to_image_sdxl/train_pcm_lora_sdxl_adv.py",
]


def test_the_script_steps_saves_and_continues(run_in_host):
    report = run_in_host("Phased-Consistency-Model", "pcm.py")
    assert len(report["added"]) == 2
    assert report["entries"] >= 2


@pytest.mark.parametrize("script", FLOW)
def test_every_flow_script_has_the_names_that_the_lines_read(checkout, script):
    source = (checkout("Phased-Consistency-Model") / "code" / "text_to_image_sd3" / script).read_text()
    if "_adv" in script:
        # The discriminator's loss goes back first; the page says to take the second.
        assert [line.strip() for line in source.splitlines()].count("accelerator.backward(loss)") == 2
    else:
        compile(with_lines(source, page_lines("pcm.md")), script, "exec")
    names = assignments(source, "main", "optimizer.step()")
    assert_in_order(
        names, ["solver", "noise", "index", "noisy_model_input", "model_pred", "end_index", "target", "loss"]
    )
    assert "model_input" in names


@pytest.mark.parametrize("script", DDIM)
def test_every_ddim_script_keeps_the_output_of_its_model(checkout, script):
    source = (checkout("Phased-Consistency-Model") / "code" / script).read_text()
    names = assignments(source, "main", "progress_bar.update(1)")
    assert "solver" in names
    assert {"noise_pred", "noisy_model_input", "latents", "noise", "start_timesteps"} <= set(names)
    after = names[names.index("noise_pred") + 1 :]
    assert not {"noise_pred", "latents", "noise", "noisy_model_input", "start_timesteps"} & set(after)
