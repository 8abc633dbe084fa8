"""What the README shows is run as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from avd_core import LatentFrameInterpolator

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_ten_lines_add_the_losses_to_a_loop() -> None:
    code = BLOCKS[0]
    lines = [line for line in code.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 10
    generator_weight = torch.nn.Parameter(torch.tensor(0.5))
    x_0 = generator_weight * torch.randn(2, 16, 5, 4, 4)
    scope: dict[str, Any] = {
        "torch": torch,
        "device": "cpu",
        "clips": torch.randn(2, 16, 5, 4, 4),
        "captions": ["one", "two"],
        "generator": lambda x_t, timesteps, captions: generator_weight * x_t,
        "x_0": x_0,
        "dmd_loss": 0.1 * generator_weight,
    }
    exec(code, scope)
    scope["loss"].backward()
    assert generator_weight.grad is not None
    assert generator_weight.grad != 0.1  # more than DMD alone
    assert scope["metrics"]["regression/weights"].shape == (2,)
    assert scope["objective"].regression.cache.seen.any()


def test_the_losses_stand_alone() -> None:
    scope: dict[str, Any] = {"timesteps": torch.tensor([1000, 522])}
    for name in ("prediction", "target", "x_0", "real_x_0", "online_x_0"):
        scope[name] = torch.randn(2, 16, 5, 4, 4, requires_grad=name in ("prediction", "x_0"))
    exec(BLOCKS[1], scope)
    assert scope["loss"] > 0


def test_the_sampler_runs_at_half_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    LatentFrameInterpolator().save_pretrained("runs/interpolator/interpolator")
    frames = []

    def denoiser(x_t: Tensor, timesteps: Tensor, text: list[str]) -> Tensor:
        frames.append(x_t.shape[2])
        return 0.5 * x_t

    noise = torch.randn(1, 16, 21, 4, 6)
    scope: dict[str, Any] = {"torch": torch, "denoiser": denoiser, "noise": noise, "captions": ["one"]}
    exec(BLOCKS[2], scope)
    assert scope["x_0"].shape == noise.shape
    assert frames == [11, 11, 21, 21]


def test_every_python_block_is_covered() -> None:
    assert len(BLOCKS) == 3
