"""DCM's two steps for Wan as its authors' scripts take them, and as method dcm does."""

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
    Given,
    asked_as_diffusers,
    clips,
    drawn,
    gradients,
    hold,
    loss_of,
    new_method,
    report,
    share_times,
    small_model,
    texts,
)
from avd_trainer.models.condition import Condition
from avd_trainer.models.discriminators.discriminator import HeadConfig, build_head
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
    normalised = script.normalize_dit_input("wan", latents)
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
    found, special = {}, {"alone": 0, "before others": 0}
    for seed, count in [(seed, CLIPS) for seed in range(30)] + [(seed, 1) for seed in range(30)]:
        own = normalised[:count]
        torch.manual_seed(seed)
        noise, index = torch.randn_like(own), torch.randint(BOUNDARY, POINTS, (count,))
        first = int(index[0]) == BOUNDARY
        if seed > 2 and not first:
            continue
        theirs = step_of_authors(script, "distill_one_step", seed, latents[:count], **options)[0]
        draws = Given(points=drawn(index - BOUNDARY, POINTS - BOUNDARY), points_noise=noise)
        batch = own, text[:count]
        if first and count > 1:
            # Where the first clip of a batch is at the lowest point, theirs takes all of them one step, and not to
            # the phase's end. With the paper, and with a batch of one as they train, each clip goes by its own point.
            assert abs(loss_of(method, *batch, draws).value.item() - theirs) > 1e-3 * theirs
            special["before others"] += 1
            continue
        special["alone"] += first
        found[f"{count} {seed}"] = hold(method, student, batch, draws, (torch.tensor(theirs), seen.gradients))
    assert all(special.values()), special
    return found


def detail(folder: Path, latents: Tensor) -> dict[str, float]:
    script = load(folder, "detail")
    normalised = script.normalize_dit_input("wan", latents)
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
        """A teacher whose features are read by their code: of each block, and what its output layers make of them."""
        answer = asked_as_diffusers(model)
        script.USE_PEFT_BACKEND = False  # which they do not import

        def call(x: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
            if not options.get("output_features"):
                return answer(x, timesteps, encoder_hidden_states)
            # Each block's, where theirs are every second's.
            options["output_features_stride"] = 1
            inputs = (model.module, x.float(), timesteps.float(), encoder_hidden_states)
            _, predictions, features = script.wan_forward_origin(*inputs, **options)
            return None, predictions, (list(features), Condition(encoder_hidden_states))

        return call

    generator = Stepping(student, asked_as_diffusers(student))
    judge = Stepping(head, lambda seen: [head(*seen)])
    judge.head_num, judge.num_h_per_head = 1, 1
    options = {
        "transformer": generator, "optimizer": generator, "teacher_transformer": teach(teacher),
        "discriminator": judge, "discriminator_optimizer": judge, "adv_weight": 0.1, "discriminator_head_stride": 2,
        "noise_scheduler": scheduler, "solver": solver,
    }  # fmt: skip
    found = {}
    for seed in range(3):
        torch.manual_seed(seed)
        noise, index = torch.randn_like(normalised), torch.randint(0, BOUNDARY, (CLIPS,))
        judged = torch.cat([torch.randint(0, BOUNDARY, (1,)) for _ in range(CLIPS)])
        judged_noise = torch.randn_like(normalised)
        theirs, _, theirs_of_judge, _ = step_of_authors(script, "distill_one_step_adv", seed, latents, **options)
        draws = Given(
            points=drawn(index, BOUNDARY), points_noise=noise, judged_points=drawn(judged, BOUNDARY),
            judged_noise=judged_noise,
        )  # fmt: skip
        batch = normalised, text
        found[f"{seed}"] = hold(method, student, batch, draws, (theirs, generator.gradients), part="detail")
        theirs = theirs_of_judge, judge.gradients
        found[f"discriminator {seed}"] = hold(method, head, batch, draws, theirs, role="discriminator")
    return found


def main(folder: Path) -> dict[str, dict[str, float]]:
    stand_in_for_absent_packages()
    latents = clips()
    return {"semantic": semantic(folder, latents), "detail": detail(folder, latents)}


if __name__ == "__main__":
    report(main)
