"""PCM's loss as its authors' script for Stable Diffusion 3 computes it, line by line, and as method pcm does."""

import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch

from agreement import (
    CLIPS,
    Given,
    asked_as_diffusers,
    clips,
    drawn,
    gradients,
    hold,
    new_method,
    report,
    share_times,
    small_model,
    statements,
    texts,
)
from avd_core import shift_timesteps
from page_lines import load_script

SCRIPT = Path("code/text_to_image_sd3/train_pcm_lora_sd3.py")
SHIFT = 3.0


def main(folder: Path) -> dict[str, float]:
    sys.path.insert(0, str(SCRIPT.parent.resolve()))
    script = load_script(folder / "script.py", SCRIPT.read_text())
    lines = statements(SCRIPT.read_text(), "noise = torch.randn_like(model_input)", "loss = torch.mean(")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    text, unconditional = texts()
    latents, found = clips(), {}
    student, teacher = small_model(1, trained=True), small_model(3)
    for points, phases in ((100, 4), (50, 2), (8, 8)):
        few_steps = shift_timesteps(torch.linspace(1000, 0, phases + 1)[:-1], SHIFT).tolist()
        options = {"few_steps": few_steps, "points": points, "shift": SHIFT}
        method = new_method("pcm", {"student": student, "teacher": teacher}, unconditional, **options)
        solver = script.EulerSolver(scheduler.sigmas.numpy()[::-1], 1000, euler_timesteps=points)
        share_times(method, solver)
        names = {
            **vars(script),
            "model_input": latents,
            "noise_scheduler": scheduler,
            "solver": solver,
            "transformer": asked_as_diffusers(student),
            "teacher_transformer": asked_as_diffusers(teacher),
            "prompt_embeds": text,
            "uncond_prompt_embeds": unconditional.expand(CLIPS, -1, -1),
            "pooled_prompt_embeds": text,  # which these models do not read
            "uncond_pooled_prompt_embeds": text,
            "weight_dtype": torch.bfloat16,
            "args": SimpleNamespace(
                num_euler_timesteps=points, multiphase=phases, not_apply_cfg_solver=False, huber_c=0.001
            ),
        }
        for seed in range(3):
            torch.manual_seed(seed)
            own = dict(names)
            exec(lines, own)
            own["loss"].backward()
            theirs = own["loss"], gradients(student)
            draws = Given(points=drawn(own["index"], points), points_noise=own["noise"])
            found[f"{phases} {seed}"] = hold(method, student, (latents, text), draws, theirs)
    return found


if __name__ == "__main__":
    report(main)
