"""PCM's own script for Stable Diffusion 3, with the lines of its page: two steps, a checkpoint, two more from it."""

import functools
import json
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from avd_integrations.consistency import PhasedConsistencyTerms
from by_hand import Calls, RegressionByHand, backward_losses, check_resume, check_two_steps, close, columns, shifted
from page_lines import load_script, page_lines, with_lines
from tiny_sd import save_tokenizer, text_config

SCRIPT = Path("code/text_to_image_sd3/train_pcm_lora_sd3.py")
DATA = '"/mnt/wangfuyun/cc3m"'  # the script's own folder of images, written into it
POINTS, PHASES = 4, 2


def save_tiny_sd3(folder: Path) -> None:
    torch.manual_seed(0)
    vocabulary = save_tokenizer(folder, "raw")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "raw")
    t5 = transformers.T5TokenizerFast(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("a", -3.0)]
    )
    config = text_config(vocabulary, projection_dim=16, layers=2)
    encoders = [transformers.CLIPTextModelWithProjection(config) for _ in range(2)]
    diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=len(t5), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        tokenizer_3=t5,
    ).save_pretrained(folder)


def save_images(folder: Path) -> None:
    """One picture in as many copies as a run needs, so that the order of reading does not matter."""
    folder.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    for i in range(8):
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cat")


def run(module: ModuleType, folder: Path, output: str, steps: int, *more: str) -> list[float]:
    """The script, from its command line on; returns the losses that it went back from."""
    sys.argv = [
        "script",
        f"--pretrained_teacher_model={folder / 'model'}",
        f"--output_dir={folder / output}",
        f"--max_train_steps={steps}",
        "--train_batch_size=2",
        "--resolution=16",
        f"--num_euler_timesteps={POINTS}",
        f"--multiphase={PHASES}",
        "--checkpointing_steps=2",
        "--validation_steps=1000",
        "--learning_rate=1e-3",
        "--lr_warmup_steps=0",
        "--seed=0",
        *more,
    ]
    module.args = module.parse_args()  # main() reads it as a global, too
    module.args.validation_prompt = None  # which it also reads, at its end, and does not define
    with backward_losses() as losses:
        module.main(module.args)
    return losses


def sigmas_by_hand(shift: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """The solver's points and where their phases end, from the paper's definition rather than from the solver."""
    sigmas = shifted(np.arange(1, 1001) / 1000, shift)
    points = sigmas[1000 // POINTS - 1 :: 1000 // POINTS]
    edges = [sigmas[0], *points[POINTS // PHASES - 1 : -1 : POINTS // PHASES]]
    return points, np.repeat(edges, POINTS // PHASES)


def loss_by_hand(regression: RegressionByHand, arguments: list[Tensor]) -> float:
    """The model's velocity goes in a straight line from what it saw to the phase's end."""
    x_end, x_t, clips, noise, index, _ = (a.double().numpy() for a in arguments)
    points, ends = sigmas_by_hand()
    index = index.astype(int)
    np.testing.assert_allclose(x_t, _mix(points[index], noise, clips), atol=1e-5)
    sigma, end = columns(points[index], ends[index], x_t)
    return regression((x_end - x_t) / (end - sigma), noise - clips, index.tolist())


def _mix(sigma: np.ndarray, noise: np.ndarray, clips: np.ndarray) -> np.ndarray:
    (sigma,) = columns(sigma, clips)
    return sigma * noise + (1 - sigma) * clips


def main(folder: Path) -> dict[str, Any]:
    save_tiny_sd3(folder / "model")
    save_images(folder / "images")
    source = SCRIPT.read_text()
    assert source.count(DATA) == 1
    source = source.replace(DATA, repr(str(folder / "images")))
    sys.path.insert(0, str(SCRIPT.parent.resolve()))
    plain = load_script(folder / "plain_script.py", source)
    script = load_script(folder / "script.py", with_lines(source, page_lines("pcm.md")[:3]))
    calls = Calls(PhasedConsistencyTerms)

    regression = RegressionByHand()
    by_hand = functools.partial(loss_by_hand, regression)
    check_two_steps(lambda: run(plain, folder, "plain", 2), lambda: run(script, folder, "run", 2), calls, by_hand)
    saved = calls.after[-1]
    for index, mean in regression.means.items():
        close(saved["terms.objective.regression.cache.means"][index], mean)

    # The script's LoRA weights moved, and elsewhere than without the term.
    weights = [load_file(folder / name / "pytorch_lora_weights.safetensors") for name in ("plain", "run")]
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert any(v.abs().sum() > 0 for k, v in weights[1].items() if "lora_B" in k)

    check_resume(lambda: run(script, folder, "run", 4, "--resume_from_checkpoint=latest"), calls, by_hand)
    return {"added": calls.losses, "entries": len(regression.means)}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(json.dumps(main(Path(sys.argv[1]))))
