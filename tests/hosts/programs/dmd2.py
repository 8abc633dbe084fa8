"""DMD2's own trainer, with the lines of its page: three steps, its save, and one more step in a new trainer from it.

``sd`` trains a one-step student of Stable Diffusion and saves accelerate's state; ``sdxl`` a four-step student of SDXL,
and saves weights alone, as with ``--fsdp``.
"""

import inspect
import json
import sys
import types
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from avd_core import LossOutput
from avd_integrations import HostTerms
from by_hand import RegressionByHand, close, columns, state_of
from page_lines import load_script, page_lines, with_lines
from tiny_sd import save_tiny_sd
from without_gpu import stand_in_for_wandb

ONE_STEP_TIME = 399  # as in the host's one-step scripts for SDXL


def save_images(path: Path, count: int = 6) -> None:
    """Latents of real images in the host's database, large enough to be seen in x_t where alpha is 0.07."""
    images = np.random.default_rng(1).normal(0, 6, (count, 4, 8, 8)).astype(np.float16)
    with lmdb.open(str(path), map_size=2**22) as database, database.begin(write=True) as writing:
        writing.put(b"latents_shape", " ".join(map(str, images.shape)).encode())
        for i, image in enumerate(images):
            writing.put(f"latents_{i}_data".encode(), image.tobytes())
            writing.put(f"prompts_{i}_data".encode(), b"a cat")


def share_databases() -> None:
    """The host never closes its database, and one process may open it once."""
    opened, open_one = {}, lmdb.open
    lmdb.open = lambda path, **options: opened.setdefault(path, open_one(path, **options) if path not in opened else 0)


def with_small_classifier(base: type[nn.Module]) -> type[nn.Module]:
    """The host's classifier has 1280 channels, for Stable Diffusion's own U-Net."""

    class Small(base):
        def __init__(self, args: Any, accelerator: Any) -> None:
            super().__init__(args, accelerator)
            self.guidance_model.cls_pred_branch = nn.Conv2d(16, 1, 4)

    return Small


def parse(module: types.ModuleType, folder: Path, *more: str) -> Any:
    options = {
        "model_id": folder / "model",
        "output_path": folder / "output",
        "log_path": folder / "log",
        "cache_dir": folder / "cache",
        "train_prompt_path": folder / "prompts.txt",
        "real_image_path": folder / "images",
        "wandb_name": "run",
        "batch_size": 2,
        "latent_resolution": 8,
        "resolution": 16,
        "grid_size": 1,
        "num_workers": 0,
        "warmup_step": 0,
        "conditioning_timestep": ONE_STEP_TIME,
        "generator_lr": 1e-3,
        "guidance_lr": 1e-3,
        "gen_cls_loss_weight": 1e-3,
        "guidance_cls_loss_weight": 1e-3,
    }
    flags = ["--initialie_generator", "--cls_on_clean_image", "--gen_cls_loss", *more]
    sys.argv[1:] = [*(f"--{name}={value}" for name, value in options.items()), *flags]
    return module.parse_args()


def wrap_in_fsdp(trainer: Any, folder: Path) -> None:
    """As accelerate does for ``--fsdp`` on GPUs, so that the trainer saves as it does there."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    for name in ("feedforward_model", "guidance_model"):
        wrapped = FullyShardedDataParallel(
            getattr(trainer.model, name),
            sharding_strategy=ShardingStrategy.NO_SHARD,
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
        setattr(trainer.model, name, wrapped)
    trainer.fsdp = True


class Watch:
    """What the terms were called with, and what the host's own loss was before they were added."""

    def __init__(self, base: type[nn.Module]) -> None:
        self.arguments, self.before, self.after, self.added = [], [], [], []
        on_prediction, host = HostTerms.on_prediction, base.forward
        names = list(inspect.signature(on_prediction).parameters)[1:]

        def recorded(terms: HostTerms, **given: Tensor) -> LossOutput:
            self.arguments.append([given[name].detach().clone() for name in names])
            self.before.append(state_of(terms))
            result = on_prediction(terms, **given)
            self.after.append(state_of(terms))
            return result

        def hosts(model: Any, *args: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
            losses, logs = host(model, *args, **options)
            self.host_loss = losses.get("loss_dm")
            return losses, logs

        HostTerms.on_prediction, base.forward = recorded, hosts
        hosts.__signature__ = inspect.signature(host)


def loss_by_hand(regression: RegressionByHand, table: np.ndarray, arguments: list[Tensor]) -> float:
    """The host's generator predicts noise."""
    noise_prediction, x_t, images, _, times = (a.double().numpy() for a in arguments)
    alpha, sigma = columns(np.sqrt(table[times.astype(int)]), np.sqrt(1 - table[times.astype(int)]), x_t)
    predicted = noise_prediction - (x_t - sigma * noise_prediction) / alpha
    target = (x_t - alpha * images) / sigma - images
    return regression(predicted, target, times.tolist())


def step(trainer: Any, watch: Watch) -> list[float]:
    """One of the trainer's steps; returns by how much ``loss_dm`` grew."""
    grown = []
    forward = type(trainer.model).forward

    def seen(model: Any, *args: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        losses, logs = forward(model, *args, **options)
        if "loss_dm" in losses:
            grown.append((losses["loss_dm"] - watch.host_loss).item())
        return losses, logs

    trainer.model.forward = types.MethodType(seen, trainer.model)
    try:
        trainer.train_one_step()
    finally:
        del trainer.model.forward
    trainer.step += 1
    return grown


def main(folder: Path, kind: str) -> dict[str, Any]:
    save_tiny_sd(folder / "model", xl=kind == "sdxl")
    save_images(folder / "images")
    (folder / "prompts.txt").write_text("a cat\na dog\na hat\na bat\n")
    for name in ("output", "cache", "wandb"):
        (folder / name).mkdir()
    stand_in_for_wandb(folder / "wandb")
    share_databases()

    import main.sd_unified_model
    import main.train_sd

    watch = Watch(main.sd_unified_model.SDUniModel)
    source = with_lines(Path(main.train_sd.__file__).read_text(), page_lines("dmd2.md"))
    module = load_script(folder / "trainer_with_lines.py", source)
    module.SDUniModel = with_small_classifier(module.SDUniModel)

    steps = {ONE_STEP_TIME: True}
    flags, back = [], "--checkpoint_path"
    if kind == "sdxl":
        steps = {999: True, 749: False, 499: False, 249: False}
        flags = ["--sdxl", "--denoising", "--num_denoising_step=4", "--backward_simulation"]
        back = "--ckpt_only_path"
    trainer = module.Trainer(parse(module, folder, "--dfake_gen_update_ratio=2", *flags))
    trainer.step = 2  # step 0 draws pictures for wandb, by a call that newer matplotlib has not
    table = trainer.model.alphas_cumprod.double().numpy()
    start = {k: v.clone() for k, v in trainer.model.feedforward_model.state_dict().items()}
    grown = [step(trainer, watch) for _ in range(3 if kind == "sd" else 11)]
    # The generator is updated in every second step, and the term is there only then.
    assert [len(g) for g in grown] == [1, 0] * (len(grown) // 2) + [1]
    regression = RegressionByHand()
    for arguments, (added,) in zip(watch.arguments, [g for g in grown if g], strict=True):
        close(loss_by_hand(regression, table, arguments), added, 1e-3, 1e-5)  # a difference of float32 sums
        # What the generator saw is what the host shows it: noise alone at the first step, noised images at others.
        for x_t, image, time in zip(*arguments[1:3], arguments[4].int().tolist(), strict=True):
            noise = x_t if steps[time] else (x_t - table[time] ** 0.5 * image) / (1 - table[time]) ** 0.5
            assert abs(noise.mean()) < 0.3
            assert 0.8 < noise.std() < 1.2
            assert abs(np.corrcoef(noise.flatten(), image.flatten())[0, 1]) < 0.25
    assert max(max(g) for g in grown if g) > 0.1
    assert len(set(regression.means)) == (1 if kind == "sd" else 4)
    moved = trainer.model.feedforward_model.state_dict()
    assert any(not torch.equal(start[k], moved[k]) for k in start)
    assert all(torch.isfinite(v).all() for v in moved.values())

    if kind == "sdxl":
        wrap_in_fsdp(trainer, folder)
    trainer.save()
    checkpoint = next(Path(trainer.output_path).glob("checkpoint_model_*"))
    saved = watch.after[-1]
    for time, mean in zip(steps, saved["objective.regression.cache.means"], strict=True):
        close(mean, regression.means[time])

    other = module.Trainer(parse(module, folder, "--seed=1", f"{back}={checkpoint}", *flags))
    assert state_of(other.model.guidance_model.avd) == saved
    (added,) = step(other, watch)
    assert watch.before[-1] == saved
    close(loss_by_hand(regression, table, watch.arguments[-1]), added, 1e-3, 1e-5)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return {"added": [g for g in grown if g], "means": list(regression.means.values())}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
