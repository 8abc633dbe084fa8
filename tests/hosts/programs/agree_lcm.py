"""LCM's loss as its authors' script computes it, line by line, and as method lcm does.

The script is for models of the variance-preserving path, ours are of rectified flow. At one ratio of clip to noise the
two differ by a factor ``n``, with ``n^2 = (1 - s)^2 + s^2``: so the script is given the table of that path, and a model
that undoes the factor before it answers.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor

from agreement import (
    CLIPS,
    SHAPE,
    Answers,
    Given,
    clips,
    drawn,
    gradients,
    hold,
    new_method,
    report,
    small_model,
    statements,
    texts,
)
from avd_trainer.models.condition import Condition
from avd_trainer.models.transformer import VelocityModel
from page_lines import load_script

SCRIPT = Path("examples/consistency_distillation/train_lcm_distill_sd_wds.py")
POINTS, W = 50, 4.0


def main(folder: Path) -> dict[str, float]:
    script = load_script(folder / "script.py", SCRIPT.read_text())
    lines = statements(SCRIPT.read_text(), "topk = noise_scheduler", 'if args.loss_type == "l2":')
    text, unconditional = texts()
    latents, found = clips(), {}
    for huber in (None, 0.001):
        student, average, teacher = small_model(1, trained=True), small_model(2), small_model(3)
        models = {"student": student, "ema": average, "teacher": teacher}
        method = new_method("lcm", models, unconditional, guidance_scale=1 + W, huber=huber)

        # The script counts timesteps from 19 to 999 by 20, and from its lowest to 0.
        times = torch.zeros(1000)
        times[19::20] = method.config.trajectory()[1:]
        sigmas = times / 1000
        norm = ((1 - sigmas) ** 2 + sigmas**2).sqrt()
        scheduler = diffusers.DDPMScheduler(prediction_type="sample")
        scheduler.alphas_cumprod = ((1 - sigmas) / norm) ** 2

        def on_its_path(
            model: VelocityModel, times: Tensor = times, sigmas: Tensor = sigmas, norm: Tensor = norm
        ) -> Any:
            def call(x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Answers:
                s, n = (table[timesteps].view(-1, 1, 1, 1) for table in (sigmas, norm))
                x_t = (n * x.float()).unflatten(1, SHAPE[:2])
                velocity = model(x_t, times[timesteps], Condition(encoder_hidden_states))
                return Answers(sample=(x_t - s.unsqueeze(-1) * velocity).flatten(1, 2))

            return call

        names = {
            **vars(script),
            "latents": latents.flatten(1, 2),  # the script's are images
            "bsz": CLIPS,
            "noise_scheduler": scheduler,
            "solver": script.DDIMSolver(scheduler.alphas_cumprod.numpy(), 1000, POINTS),
            "alpha_schedule": scheduler.alphas_cumprod.sqrt(),
            "sigma_schedule": (1 - scheduler.alphas_cumprod).sqrt(),
            "unet": on_its_path(student),
            "target_unet": on_its_path(average),
            "teacher_unet": on_its_path(teacher),
            "encoded_text": {"prompt_embeds": text},
            "uncond_prompt_embeds": unconditional.expand(CLIPS, -1, -1),
            "time_cond_proj_dim": 256,
            "weight_dtype": torch.float32,
            # Where autocast does nothing: on a CPU the teacher would compute in bfloat16.
            "accelerator": SimpleNamespace(device=torch.device("cuda")),
            "args": SimpleNamespace(
                num_ddim_timesteps=POINTS, timestep_scaling_factor=10.0, w_min=W, w_max=W, huber_c=0.001,
                loss_type="l2" if huber is None else "huber",
            ),
        }  # fmt: skip
        for seed in range(3):
            torch.manual_seed(seed)
            own = {**names, "encoded_text": dict(names["encoded_text"])}
            exec(lines, own)
            own["loss"].backward()
            theirs = own["loss"], gradients(student)
            draws = Given(points=drawn(own["index"], POINTS), points_noise=own["noise"].unflatten(1, SHAPE[:2]))
            found[f"{huber} {seed}"] = hold(method, student, (latents, text), draws, theirs)
    return found


if __name__ == "__main__":
    report(main)
