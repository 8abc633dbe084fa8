"""Wan2.1's own transformer and its loader, and the loop that the model card shows.

Stood in for: flash attention, which needs a GPU, by PyTorch's; CUDA's device by the CPU.
"""

import json
import re
import sys
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from without_gpu import declare_torchvision_operators

declare_torchvision_operators()
torch.cuda.current_device = lambda: 0  # is a default argument in the text encoder
scratch, made, folder, name, card = sys.argv[1:]

from wan.modules import model as wan_model  # noqa: E402

inputs = load_file(Path(made) / "inputs.safetensors")


def attention(
    q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None = None, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    """``[B, L, heads, width]``; nothing here is padded."""
    assert window_size == (-1, -1)
    assert k_lens is None or k_lens.tolist() == [k.shape[1]]
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


wan_model.flash_attention = attention
model, loading = wan_model.WanModel.from_pretrained(folder, output_loading_info=True)
assert not any(loading.values()), loading
image = "embedding" in inputs
given = {"clip_fea": inputs["embedding"], "y": [inputs["image"][0]]} if image else {}
context = [inputs["text"][0]]
with torch.no_grad():
    (velocity,) = model([inputs["x_t"][0]], t=torch.tensor([757.0]), context=context, seq_len=18, **given)
torch.testing.assert_close(velocity, inputs[f"velocity_{name}"][0], rtol=0, atol=1e-4)

# The card's own lines, on the CPU and with the noise that our sampler had.
(loop,) = re.findall(r"```python\n(import torch\nfrom wan.*?)```", card, re.DOTALL)
loop = loop.replace('WanModel.from_pretrained("student").eval().to("cuda")', "model").replace('device="cuda"', "")
names = {"model": model, "context": context, "clip_fea": given.get("clip_fea"), "y": (given.get("y") or [None])[0]}
first, *others = (each[0] for each in inputs["noise"])
noise = [*others, torch.zeros_like(first)]  # it draws once more at the end, for a timestep of 0
with mock.patch("torch.randn", return_value=first), mock.patch("torch.randn_like", side_effect=noise):
    exec(loop, names)  # without a GPU its autocast does nothing
assert not names["x"].requires_grad
torch.testing.assert_close(names["x"], inputs[f"clip_{name}"][0], rtol=0, atol=1e-4)

stored = load_file(Path(folder) / "diffusion_pytorch_model.safetensors")
print(
    json.dumps(
        {"stored": len(stored), "read": sum(torch.equal(model.state_dict()[key], stored[key]) for key in stored)}
    )
)
