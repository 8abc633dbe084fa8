"""CausVid's trainer, or that of the released AVD code, edited as docs/hosts/causvid.md says: steps, save, go on."""

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import self_forcing_cpu as stand_ins
from by_hand import noting
from page_lines import page_lines

scratch, released_avd = Path(sys.argv[1]), sys.argv[2] == "avd"
stand_ins.prepare(scratch)
blocks = page_lines("causvid.md")  # the class, the checkpoint; the class for the released AVD code
stand_ins.edit(scratch, "causvid/train_distillation.py", [blocks[2], blocks[1]] if released_avd else blocks[:2])
loader = stand_ins.Loader()
sys.modules["my_data"] = type(sys)("my_data")
sys.modules["my_data"].clips = loader

import causvid.dmd  # noqa: E402
import causvid.models  # noqa: E402
import causvid.train_distillation as host  # noqa: E402
import lmdb  # noqa: E402
from causvid.models.wan import wan_wrapper  # noqa: E402
from causvid.ode_data.create_lmdb_iterative import store_arrays_to_lmdb  # noqa: E402

from avd_core import AVDConfig  # noqa: E402
from avd_integrations.self_forcing import with_avd  # noqa: E402

stand_ins.on_cpu()
wan_wrapper.WanModel = stand_ins.Wan
causvid.models.TEXTENCODER_NAME_TO_CLASS["wan"] = stand_ins.TextEncoder
causvid.models.VAE_NAME_TO_CLASS["wan"] = stand_ins.VAE
original = causvid.dmd.DMD
matching, gradients, given, generated = [], [], [], []
# The edited module bound the original class; its methods are noted where they are looked up.
original.compute_distribution_matching_loss = noting(original.compute_distribution_matching_loss, matching)
original.generator_loss = noting(original.generator_loss, given)
if not released_avd:
    host.DMD.compute_distribution_matching_loss = stand_ins.noting_gradient(
        host.DMD.compute_distribution_matching_loss, matching, gradients
    )
host.DMD.generator_loss = noting(host.DMD.generator_loss, generated)


def data(name: str) -> Path:
    """What the host reads: prompts, or clips with prompts in its own kind of database, which opens once only."""
    if released_avd:  # its reader of clips has the size 60 x 106 in it
        path = scratch / "prompts.txt"
        path.write_text("a cat\na dog\na house\na tree\n")
        return path
    path = scratch / name
    clips = torch.cat([batch[0] for batch in loader.batches]).unsqueeze(1).half().numpy()
    prompts = [prompt for batch in loader.batches for prompt in batch[1]]
    with lmdb.open(str(path), map_size=2**24) as environment:
        store_arrays_to_lmdb(environment, {"latents": clips, "prompts": prompts})
        with environment.begin(write=True) as transaction:
            transaction.put(b"latents_shape", " ".join(map(str, clips.shape)).encode())
    return path


class Done(Exception):  # noqa: N818
    pass


def config(name: str, **changes: Any) -> Any:
    """The host's own file, smaller."""
    small = {
        "mixed_precision": False, "sharding_strategy": "no_shard", "seed": 3, "lr": 1e-2, "batch_size": 2,
        "data_path": str(data(name)), "dfake_gen_update_ratio": 1, "log_iters": 2, "gradient_checkpointing": False,
        "image_or_video_shape": [1, stand_ins.FRAMES, stand_ins.CHANNELS, stand_ins.SIZE, stand_ins.SIZE],
        "no_save": False, "no_visualize": True, "output_path": str(scratch / f"run_{name}"), "negative_prompt": "bad",
        "backward_simulation": released_avd,
    }  # fmt: skip
    base = OmegaConf.load("configs/wan_bidirectional_dmd_from_scratch.yaml")
    return OmegaConf.merge(base, OmegaConf.create(small | changes))


def train(trainer: Any) -> None:
    """The host's endless loop until it has saved after the third step."""
    save = trainer.save

    def save_and_leave() -> None:
        save()
        if trainer.step == 2:
            raise Done

    trainer.save = save_and_leave
    before = stand_ins.parameters(trainer.distillation_model.generator)
    for log in (matching, gradients, given, generated, stand_ins.Wan.seen, loader.given):
        log.clear()
    with contextlib.suppress(Done):
        trainer.train()
    assert not torch.equal(before, stand_ins.parameters(trainer.distillation_model.generator))


def check(trainer: Any, by_hand: stand_ins.ByHand) -> None:
    dmd = trainer.distillation_model
    # With gradient in a step: the student on noise, the student on clips, the online model.
    students = stand_ins.Wan.seen[1::3]
    assert len(matching) == len(given) == len(generated) == len(students) == 3
    for step, seen in enumerate(students):
        _, arguments, (host_loss, _) = given[step]
        if released_avd:
            clips, prompts = loader.given[step]
            context = dmd.text_encoder(text_prompts=prompts)["prompt_embeds"]
        else:
            clips, context = arguments["clean_latent"], arguments["conditional_dict"]["prompt_embeds"]
        regression = by_hand.regression(clips, seen, context)
        loss, log = generated[step][-1]
        assert math.isclose(log["avd/regression/loss"].item(), regression, rel_tol=1e-4), (log, regression)
        if released_avd:
            assert not any(name.startswith("avd/motion") for name in log)
            assert math.isclose(loss.item(), host_loss.item() + regression, rel_tol=1e-5)
            continue
        _, call, (matching_loss, _) = matching[step]
        motion = by_hand.motion(call["image_or_video"].detach(), gradients[step])
        assert math.isclose(log["avd/motion/loss"].item(), motion, rel_tol=1e-4), (log, motion)
        assert math.isclose(loss.item(), matching_loss.item() + motion + regression, rel_tol=1e-5)
    by_hand.check_cache(dmd.avd.objective.regression.cache)


trainer = host.Trainer(config("first"))
steps = trainer.distillation_model.denoising_step_list.tolist()
by_hand = stand_ins.ByHand(trainer.distillation_model.scheduler, steps)
train(trainer)
check(trainer, by_hand)

saved = Path(trainer.output_path) / "checkpoint_model_000002" / "model.pt"
assert set(torch.load(saved)) == {"generator", "critic", "avd"}
torch.distributed.destroy_process_group()
resumed = host.Trainer(config("second", generator_ckpt=str(saved)))
by_hand.check_cache(resumed.distillation_model.avd.objective.regression.cache)
trained, read = (stand_ins.parameters(t.distillation_model.generator) for t in (trainer, resumed))
assert torch.equal(trained, read)
train(resumed)
check(resumed, by_hand)

# Without clips, where the trainer reads prompts only.
dmd = with_avd(original, AVDConfig(motion=None))(config("third"), device=torch.device("cpu"))
text = dmd.text_encoder(text_prompts=["a"])
shape = [1, stand_ins.FRAMES, stand_ins.CHANNELS, stand_ins.SIZE, stand_ins.SIZE]
with pytest.raises(ValueError, match="reads prompts only"):
    dmd.generator_loss(shape, text, text, clean_latent=None)

print(json.dumps({"steps": steps, "means": sorted(by_hand.means.values())}))
