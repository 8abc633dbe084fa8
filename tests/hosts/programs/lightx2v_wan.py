"""LightX2V: its loaders of models and LoRA, its inference of Wan, its schedulers of few steps.

Stood in for: CUDA by a device of its registry, the CPU's, and pinned memory by any; packages for GPUs by what it has in
PyTorch; Triton, whose kernels it declares, and packages for GGUF and videos, by nothing: none of them runs. Its
``__init__``, which imports all that it can run, is not executed. It computes in bfloat16 wherever it can, so that word
means float32 in its modules here, and predictions can be compared.
"""

import argparse
import json
import os
import re
import shlex
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.runtime.hints  # before there is something by the name of Triton
from safetensors.torch import load_file
from torch import Tensor

from without_gpu import declare_torchvision_operators

declare_torchvision_operators()
_, made, model_path, *exports = map(Path, sys.argv[1:])
host = Path.cwd()

for name in ("triton", "triton.language", "gguf", "imageio", "imageio_ffmpeg"):
    sys.modules[name] = mock.MagicMock(__spec__=ModuleSpec(name, None))
sys.modules["triton"].Config = lambda kwargs, **options: SimpleNamespace(kwargs=kwargs, **options)
sys.modules["lightx2v"] = package = ModuleType("lightx2v")
package.__path__ = [str(host / "lightx2v")]
torch.bfloat16 = torch.float32
empty = torch.empty
torch.empty = lambda *size, pin_memory=False, **options: empty(*size, **options)

from lightx2v_platform.registry_factory import PLATFORM_DEVICE_REGISTER  # noqa: E402


@PLATFORM_DEVICE_REGISTER("the CPU")
class Device:
    init_device_env = staticmethod(lambda: None)
    is_available = staticmethod(lambda: True)
    get_device = staticmethod(lambda: "cpu")


os.environ["PLATFORM"] = "the CPU"
import lightx2v_platform.set_ai_device  # noqa: E402, F401
from lightx2v.common import ops  # noqa: E402, F401 (registers what weights are made of)
from lightx2v.common.kvcache import KVCacheManager  # noqa: E402
from lightx2v.models.networks.lora_adapter import LoraAdapter  # noqa: E402
from lightx2v.models.networks.wan.distill_model import WanDistillModel  # noqa: E402
from lightx2v.models.networks.wan.model import WanModel  # noqa: E402
from lightx2v.models.networks.wan.sf_model import WanSFModel  # noqa: E402
from lightx2v.models.schedulers.wan.self_forcing.scheduler import WanSFScheduler  # noqa: E402
from lightx2v.models.schedulers.wan.step_distill.scheduler import WanStepDistillScheduler  # noqa: E402
from lightx2v.utils.set_config import set_config  # noqa: E402

inputs = load_file(made / "inputs.safetensors")
SHAPE = tuple(inputs["x_t"].shape[1:])
CPU = torch.device("cpu")
IN_PYTORCH = {"rope_type": "torch_complex_rope", "modulate_type": "torch"}


def command_of(export: Path) -> dict[str, str]:
    """What the card's command passes, which LightX2V has to know."""
    (command,) = re.findall(r"```\n(python -m lightx2v\.infer .*?)```", (export / "README.md").read_text(), re.DOTALL)
    words = shlex.split(command.replace("\\\n", ""))[3:]
    passed = dict(zip(words[::2], words[1::2], strict=True))
    parser = (host / "lightx2v" / "infer.py").read_text()
    for option in passed:
        assert f'"{option}"' in parser, option
    assert passed["--config_json"] == "lightx2v.json"
    return passed


def config_of(passed: dict[str, str]) -> dict[str, Any]:
    """As its command line makes it, inside the export's folder; with what a CPU has in place of packages for GPUs."""
    config = json.loads(Path(passed["--config_json"]).read_text())
    attention = {name: "torch_sdpa" for name in config if name.endswith(("attn_1_type", "attn_2_type"))}
    assert len(attention) == 3
    assert not IN_PYTORCH.keys() & config.keys()
    arguments = {"model_cls": passed["--model_cls"], "task": passed["--task"], "model_path": str(model_path)}
    config = set_config(argparse.Namespace(**arguments, config_json=passed["--config_json"]))
    config.update({**attention, **IN_PYTORCH})
    return config


class Noted:
    """Of a model: what it has loaded. On a CPU it takes out of this whatever it puts to use."""

    loaded: dict[str, Tensor]

    def _load_ckpt(self, *arguments: Any) -> dict[str, Tensor]:
        self.loaded = super()._load_ckpt(*arguments)
        return self.loaded


class NotedDistillModel(Noted, WanDistillModel):
    pass


class NotedModel(Noted, WanModel):
    pass


class NotedSFModel(Noted, WanSFModel):
    pass


def whole_model(passed: dict[str, str], config: dict[str, Any]) -> WanModel:
    kind = {"wan2.1_distill": NotedDistillModel, "wan2.1_sf": NotedSFModel}[passed["--model_cls"]]
    return kind(str(model_path), config, CPU)


def adapted_model(config: dict[str, Any]) -> tuple[WanModel, set[str]]:
    """The model of the folder with the adapters that the configuration names, and which of its weights they changed."""
    model = NotedModel(str(model_path), config, CPU)
    before = {name: tensor.clone() for name, tensor in model.loaded.items()}
    changed: set[str] = set()
    apply_weights = model._apply_weights

    def note(weights: dict[str, Tensor]) -> None:
        changed.update(name for name, tensor in weights.items() if not torch.equal(tensor, before[name]))
        apply_weights(weights)

    model._apply_weights = note
    LoraAdapter(model).apply_lora(config["lora_configs"], model_type="wan2.1")
    return model, changed


def follow_velocity(model: WanModel, config: dict[str, Any]) -> Any:
    """As its runner of distilled models does a step: ``(step) -> None``."""
    scheduler = WanStepDistillScheduler(config)
    scheduler.prepare(0, SHAPE)
    model.set_scheduler(scheduler)
    return scheduler.step_pre


def noise_anew(model: WanModel, config: dict[str, Any]) -> Any:
    """As its runner of Self-Forcing does a step."""
    scheduler = WanSFScheduler(config)
    manager = KVCacheManager(config=config, device=CPU, sp_group=None)
    manager._create_kv_caches(SHAPE)
    assert manager.num_output_frames == SHAPE[1]
    assert manager.num_output_frames // config["ar_config"]["num_frame_per_chunk"] == 1
    scheduler.num_output_frames = manager.num_output_frames
    scheduler.prepare(0, SHAPE)
    model.set_scheduler(scheduler)
    model.kv_cache_manager = model.transformer_infer.kv_cache_manager = manager
    return lambda step: scheduler.step_pre(seg_index=0, step_index=step)


@torch.no_grad()
def check(model: WanModel, config: dict[str, Any], name: str, sampler: str) -> None:
    """Its prediction and its clip of given noise are those of diffusers."""
    model.to_cuda()  # which means here: to that device of its
    prepare_step = {"ode": follow_velocity, "re-noise": noise_anew}[sampler](model, config)
    scheduler = model.scheduler
    seen = {"vae_encoder_out": inputs["image"][0]} if "image" in inputs else {}
    if "embedding" in inputs:
        seen["clip_encoder_out"] = inputs["embedding"][0]

    def predict(step: int) -> Tensor:
        prepare_step(step)
        model.infer({"text_encoder_output": {"context": inputs["text"]}, "image_encoder_output": seen})
        return scheduler.noise_pred.unsqueeze(0)

    scheduler.latents = inputs["x_t"][0].clone()
    torch.testing.assert_close(predict(2), inputs[f"velocity_{name}"], rtol=0, atol=1e-4)
    first, *others = (noise[0] for noise in inputs["noise"])
    draws = iter(others if sampler == "re-noise" else ())
    scheduler.latents = first.clone()
    with mock.patch.object(torch, "randn_like", side_effect=lambda _: next(draws).transpose(0, 1)):  # of frames
        for step in range(scheduler.infer_steps):
            predict(step)
            scheduler.step_post()
    assert next(draws, None) is None
    clip = {"re-noise": "clip", "ode": "ode"}[sampler]
    torch.testing.assert_close(scheduler.latents.unsqueeze(0), inputs[f"{clip}_{name}"], rtol=0, atol=1e-4)


report = {}
for export in exports:
    name, _, sampler = export.name.partition("-")
    passed = command_of(export)
    os.chdir(export)  # as the card says
    config = config_of(passed)
    (file,) = export.glob("*.safetensors")
    if config["lora_configs"] is None:
        model = whole_model(passed, config)
    else:
        model, changed = adapted_model(config)
        pairs = {tensor.partition(".lora_")[0] for tensor in load_file(file)}
        assert {f"diffusion_model.{weight.removesuffix('.weight')}" for weight in changed} == pairs
    assert not model.loaded, f"read and not used: {model.loaded.keys()}"
    check(model, config, name, sampler)
    report[export.name] = [passed["--model_cls"], file.name]
    if sampler == "ode":
        expected = torch.tensor(config["denoising_step_list"], dtype=torch.float32)
        torch.testing.assert_close(model.scheduler.timesteps, expected, rtol=0, atol=1e-3)
print(json.dumps(report))
