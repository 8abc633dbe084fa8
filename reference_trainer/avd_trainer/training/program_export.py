"""A student in the files of other programs: ComfyUI, LightX2V and Wan2.1's own code.

All three read the names of Wan2.1's first release. What else they want of a file was read in their loaders, and is
proven inside them by ``tests/hosts/test_programs.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from avd_core.sampling import SamplerKind
from avd_trainer.models.adapters import program_tensors
from avd_trainer.models.architecture import image_input
from avd_trainer.models.codecs.latent_space import LATENT_SPACES
from avd_trainer.models.transformer import without_memory
from avd_trainer.models.weight_names import HEAD_DIM, original_names
from avd_trainer.runtime.errors import UserError
from avd_trainer.training.export import (
    ABOUT,
    SavedRun,
    Weights,
    replace_export,
    student_adapters,
    student_transformer,
    write_json_in,
)
from avd_trainer.training.model_card import CARD, clip_size, model_card
from avd_trainer.training.pipeline_export import sources_of
from avd_trainer.training.program_usage import (
    LIGHTX2V,
    Written,
    comfyui_usage,
    lightx2v_usage,
    samples_in_one_chunk,
    wan_usage,
)

ProgramName = Literal["comfyui", "lightx2v", "wan"]


class Program(NamedTuple):
    """What a program does with a file.

    Attributes:
        title: Its name.
        assumed: Values of diffusers' configuration that it has in its code, and reads from no file.
        image_dim: The width that it assumes of an image embedding; None where the file says it.
        images_without_embedding: Whether it runs image to video of models that read no image embedding.
        images: Of students sampled how it runs image to video.
        adapters: Of students sampled how it loads LoRA; those of others are merged.
        usage: How to use what was written, in Markdown.
    """

    title: str
    assumed: Mapping[str, Any]
    image_dim: int | None
    images_without_embedding: bool
    images: tuple[SamplerKind, ...]
    adapters: tuple[SamplerKind, ...]
    usage: Callable[[SavedRun, Written], str]


_WAN = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": HEAD_DIM,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "pos_embed_seq_len": None,
    "eps": 1e-6,
}

_BOTH: tuple[SamplerKind, ...] = ("re-noise", "ode")

PROGRAMS: dict[ProgramName, Program] = {
    "comfyui": Program("ComfyUI", {**_WAN, "text_dim": 4096, "freq_dim": 256}, 1280, True, _BOTH, _BOTH, comfyui_usage),
    "lightx2v": Program("LightX2V", _WAN, None, True, ("ode",), ("ode",), lightx2v_usage),
    "wan": Program("Wan2.1's code", {**_WAN, "text_dim": 4096}, 1280, False, _BOTH, (), wan_usage),
}


def export_for_program(
    run: Path,
    output: Path,
    program: ProgramName,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    merge: bool = False,
    measures: str | None = None,
) -> None:
    """Write the student of a run as a program reads it, with ``README.md`` that says how, and ``export.json``.

    - ``comfyui``: ``NAME.safetensors``, or of a LoRA run its adapters, ``NAME-lora.safetensors``.
    - ``lightx2v``: the same and ``lightx2v.json``. Of a student that is noised anew at each step adapters are merged:
      the code that samples so does not find the layers of a released model.
    - ``wan``: ``diffusion_pytorch_model.safetensors`` and ``config.json``. It reads no adapters: they are merged.

    NAME is that of ``output``. Holds one model in memory, on the CPU.

    Args:
        run: The folder of a run that has saved a checkpoint; the run may be going on.
        output: Where to write; replaced if an earlier export is there.
        program: Which one.
        weights: ``ema`` for the averaged weights, ``student`` for those of the last update.
        step: The checkpoint of which step; None for the newest.
        dtype: Type of the weights.
        merge: Whether a LoRA student becomes a whole model.
        measures: What was measured of the student, in Markdown, for the model card; None if nothing was.

    Raises:
        UserError: If there is no such checkpoint, the program cannot run the student, or ``output`` cannot be written
            or holds something else.
    """
    name = output.resolve().name

    def write(saved: SavedRun, folder: Path) -> None:
        reader = PROGRAMS[program]
        _check(reader, saved)
        alone = saved.lora is not None and saved.config.sampled_by in reader.adapters and not merge
        file = _file_name(program, name, alone)
        tensors = _tensors(saved, weights, dtype, alone)
        if program == "lightx2v" and samples_in_one_chunk(saved):
            tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        if program == "wan":
            write_json_in(folder / "config.json", _wan_config(saved))
        if program == "lightx2v":
            write_json_in(folder / LIGHTX2V, _lightx2v_config(saved, file, alone))
        # So that `avd sample` finds what the folder lacks.
        lacking = {"pipelines": _found_again(sources_of(saved.config, saved.encoding))}
        base = {"base": _found_again([saved.config.teacher])[0]} if alone and saved.config.teacher is not None else {}
        write_json_in(folder / ABOUT, saved.about(run, weights) | saved.about_clips() | lacking | base)
        usage = reader.usage(saved, Written(name, file, alone))
        card = model_card(saved, weights, name, usage, adapters=alone, library=None, measures=measures)
        (folder / CARD).write_text(card, encoding="utf-8")

    replace_export(run, output, step, write)


def _check(program: Program, saved: SavedRun) -> None:
    space = saved.encoding.latent_space
    if space != "wan":
        raise UserError(
            f"{program.title} decodes latents of {LATENT_SPACES['wan']} and has no counterpart of "
            f"{LATENT_SPACES[space]}, in whose latents this run's student works. Leave --format out: avd sample and "
            "diffusers run it."
        )
    config, image = without_memory(saved.architecture).config, image_input(saved.architecture)
    if image is not None and saved.config.sampled_by not in program.images:
        raise UserError(
            f"{program.title} noises clips anew at each step in text to video alone, and this student, of method "
            f"{saved.config.method.kind}, is sampled so and reads an image. Pass --format comfyui, whose sampler lcm "
            "does so with images too, or leave --format out: avd sample and diffusers run it."
        )
    found = {**config, "patch_size": tuple(config["patch_size"])}
    wrong = [
        f"{key} {found[key]} and not {expected}" for key, expected in program.assumed.items() if found[key] != expected
    ]
    if image is not None and image.embedding_dim is None and not program.images_without_embedding:
        wrong.append("image to video without an image embedding")
    elif image is not None and image.embedding_dim not in (None, program.image_dim or image.embedding_dim):
        wrong.append(f"image_dim {image.embedding_dim} and not {program.image_dim}")
    if wrong:
        raise UserError(
            f"{program.title} cannot run this student: some of Wan2.1's values are in its code and are read from no "
            f"file, and this model has {', '.join(wrong)}. Leave --format out: avd sample and diffusers run it."
        )


def _file_name(program: ProgramName, name: str, adapters: bool) -> str:
    if program == "wan":
        return "diffusion_pytorch_model.safetensors"
    return f"{name}-lora.safetensors" if adapters else f"{name}.safetensors"


def _tensors(saved: SavedRun, weights: Weights, dtype: torch.dtype, adapters: bool) -> dict[str, Tensor]:
    if adapters:
        assert saved.lora is not None
        return program_tensors(student_adapters(saved, saved.lora, weights), dtype)
    parameters = dict(student_transformer(saved, weights, dtype).named_parameters())
    names = original_names(parameters)
    return {names[name]: parameter.detach() for name, parameter in parameters.items()}


def _found_again(sources: Iterable[str]) -> list[str]:
    """Sources with folders by their whole path, so that they are found from anywhere."""
    return [str(Path(source).resolve()) if Path(source).exists() else source for source in dict.fromkeys(sources)]


def _wan_config(saved: SavedRun) -> dict[str, Any]:
    """``config.json`` of ``wan.modules.model.WanModel``."""
    config = without_memory(saved.architecture).config
    return {
        "_class_name": "WanModel",
        "model_type": "t2v" if image_input(saved.architecture) is None else "i2v",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "eps": config["eps"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": config["in_channels"],
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "out_dim": config["out_channels"],
        "text_len": 512,
    }


def _lightx2v_config(saved: SavedRun, file: str, adapters: bool) -> dict[str, Any]:
    """A file for ``--config_json``. With ``sample_shift`` 1 its step list is the timesteps themselves."""
    width, height, frames = clip_size(saved)
    image = image_input(saved.architecture)
    steps = [round(timestep) for timestep in saved.timesteps]
    config = {
        "infer_steps": len(steps),
        "sample_shift": 1,
        "enable_cfg": False,
        "sample_guide_scale": 1,
        "target_width": width,
        "target_height": height,
        "target_video_length": frames,
        "fps": saved.about_clips()["fps"],
        "text_len": 512,
        "use_image_encoder": image is None or image.embedding_dim is not None,
        "self_attn_1_type": "flash_attn2",
        "cross_attn_1_type": "flash_attn2",
        "cross_attn_2_type": "flash_attn2",
        "cpu_offload": False,
        **({"lora_configs": [{"path": file, "strength": 1.0}]} if adapters else {"dit_original_ckpt": file}),
    }
    if samples_in_one_chunk(saved):
        chunk = {"num_frame_per_chunk": saved.state["latent_shape"][1], "denoising_step_list": steps}
        return {**config, "causal_rope_type": "wan_causal_rope", "ar_config": chunk}
    return {**config, "denoising_step_list": steps}
