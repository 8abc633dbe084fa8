"""ComfyUI: its loaders of models and LoRA, its Wan, its sampler and the nodes that a model card names.

Stood in for: a GPU by its own ``--cpu``, torchaudio (of audio models) by nothing, torchvision's operators by
declarations.
"""

import json
import logging
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from safetensors.torch import load_file

from without_gpu import declare_torchvision_operators

declare_torchvision_operators()
audio = mock.MagicMock(__spec__=ModuleSpec("torchaudio", None))
sys.modules |= dict.fromkeys(("torchaudio", "torchaudio.functional", "torchaudio.transforms"), audio)
_, scratch, made, whole, lora, card = sys.argv
sys.argv = sys.argv[:1]  # ComfyUI reads them

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from comfy_extras.nodes_custom_sampler import ManualSigmas  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingSD3  # noqa: E402

inputs = load_file(Path(made) / "inputs.safetensors")
image, embedding = inputs.get("image"), inputs.get("embedding")
vision = None if embedding is None else SimpleNamespace(penultimate_hidden_states=embedding)

said = []
"""What the loaders complain about: names that are missing, left over, or of no layer."""


class Listen(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        said.append(record.getMessage())


logging.getLogger().addHandler(Listen())
logging.getLogger().setLevel(logging.INFO)


def complaints() -> list[str]:
    words = ("missing", "unexpected", "left over", "not loaded", "NOT LOADED", "MISMATCH", "ERROR")
    return [line for line in said if any(word in line for word in words)]


def load(path: str | Path) -> ModelPatcher:
    """As the node *Load Diffusion Model* does, in float32."""
    return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})


@torch.no_grad()
def check_velocity(patcher: ModelPatcher, name: str) -> None:
    comfy.model_management.load_models_gpu([patcher])
    x_t, sigma = inputs["x_t"], torch.tensor([0.757])
    more = {} if embedding is None else {"clip_fea": embedding}
    x_0 = patcher.model.apply_model(x_t, sigma, c_concat=image, c_crossattn=inputs["text"], **more)
    torch.testing.assert_close((x_t - x_0) / 0.757, inputs[f"velocity_{name}"], rtol=0, atol=1e-4)


@torch.no_grad()
def check_clip(patcher: ModelPatcher, name: str) -> None:
    """*SamplerCustom* with the card's sigmas, and the noise that our sampler had."""
    (listed,) = re.findall(r"`ManualSigmas`\s+`([^`]+)`", card)
    (sigmas,) = ManualSigmas.execute(listed).result
    first, *others = inputs["noise"]
    sampler = comfy.samplers.ksampler("lcm", {"noise_sampler": lambda sigma, following: others.pop(0)})
    to_vae, to_model = patcher.model.process_latent_out, patcher.model.process_latent_in
    told = {} if vision is None else {"clip_vision_output": vision}
    if image is not None:
        told |= {"concat_latent_image": to_vae(image[:, 4:]), "concat_mask": 1 - image[:, :1]}
    positive, negative = [[inputs["text"], told]], [[torch.zeros_like(inputs["text"]), told]]
    clip = comfy.sample.sample_custom(
        patcher, first, 1.0, sampler, sigmas, positive, negative, torch.zeros_like(first), disable_pbar=True, seed=0
    )
    assert not others
    torch.testing.assert_close(to_model(clip), inputs[f"clip_{name}"], rtol=0, atol=1e-4)


patcher = load(whole)
check_velocity(patcher, "full")
check_clip(patcher, "full")

base = load(Path(made) / "base.safetensors")
check_velocity(base, "base")
tensors = comfy.utils.load_torch_file(lora, safe_load=True)
adapted, _ = comfy.sd.load_lora_for_models(base, None, tensors, 1.0, 0)  # as *LoraLoaderModelOnly* does
check_velocity(adapted, "lora")
check_clip(adapted, "lora")
assert not complaints(), complaints()

# A name that nothing reads would be seen here.
comfy.sd.load_lora_for_models(base, None, {"diffusion_model.blocks.9.self_attn.q.lora_A.weight": torch.ones(1)}, 1.0, 0)
assert complaints() == ["lora key not loaded: diffusion_model.blocks.9.self_attn.q.lora_A.weight"]

(shift,) = re.findall(r"`ModelSamplingSD3` with `shift` ([\d.]+)", card)
(shifted,) = ModelSamplingSD3().patch(patcher, float(shift))
sampling = shifted.get_model_object("model_sampling")
simple = comfy.samplers.calculate_sigmas(sampling, "simple", 4)
report = {
    "model": type(patcher.model.model_config).__name__,
    "adapters": len(adapted.patches),
    "simple": (1000 * simple[:-1]).tolist(),
}
print(json.dumps(report))
