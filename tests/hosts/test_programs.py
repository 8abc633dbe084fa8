"""Exported students inside the programs that people run them in: every name is read, and the prediction is the same.

Of each kind of model there is a short run of all weights, and one with LoRA. What they predict in diffusers, and the
clip that they make of given noise, are compared with what the program makes of the exported files.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from avd_core.sampling import SamplerKind
from avd_trainer.data.examples import Example
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData
from avd_trainer.methods.dmd import DMDMethodConfig
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import few_step_rollout
from avd_trainer.models.schedulers import closest_even_shift
from avd_trainer.models.text_encoders.hashed import HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel
from avd_trainer.models.weight_names import original_names
from avd_trainer.runtime.ranks import join_ranks
from avd_trainer.training.pipeline_export import export_pipeline
from avd_trainer.training.program_export import ProgramName, export_for_program
from avd_trainer.training.run import train
from runs import both, tiny_config

pytestmark = pytest.mark.hosts

SHAPE = (16, 3, 4, 6)
GRID = (1000, 900, 757, 522)
TEXT_LENGTH, TEXT_DIM = 512, 4096
IMAGE_TOKENS, IMAGE_DIM = 257, 1280
LORA = {"rank": 4, "alpha": 6.0}
# What Wan2.1 has and programs read from no file; otherwise as small as can be.
ARCHITECTURE = {
    "num_attention_heads": 1, "attention_head_dim": 128, "ffn_dim": 64, "num_layers": 2, "freq_dim": 256,
    "text_dim": TEXT_DIM,
}  # fmt: skip
KINDS = {
    "t2v": {},
    "i2v": {"in_channels": 36, "out_channels": 16, "image_dim": IMAGE_DIM, "added_kv_proj_dim": 128},
    "i2v without embedding": {"in_channels": 36, "out_channels": 16},
}

CLIPS: dict[SamplerKind, str] = {"re-noise": "clip", "ode": "ode"}

Inputs = dict[str, Tensor]


class Clips(InMemoryData):
    """Clips of noise, with the image that a kind of model reads."""

    def __init__(self, inputs: Inputs) -> None:
        latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
        super().__init__(CaptionedLatents(latents, ["one", "two"]), HashTextEmbedding(TEXT_LENGTH, TEXT_DIM))
        self.inputs = inputs

    def __getitem__(self, index: int) -> Example:
        image, embedding = (self.inputs.get(name) for name in ("image", "embedding"))
        return super().__getitem__(index)._replace(
            image_latents=None if image is None else image[0],
            image_embedding=None if embedding is None else embedding[0],
        )  # fmt: skip


def draw_inputs(kind: str) -> Inputs:
    """A noised clip, what it is to show, and noise for all steps of another."""
    draws = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws)

    text = torch.zeros(1, TEXT_LENGTH, TEXT_DIM)
    text[:, :7] = draw(1, 7, TEXT_DIM)
    inputs = {"x_t": draw(1, *SHAPE), "text": text, "noise": draw(len(GRID), 1, *SHAPE)}
    if kind != "t2v":
        mask = torch.zeros(1, 4, *SHAPE[1:])
        mask[:, :, 0] = 1
        inputs["image"] = torch.cat([mask, draw(1, *SHAPE)], dim=1)
    if kind == "i2v":
        inputs["embedding"] = draw(1, IMAGE_TOKENS, IMAGE_DIM)
    return inputs


@torch.no_grad()
def add_expected(inputs: Inputs, name: str, transformer: WanTransformer3DModel) -> None:
    """What diffusers' transformer predicts, and the clips that our samplers make with it."""
    model = VelocityModel(transformer.eval())
    condition = Condition(inputs["text"], inputs.get("image"), inputs.get("embedding"))
    inputs[f"velocity_{name}"] = model(inputs["x_t"], torch.tensor([757.0]), condition)
    for sampler, clip in CLIPS.items():
        draw = mock.Mock(side_effect=list(inputs["noise"]))
        inputs[f"{clip}_{name}"] = few_step_rollout(model, condition, SHAPE, GRID, draw, sampler=sampler).x_0


Material = Callable[[str], Path]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """For a kind of model: ``base.safetensors``, the runs ``full`` and ``lora``, ``inputs.safetensors``; made once."""
    folder = tmp_path_factory.mktemp("material")

    def make(kind: str) -> Path:
        made = folder / kind.replace(" ", "-")
        if made.exists():
            return made
        torch.manual_seed(0)
        base = WanTransformer3DModel(**ARCHITECTURE, **KINDS[kind])
        base.save_pretrained(made / "base")
        names = original_names(dict(base.named_parameters()))
        tensors = {names[name]: parameter.detach() for name, parameter in base.named_parameters()}
        save_file(tensors, made / "base.safetensors")
        inputs = draw_inputs(kind)
        add_expected(inputs, "base", base)
        for name in ("full", "lora"):
            trained = {"optimizer": {"lr": 0.005}, **({"lora": LORA} if name == "lora" else {})}
            config = tiny_config(
                made / "base",
                method={"student": trained, "online": trained, "online_updates": 1, "few_steps": list(GRID)},
                data={"kind": "shards", "path": "none"},
                max_steps=2,
                logging={"tensorboard": False},
            )
            with join_ranks() as ranks:
                train(config, made / name, ranks, data=both(Clips(inputs)))
            export_pipeline(made / name, made / "pipeline")
            student = WanTransformer3DModel.from_pretrained(made / "pipeline" / "transformer")
            add_expected(inputs, name, student)
            # What is trained has to be seen, or a program that ignores a file would pass.
            assert (inputs[f"velocity_{name}"] - inputs["velocity_base"]).abs().max() > 1e-2
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, made / "inputs.safetensors")
        return made

    return make


RunInHost = Callable[..., dict[str, Any]]


def export(made: Path, name: str, program: ProgramName, output: Path) -> Path:
    """The file with the weights; of ``lora`` adapters, where the program reads them."""
    export_for_program(made / name, output, program)
    (file,) = output.rglob("*.safetensors")
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_comfyui(
    checkout: Callable[[str], Path], run_in_host: RunInHost, material: Material, tmp_path: Path, kind: str
) -> None:
    checkout("ComfyUI")
    made = material(kind)
    whole, lora = (export(made, name, "comfyui", tmp_path / name) for name in ("full", "lora"))
    card = (tmp_path / "full" / "README.md").read_text(encoding="utf-8")
    report = run_in_host("ComfyUI", "comfyui.py", str(made), str(whole), str(lora), card)
    assert report["model"] == ("WAN21_I2V" if kind == "i2v" else "WAN21_T2V")
    assert report["adapters"] == 2 * 10
    _, off = closest_even_shift(GRID)
    assert report["simple"] == pytest.approx(GRID, abs=off + 0.1)


def released_config(kind: str) -> dict[str, Any]:
    """What is in ``config.json`` beside weights of Wan2.1's first release."""
    return {
        "_class_name": "WanModel",
        "model_type": kind[:3],
        "dim": ARCHITECTURE["num_attention_heads"] * ARCHITECTURE["attention_head_dim"],
        "eps": 1e-6,
        "ffn_dim": ARCHITECTURE["ffn_dim"],
        "freq_dim": ARCHITECTURE["freq_dim"],
        "in_dim": KINDS[kind].get("in_channels", SHAPE[0]),
        "num_heads": ARCHITECTURE["num_attention_heads"],
        "num_layers": ARCHITECTURE["num_layers"],
        "out_dim": SHAPE[0],
        "text_len": TEXT_LENGTH,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_lightx2v(
    checkout: Callable[[str], Path],
    run_in_host: RunInHost,
    material: Material,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkout("LightX2V")
    made = material(kind)
    model = tmp_path / "model"  # the folder of a first release
    model.mkdir()
    shutil.copy(made / "base.safetensors", model / "diffusion_pytorch_model.safetensors")
    (model / "config.json").write_text(json.dumps(released_config(kind)))
    expected = {}
    for sampler in CLIPS if kind == "t2v" else ("ode",):
        monkeypatch.setattr(DMDMethodConfig, "sampled_by", sampler)
        for name in ("full", "lora"):
            file = export(made, name, "lightx2v", tmp_path / f"{name}-{sampler}")
            expected[file.parent.name] = ["wan2.1_distill" if sampler == "ode" else "wan2.1_sf", file.name]
    folders = [str(tmp_path / folder) for folder in expected]
    assert run_in_host("LightX2V", "lightx2v_wan.py", str(made), str(model), *folders) == expected


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("name", ["full", "lora"])
def test_wan(
    checkout: Callable[[str], Path], run_in_host: RunInHost, material: Material, tmp_path: Path, kind: str, name: str
) -> None:
    checkout("Wan2.1")
    made = material(kind)
    export(made, name, "wan", tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    report = run_in_host("Wan2.1", "wan_model.py", str(made), str(tmp_path / "student"), name, card)
    assert report == {"read": report["stored"], "stored": report["stored"]}
