"""diffusers' own LCM script, with the lines of its page: two steps, a checkpoint, and two more from it."""

import functools
import io
import json
import logging
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from avd_integrations import HostTerms
from by_hand import Calls, RegressionByHand, backward_losses, check_resume, check_two_steps, close, columns
from page_lines import load_script, page_lines, with_lines
from tiny_sd import save_tiny_sd

SCRIPT = Path("examples/consistency_distillation/train_lcm_distill_sd_wds.py")


def save_shard(path: Path) -> None:
    """One picture in as many copies as a run needs, so that the order of reading does not matter."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    with tarfile.open(path, "w") as shard:
        for i in range(16):
            for name, data in ((f"{i:04}.png", buffer.getvalue()), (f"{i:04}.txt", b"a cat")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))


def run(module: ModuleType, folder: Path, output: str, steps: int, *more: str) -> list[float]:
    """The script, from its command line on; returns the losses that it went back from."""
    sys.argv = [
        "script",
        f"--pretrained_teacher_model={folder / 'model'}",
        f"--train_shards_path_or_url={folder / 'shard.tar'}",
        f"--output_dir={folder / output}",
        f"--max_train_steps={steps}",
        "--max_train_samples=16",
        "--train_batch_size=2",
        "--dataloader_num_workers=1",
        "--resolution=16",
        "--num_ddim_timesteps=2",
        "--checkpointing_steps=2",
        "--learning_rate=1e-3",
        "--lr_warmup_steps=0",
        "--seed=0",
        *more,
    ]
    with backward_losses() as losses:
        module.main(module.parse_args())
    return losses


def loss_by_hand(regression: RegressionByHand, arguments: list[Tensor]) -> float:
    """``model_pred`` is the clean latent that the student predicts; its noise follows from what it saw."""
    x_0, x_t, clips, noise, times = (a.double().numpy() for a in arguments)
    # Stable Diffusion's path: the roots of beta rise evenly.
    table = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[times.astype(int)]
    alpha, sigma = columns(np.sqrt(table), np.sqrt(1 - table), x_t)
    np.testing.assert_allclose(x_t, alpha * clips + sigma * noise, atol=1e-4)
    velocity = (x_t - alpha * x_0) / sigma - x_0
    return regression(velocity, noise - clips, times.tolist())


def main(folder: Path) -> dict[str, Any]:
    save_tiny_sd(folder / "model")
    save_shard(folder / "shard.tar")
    source = SCRIPT.read_text()
    plain = load_script(folder / "plain_script.py", source)
    script = load_script(folder / "script.py", with_lines(source, page_lines("lcm.md")))
    calls = Calls(HostTerms)

    regression = RegressionByHand()
    by_hand = functools.partial(loss_by_hand, regression)
    check_two_steps(lambda: run(plain, folder, "plain", 2), lambda: run(script, folder, "run", 2), calls, by_hand)
    saved = calls.after[-1]
    for time, mean in regression.means.items():
        means, grid = (saved[f"objective.regression.cache.{name}"] for name in ("means", "timesteps"))
        close(means[grid.index(time)], mean)

    # The student moved, and elsewhere than without the term.
    students = [
        diffusers.UNet2DConditionModel.from_pretrained(folder / name, subfolder="unet").conv_in.weight
        for name in ("model", "plain", "run")
    ]
    assert not torch.equal(students[0], students[2])
    assert not torch.equal(students[1], students[2])

    check_resume(lambda: run(script, folder, "run", 4, "--resume_from_checkpoint=latest"), calls, by_hand)
    return {"added": calls.losses, "entries": len(regression.means)}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(json.dumps(main(Path(sys.argv[1]))))
