"""LightX2V: its loaders of distilled models and LoRA, its inference of Wan, its few-step scheduler.

Stood in for: CUDA's device and pinned memory by the CPU's. It computes in bfloat16 wherever it can, so that word means
float32 in its modules here, and predictions can be compared.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from easydict import EasyDict
from safetensors.torch import load_file
from torch import Tensor

from without_gpu import declare_torchvision_operators

declare_torchvision_operators()
os.environ["DTYPE"] = "FP32"
scratch, made, model_path, whole, lora = map(Path, sys.argv[1:])

empty = torch.empty
torch.empty = lambda *size, pin_memory=False, **options: empty(*size, **options)
torch.bfloat16 = torch.float32
torch.Tensor.pin_memory = torch.Tensor.cuda = lambda self, *_, **__: self
torch.cuda.get_device_capability = lambda *_: (8, 0)

from lightx2v.common import ops  # noqa: E402, F401 (registers what weights are made of)
from lightx2v.models.networks.wan.distill_model import WanDistillModel  # noqa: E402
from lightx2v.models.networks.wan.lora_adapter import WanLoraWrapper  # noqa: E402
from lightx2v.models.networks.wan.model import WanModel  # noqa: E402
from lightx2v.models.schedulers.wan.step_distill.scheduler import WanStepDistillScheduler  # noqa: E402
from lightx2v.utils.set_config import set_config  # noqa: E402

inputs = load_file(made / "inputs.safetensors")
image = "embedding" in inputs


class Noticed(dict[str, Tensor]):
    """Weights by name, and which of them were read."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__(weights)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


def config_of(export: Path) -> EasyDict:
    """As its command line makes it of ``--config_json``; attention as a CPU has it, and sizes of the test's clips."""
    file = scratch / "config.json"
    config = json.loads((export / "lightx2v.json").read_text())
    kinds = {name: "torch_sdpa" for name in config if name.endswith(("attn_1_type", "attn_2_type"))}
    assert len(kinds) == 3
    file.write_text(json.dumps({**config, **kinds}))
    arguments = {"model_cls": "wan2.1_distill", "task": "i2v" if image else "t2v", "model_path": str(model_path)}
    config = set_config(argparse.Namespace(**arguments, config_json=str(file)))
    config.target_shape, config.lat_h, config.lat_w = inputs["x_t"].shape[1:], *inputs["x_t"].shape[3:]
    return config


def scheduler_of(config: EasyDict) -> WanStepDistillScheduler:
    scheduler = WanStepDistillScheduler(config)
    scheduler.device = torch.device("cpu")
    scheduler.prepare(None)
    return scheduler


@torch.no_grad()
def predict(model: WanModel, x_t: Tensor, step: int) -> Tensor:
    """The velocity of a noised clip at one of the few steps."""
    scheduler = model.scheduler
    scheduler.step_index, scheduler.latents = step, x_t[0]
    text = {"context": inputs["text"]}
    seen = {"clip_encoder_out": inputs["embedding"][0], "vae_encode_out": inputs["image"][0]} if image else {}
    model.infer({"text_encoder_output": text, "image_encoder_output": seen})
    return scheduler.noise_pred.unsqueeze(0)


@torch.no_grad()
def check(model: WanModel, config: EasyDict, name: str) -> None:
    model.set_scheduler(scheduler_of(config))
    found = predict(model, inputs["x_t"], 2)
    torch.testing.assert_close(found, inputs[f"velocity_{name}"], rtol=0, atol=1e-4)
    scheduler, (first, *others) = model.scheduler, inputs["noise"]
    randn_like = torch.randn_like
    torch.randn_like = lambda x: others.pop(0)[0]
    x_t = first
    for step in range(scheduler.infer_steps):
        predict(model, x_t, step)
        scheduler.step_post()
        x_t = scheduler.latents.unsqueeze(0)
    torch.randn_like = randn_like
    assert not others
    torch.testing.assert_close(x_t, inputs[f"clip_{name}"], rtol=0, atol=1e-4)


config = config_of(whole)
model = WanDistillModel(str(model_path), config, torch.device("cpu"))
noticed = Noticed(model.original_weight_dict)
model._init_weights(noticed)
assert noticed.read == noticed.keys(), noticed.keys() - noticed.read
check(model, config, "full")

shutil.rmtree(model_path / "distill_models")  # a LoRA is added to the model itself
config = config_of(lora.parent)
(told,) = config.lora_configs
assert told["path"] == lora.name
base = WanModel(str(model_path), config, torch.device("cpu"))
check(base, config, "base")
before = {name: tensor.clone() for name, tensor in base.original_weight_dict.items()}
wrapper = WanLoraWrapper(base)
wrapper.apply_lora(wrapper.load_lora(str(lora)), told["strength"])
check(base, config, "lora")
changed = [name for name, tensor in base.original_weight_dict.items() if not torch.equal(tensor, before[name])]
pairs = {name.partition(".lora_")[0] for name in load_file(lora)}
assert {f"diffusion_model.{name.removesuffix('.weight')}" for name in changed} == pairs
print(json.dumps({"timesteps": base.scheduler.timesteps.tolist(), "adapters": len(changed)}))
