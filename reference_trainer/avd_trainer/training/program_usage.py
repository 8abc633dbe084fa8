"""How a person uses an exported student in another program: a section of its model card."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from avd_trainer.models.architecture import image_input
from avd_trainer.models.schedulers import closest_even_shift
from avd_trainer.training.export import SavedRun
from avd_trainer.training.model_card import clip_size, numbers, public_name

LIGHTX2V = "lightx2v.json"
"""In an export for LightX2V: its configuration of a run."""
LIGHTX2V_COMMIT = "f8aee98"
"""The version of LightX2V (August 2026) that its exports were proven on."""


class Written(NamedTuple):
    """What lies in an export's folder.

    Attributes:
        name: The folder's.
        file: With the weights, within it.
        adapters: Whether it has adapters, and not a whole model.
    """

    name: str
    file: str
    adapters: bool


def diffusers_usage(saved: SavedRun, missing: Collection[str]) -> str:
    """Of a whole pipeline, or of one without the parts in ``missing``."""
    width, height, frames = clip_size(saved)
    image = image_input(saved.architecture) is not None
    sample = f'`avd sample FOLDER --prompt "..."{" --image FILE" if image else ""} --output clip.mp4`'
    if saved.encoding.latent_space != "wan":
        return f"""
## Clips

{sample}. Its text encoder and codec are in `avd-core[trainer]`, and diffusers has no such parts.
"""
    if missing:
        return f"""
## Clips

This folder lacks {", ".join(missing)}, which clips need. Whoever has the run exports it again, with a Wan pipeline in
diffusers' layout: `avd export RUN --output FOLDER --pipeline SOURCE`. Then: {sample}.
"""
    size = f"height={height}, width={width}, num_frames={frames}, num_inference_steps={len(saved.timesteps)}"
    load_image = "from diffusers.utils import load_image\n" if image else ""
    open_image = 'image = load_image("FILE")\n' if image else ""
    return f"""
## In diffusers

```python
import torch
from diffusers import DiffusionPipeline
{load_image}
pipeline = DiffusionPipeline.from_pretrained("FOLDER", torch_dtype=torch.bfloat16).to("cuda")
{open_image}torch.manual_seed(0)
frames = pipeline({"image=image, " if image else ""}prompt="...", {size}, guidance_scale=1.0).frames[0]
```

The scheduler of the folder is as close to the student's timesteps as one of diffusers' own can be. The exact ones, with
`avd-core` installed: `pipeline.scheduler = FewStepScheduler.from_config(pipeline.scheduler.config)`, of
`avd_integrations.diffusers`. And {sample}.
"""


def comfyui_usage(saved: SavedRun, written: Written) -> str:
    """Nodes and settings."""
    file, adapters = written.file, written.adapters
    steps, (width, height, frames) = len(saved.timesteps), clip_size(saved)
    shift, error = closest_even_shift(saved.timesteps)
    image = image_input(saved.architecture) is not None
    folder = "loras" if adapters else "diffusion_models"
    base = public_name(saved.config.teacher or "")
    load = (
        f"*Load Diffusion Model* (`UNETLoader`) with the model that the LoRA was trained on (`{base}`, in ComfyUI's "
        f"files), then `LoraLoaderModelOnly` with `{file}`, `strength_model` 1.0"
        if adapters
        else f"*Load Diffusion Model* (`UNETLoader`) with `{file}`, `weight_dtype` default"
    )
    latents = (
        "*WanImageToVideo* (`WanImageToVideo`), with *CLIP Vision Encode* (`CLIPVisionEncode`) of the image where the "
        f"model reads one, of {width} x {height}, length {frames}; positive, negative and latent come from it"
        if image
        else f"*Empty HunyuanVideo 1.0 Latent* (`EmptyHunyuanLatentVideo`) of {width} x {height}, length {frames}"
    )
    sampler = {"re-noise": "lcm", "ode": "euler"}[saved.config.sampled_by]
    off = f"timesteps are off by up to {error:.0f} of 1000" if error >= 0.5 else "the timesteps are the student's"
    first = saved.timesteps[0]
    weaker = (
        ""
        if first == 1000
        else f"\nThe student's first step is at {first:g} and takes noise of full strength. ComfyUI multiplies "
        f"the noise by\n{first / 1000:g} there, so clips differ from those of `avd sample`.\n"
    )
    text = f"""
## In ComfyUI

Copy `{file}` to `ComfyUI/models/{folder}/`. Text encoder (umt5_xxl), VAE (wan_2.1_vae) and, for image to video, CLIP
vision (clip_vision_h) are those of Wan2.1. Then connect these nodes, found in the menu by title or, in brackets, id:

1. {load}.
2. *CLIP Text Encode (Prompt)* (`CLIPTextEncode`) of the prompt as positive; the same node as negative, which is not
   used at cfg 1.
3. {latents}.
4. `SamplerCustom`: `add_noise` on, `cfg` 1.0, with `KSamplerSelect` `{sampler}` and `ManualSigmas`
   `{numbers([*saved.timesteps, 0.0], 1e-3)}`.
5. *VAE Decode* (`VAEDecode`) of its output, with the VAE.
{weaker}
With *KSampler* in place of step 4: `ModelSamplingSD3` with `shift` {shift:g} behind the model, then `steps` {steps},
`cfg` 1.0, `sampler_name` {sampler}, `scheduler` simple, `denoise` 1.0: {off}.
"""
    return text + (_lora_elsewhere(file) if adapters else "")


def samples_in_one_chunk(saved: SavedRun) -> bool:
    """Whether LightX2V runs a student by its code of Self-Forcing, with the clip as the one chunk.

    Of its schedulers of Wan that one alone noises a clip anew for the next step; that of distilled models follows the
    velocity. In one chunk each frame attends to all, as in the model itself.
    """
    return saved.config.sampled_by == "re-noise"


def lightx2v_usage(saved: SavedRun, written: Written) -> str:
    """Where files go, and the command."""
    file, adapters = written.file, written.adapters
    task = "t2v" if image_input(saved.architecture) is None else "i2v --image_path IMAGE"
    base = public_name(saved.config.teacher or "")
    has = "" if adapters else ", whose `config.json`, text encoder and VAE are read"
    whole = all(timestep == round(timestep) for timestep in saved.timesteps)
    rounded = "" if whole else " LightX2V takes whole timesteps, so they are rounded."
    one_chunk = samples_in_one_chunk(saved)
    chunk = """
The student is noised anew at each step. In LightX2V its code of Self-Forcing does that, here with the whole clip as one
chunk: for another `target_video_length` make `num_frame_per_chunk` (length - 1) / 4 + 1. It keeps the keys and values
of all frames in memory, and runs the model once more than there are steps. `--model_cls wan2.1_distill` would follow
the velocity, which is wrong for this student.
"""
    text = f"""
## In LightX2V

MODEL is a folder with `{base}` in the layout of Wan2.1's first release{has}.
Run the command inside this folder, with LightX2V's in PYTHONPATH: `{LIGHTX2V}` names `{file}` without a path.

```
python -m lightx2v.infer --model_cls {"wan2.1_sf" if one_chunk else "wan2.1_distill"} --task {task} \\
    --model_path MODEL --config_json {LIGHTX2V} --prompt "..." --save_result_path clip.mp4
```

`{LIGHTX2V}` has the student's steps. `sample_shift` stays 1, and `enable_cfg` false.{rounded} Change the types of
attention to what is installed, and without flashinfer add `"rope_type": "torch_complex_rope"`.
{chunk if one_chunk else ""}
This was proven on LightX2V's commit `{LIGHTX2V_COMMIT}`. Older versions read other files and options.
"""
    return text + (_lora_elsewhere(file) if adapters else "")


def _lora_elsewhere(file: str) -> str:
    return f"""
ComfyUI, LightX2V and diffusers read the same file; in diffusers:
`pipeline.load_lora_weights(FOLDER, weight_name="{file}")`. `B` contains alpha / rank, so the strength is 1 everywhere.
"""


def wan_usage(saved: SavedRun, written: Written) -> str:
    """A loop, since its own sampler has many steps."""
    image = image_input(saved.architecture) is not None
    given = ", clip_fea=clip_fea, y=[y]" if image else ""
    images = ", `clip_fea` and `y` are the image's" if image else ""
    following = {
        "re-noise": """x_0 = x - now / 1000 * velocity
        x = (1 - following / 1000) * x_0 + following / 1000 * torch.randn_like(x_0)""",
        "ode": "x = x + (following - now) / 1000 * velocity",
    }[saved.config.sampled_by]
    return f"""
## In Wan2.1's code

The files replace those of the same names in a checkpoint of the first release. Its `generate.py` has no few-step
sampler: this loop takes its place. `context` holds the text encoder's output of the prompt{images}.

```python
import torch
from wan.modules.model import WanModel

model = WanModel.from_pretrained("{written.name}").eval().to("cuda")
timesteps = [{numbers(saved.timesteps)}, 0]
x = torch.randn({", ".join(map(str, saved.state["latent_shape"]))}, device="cuda")
with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
    for now, following in zip(timesteps, timesteps[1:]):
        t = torch.tensor([now], device="cuda")
        velocity = model([x], t=t, context=context, seq_len=x[0].numel() // 4{given})[0]
        {following}
```

`WanVAE.decode([x])` makes the clip of it.
"""
