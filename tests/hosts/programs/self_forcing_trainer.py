"""Self-Forcing's trainer, edited as docs/hosts/self_forcing.md says, takes steps, saves and goes on."""

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

import self_forcing_cpu as stand_ins
from by_hand import noting
from page_lines import page_lines

scratch = Path(sys.argv[1])
stand_ins.prepare(scratch)
stand_ins.edit(scratch, "trainer/distillation.py", page_lines("self_forcing.md"))
loader = stand_ins.Loader()
sys.modules["my_data"] = type(sys)("my_data")
sys.modules["my_data"].clips = loader

import model.base  # noqa: E402
import model.dmd  # noqa: E402
import trainer.distillation as host  # noqa: E402
import utils.wan_wrapper  # noqa: E402
from pipeline import SelfForcingTrainingPipeline  # noqa: E402

stand_ins.on_cpu()
utils.wan_wrapper.WanModel = utils.wan_wrapper.CausalWanModel = stand_ins.Wan
model.base.WanTextEncoder, model.base.WanVAEWrapper = stand_ins.TextEncoder, stand_ins.VAE
matching, gradients = [], []
model.dmd.DMD.compute_distribution_matching_loss = noting(model.dmd.DMD.compute_distribution_matching_loss, matching)
# The edited trainer's is the adapter's class, which overrides the host's.
host.DMD.compute_distribution_matching_loss = stand_ins.noting_gradient(
    host.DMD.compute_distribution_matching_loss, matching, gradients
)
(scratch / "prompts.txt").write_text("a cat\na dog\na house\na tree\n")


class SmallPipeline(SelfForcingTrainingPipeline):
    """The host's, with caches of keys and values for the tiny transformer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_transformer_blocks, self.kv_cache_size = 1, 1


model.base.SelfForcingTrainingPipeline = SmallPipeline


class Done(Exception):  # noqa: N818
    pass


def config(**changes: Any) -> Any:
    """The host's own files, smaller."""
    base = OmegaConf.merge(*(OmegaConf.load(f"configs/{n}.yaml") for n in ("default_config", "self_forcing_dmd")))
    small = {
        "generator_ckpt": "", "mixed_precision": False, "sharding_strategy": "no_shard", "seed": 3, "lr": 1e-2,
        "data_path": str(scratch / "prompts.txt"), "batch_size": 1, "dfake_gen_update_ratio": 1, "log_iters": 3,
        "image_or_video_shape": [1, stand_ins.FRAMES, stand_ins.CHANNELS, stand_ins.SIZE, stand_ins.SIZE],
        "no_save": False, "no_visualize": True, "logdir": str(scratch / "run"), "disable_wandb": True,
        "gradient_checkpointing": False, "negative_prompt": "bad", "config_name": "small",
    }  # fmt: skip
    return OmegaConf.merge(base, OmegaConf.create(small | changes))


def train(trainer: Any) -> list[dict[str, float]]:
    """The host's endless loop until it saves."""
    losses, step, save = [], trainer.fwdbwd_one_step, trainer.save

    def noting_step(batch: Any, train_generator: bool) -> dict[str, Tensor]:
        log = step(batch, train_generator)
        if train_generator:
            losses.append({name: value.item() for name, value in log.items() if value.ndim == 0})
        return log

    def save_and_leave() -> None:
        save()
        raise Done

    trainer.fwdbwd_one_step, trainer.save = noting_step, save_and_leave
    before = stand_ins.parameters(trainer.model.generator)
    for log in (matching, gradients, stand_ins.Wan.seen, loader.given):
        log.clear()
    with contextlib.suppress(Done):
        trainer.train()
    assert not torch.equal(before, stand_ins.parameters(trainer.model.generator))
    return losses


def check(trainer: Any, losses: list[dict[str, float]], by_hand: stand_ins.ByHand) -> None:
    # The critic sees its own samples with gradient as well: one call of each kind a step, the student's first.
    students = stand_ins.Wan.seen[::2]
    assert len(losses) == len(matching) == len(gradients) == len(loader.given) == len(students) == 3
    for log, (_, arguments, (host_loss, _)), gradient, (clips, prompts), seen in zip(
        losses, matching, gradients, loader.given, students, strict=True
    ):
        context = trainer.model.text_encoder(text_prompts=prompts)["prompt_embeds"]
        regression = by_hand.regression(clips, seen, context)
        motion = by_hand.motion(arguments["image_or_video"].detach(), gradient)
        assert math.isclose(log["avd/regression/loss"], regression, rel_tol=1e-4), (log, regression)
        assert math.isclose(log["avd/motion/loss"], motion, rel_tol=1e-4), (log, motion)
        assert math.isclose(log["generator_loss"], host_loss.item() + regression + motion, rel_tol=1e-5)
    by_hand.check_cache(trainer.model.avd.objective.regression.cache)


trainer = host.Trainer(config())
steps = [float(step) for step in trainer.model.denoising_step_list]
assert [round(step, 1) for step in steps] == [1000.0, 937.5, 833.3, 625.0]  # warped
by_hand = stand_ins.ByHand(trainer.model.scheduler, steps)
by_hand_steps = trainer.model.avd.objective.regression.cache.timesteps.tolist()
assert by_hand_steps == [torch.tensor(step).item() for step in steps]
check(trainer, train(trainer), by_hand)

saved = scratch / "run" / "checkpoint_model_000003" / "model.pt"
assert set(torch.load(saved)) == {"generator", "critic", "avd"}
torch.distributed.destroy_process_group()
resumed = host.Trainer(config(generator_ckpt=str(saved), logdir=str(scratch / "more")))
by_hand.check_cache(resumed.model.avd.objective.regression.cache)
assert torch.equal(stand_ins.parameters(resumed.model.generator), stand_ins.parameters(trainer.model.generator))
check(resumed, train(resumed), by_hand)

print(json.dumps({"steps": steps, "means": sorted(by_hand.means.values())}))
