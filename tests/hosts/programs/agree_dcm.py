"""DCM's two steps for Wan as its authors' scripts take them, and as method dcm does."""

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from torch import Tensor

from agreement import (
    ARCHITECTURE,
    CLIPS,
    SHAPE,
    Given,
    agree,
    asked_as_diffusers,
    drawn,
    gradients,
    loss_of,
    new_method,
    share_times,
    small_model,
    texts,
)
from avd_trainer.models.condition import Condition
from avd_trainer.models.discriminators.discriminator import HeadConfig, build_head
from avd_trainer.models.features import block_outputs
from avd_trainer.models.transformer import VelocityModel
from dcm import stand_in_for_absent_packages
from page_lines import load_script

POINTS, BOUNDARY, SHIFT, W = 50, 35, 17.0, 5.0
BLOCKS = (0, 1)


class Stepping:
    """A model, its optimizer and what schedules that, as the scripts use them: keeps what it would step on."""

    def __init__(self, model: Any, answer: Any = None) -> None:
        self.module, self.answer = getattr(model, "module", model), answer

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.answer(*inputs, **options)

    def clip_grad_norm_(self, _: float) -> Tensor:
        return torch.zeros(())

    def requires_grad_(self, _: bool) -> None:
        """Which of the two is trained is told by which of them steps."""

    def step(self) -> None:
        if any(parameter.grad is not None for parameter in self.module.parameters()):
            self.gradients = gradients(self.module)

    def zero_grad(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None


def load(folder: Path, expert: str) -> ModuleType:
    script = load_script(folder / f"{expert}.py", Path(f"fastvideo/distill_dcm_wan_{expert}_expert.py").read_text())
    script.dist = SimpleNamespace(all_reduce=lambda *_, **__: None, ReduceOp=dist.ReduceOp)  # of one rank
    return script


def solver_of(script: ModuleType) -> tuple[Any, Any]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return scheduler, script.EulerSolver(scheduler.sigmas.numpy()[::-1], 1000, euler_timesteps=POINTS)


def step_of_authors(script: ModuleType, function: str, seed: int, latents: Tensor, **options: Any) -> Any:
    """One step; ``options`` are what the two scripts' have not in common."""
    text, unconditional = texts()

    def loader() -> Iterator[tuple[Tensor, Tensor, None, Tensor]]:
        yield latents, text[: len(latents)], None, torch.ones(len(latents), len(text))

    arguments = {
        "model_type": "wan", "loader": loader(),
        "lr_scheduler": SimpleNamespace(step=lambda: None), "noise_random_generator": None, "sp_size": 1,
        "max_grad_norm": 1.0, "uncond_prompt_embed": unconditional, "uncond_prompt_mask": None,
        "num_euler_timesteps": POINTS, "multiphase": 1, "not_apply_cfg_solver": False, "distill_cfg": W, "cur_step": 1,
    }  # fmt: skip
    torch.manual_seed(seed)
    return getattr(script, function)(**arguments, **options)


def semantic(folder: Path, latents: Tensor) -> dict[str, float]:
    script = load(folder, "semantic")
    clips = script.normalize_dit_input("wan", latents)
    text, unconditional = texts()
    student, teacher = small_model(1, trained=True), small_model(3)
    method = new_method("dcm", {"student": student, "teacher": teacher}, unconditional, detail=None)
    scheduler, solver = solver_of(script)
    share_times(method, solver)
    seen = Stepping(student, asked_as_diffusers(student))
    options = {
        "transformer": seen, "optimizer": SimpleNamespace(zero_grad=seen.zero_grad, step=seen.step),
        "ema_transformer": None, "gradient_accumulation_steps": 1, "ema_decay": 0.95, "pred_decay_weight": 0.0,
        "pred_decay_type": "l1", "hunyuan_teacher_disable_cfg": False,
        "teacher_transformer": asked_as_diffusers(teacher), "noise_scheduler": scheduler, "solver": solver,
    }  # fmt: skip
    report, special = {}, {"alone": 0, "before others": 0}
    for seed, count in [(seed, CLIPS) for seed in range(30)] + [(seed, 1) for seed in range(30)]:
        own = clips[:count]
        torch.manual_seed(seed)
        noise, index = torch.randn_like(own), torch.randint(BOUNDARY, POINTS, (count,))
        first = int(index[0]) == BOUNDARY
        if seed > 2 and not first:
            continue
        theirs = step_of_authors(script, "distill_one_step", seed, latents[:count], **options)[0]
        draws = Given(points=drawn(index - BOUNDARY, POINTS - BOUNDARY), points_noise=noise)
        loss = loss_of(method, own, text[:count], draws)
        loss.backward(1)
        found = gradients(student)
        if first and count > 1:
            # Where the first clip of a batch is at the lowest point, theirs takes all of them one step, and not to
            # the phase's end. With the paper, and with a batch of one as they train, each clip goes by its own point.
            assert abs(loss.value.item() - theirs) > 1e-3 * theirs
            special["before others"] += 1
            continue
        special["alone"] += first
        report[f"loss {count} {seed}"] = agree(loss.value, torch.tensor(theirs))
        report[f"gradient {count} {seed}"] = agree(found, seen.gradients)
    assert all(special.values()), special
    return report


def detail(folder: Path, latents: Tensor) -> dict[str, float]:
    script = load(folder, "detail")
    clips = script.normalize_dit_input("wan", latents)
    text, unconditional = texts()
    student, teacher = small_model(1, trained=True), small_model(3)
    config = HeadConfig(kind="light", blocks=BLOCKS, width=64)
    torch.manual_seed(4)
    head = build_head(config, dict(teacher.module.config) | ARCHITECTURE.model_dump())
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)  # logits beyond 1: both sides would nearly cancel
    method = new_method(
        "dcm",
        {"student": student, "teacher": teacher, "discriminator": head},
        unconditional,
        detail={"after": 0, "head": config},
    )
    scheduler, solver = solver_of(script)
    share_times(method, solver)

    def teach(model: VelocityModel) -> Any:
        """Their teacher, of which features are read before and behind its last layers; ours are read before."""
        answer = asked_as_diffusers(model)

        def call(x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
            if not options.get("output_features"):
                return answer(x, timesteps, encoder_hidden_states)
            condition = Condition(encoder_hidden_states)
            features = block_outputs(model, x.float(), timesteps.float(), condition, BLOCKS)
            return None, torch.stack(features), (features, condition)

        return call

    generator = Stepping(student, asked_as_diffusers(student))
    judge = Stepping(head, lambda seen: [head(*seen)])
    judge.head_num, judge.num_h_per_head = 1, 1
    options = {
        "transformer": generator, "optimizer": generator, "teacher_transformer": teach(teacher),
        "discriminator": judge, "discriminator_optimizer": judge, "adv_weight": 0.1, "discriminator_head_stride": 2,
        "noise_scheduler": scheduler, "solver": solver,
    }  # fmt: skip
    report = {}
    for seed in range(3):
        torch.manual_seed(seed)
        noise, index = torch.randn_like(clips), torch.randint(0, BOUNDARY, (CLIPS,))
        judged = torch.cat([torch.randint(0, BOUNDARY, (1,)) for _ in range(CLIPS)])
        judged_noise = torch.randn_like(clips)
        theirs, _, theirs_of_judge, _ = step_of_authors(script, "distill_one_step_adv", seed, latents, **options)
        draws = Given(
            points=drawn(index, BOUNDARY), points_noise=noise, judged_points=drawn(judged, BOUNDARY),
            judged_noise=judged_noise,
        )  # fmt: skip
        loss = loss_of(method, clips, text, draws, part="detail")
        loss.backward(1)
        found = gradients(student)
        report[f"loss {seed}"] = agree(loss.value, theirs)
        report[f"gradient {seed}"] = agree(found, generator.gradients)
        loss = loss_of(method, clips, text, draws, role="discriminator")
        loss.backward(1)
        report[f"loss of the discriminator {seed}"] = agree(loss.value, theirs_of_judge)
        report[f"gradient of the discriminator {seed}"] = agree(gradients(head), judge.gradients)
    return report


def main(folder: Path) -> dict[str, dict[str, float]]:
    stand_in_for_absent_packages()
    torch.manual_seed(0)
    latents = torch.randn(CLIPS, *SHAPE)
    return {"semantic": semantic(folder, latents), "detail": detail(folder, latents)}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*CUDA.*")
    print(json.dumps(main(Path(sys.argv[1]))))
