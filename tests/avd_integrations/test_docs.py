"""The recipe of docs/hosts.md is run as it stands there."""

import re
from pathlib import Path
from typing import Any

import torch

PAGE = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_recipe_adds_the_terms_to_an_unknown_host() -> None:
    weight = torch.nn.Parameter(torch.tensor(0.5))
    scope: dict[str, Any] = {
        "device": "cpu",
        "student": lambda x_t, times, text: weight * x_t,
        "batch": {"latents": torch.randn(2, 5, 4, 6, 6), "text": None},
        "x_0": weight * torch.randn(2, 5, 4, 6, 6),
        "host_loss": 0.1 * weight,
    }
    exec(BLOCKS[0], scope)
    scope["total"].backward()
    assert weight.grad is not None
    assert weight.grad != 0.1  # more than the host's own loss
    assert scope["terms"].objective.regression.cache.seen.any()
    assert scope["metrics"].keys() >= {"regression/loss", "motion/loss"}


def test_every_python_block_is_covered() -> None:
    assert len(BLOCKS) == 1
