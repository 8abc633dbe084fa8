"""A method's losses beside its authors': small models, draws that are given, and a script's lines, run as they are."""

import ast
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from without_gpu import declare_torchvision_operators

declare_torchvision_operators()

from avd_trainer.config.sections import ArchitectureConfig  # noqa: E402
from avd_trainer.data.batches import Batch  # noqa: E402
from avd_trainer.methods.base import Loss, Setting, Turn  # noqa: E402
from avd_trainer.methods.registry import load_method  # noqa: E402
from avd_trainer.models.condition import Condition  # noqa: E402
from avd_trainer.models.transformer import VelocityModel, build_transformer  # noqa: E402

SHAPE = (16, 5, 4, 4)
TEXT = (3, 6)
CLIPS = 3
ARCHITECTURE = ArchitectureConfig(
    num_attention_heads=1, attention_head_dim=12, ffn_dim=16, num_layers=2, freq_dim=8, text_dim=TEXT[1]
)


def small_model(seed: int, *, trained: bool = False) -> VelocityModel:
    """A transformer that knows nothing, in its own way."""
    torch.manual_seed(seed)
    module = build_transformer(ARCHITECTURE).requires_grad_(trained)
    torch.nn.init.normal_(module.proj_out.weight, std=0.3)
    return VelocityModel(module)


class Given:
    """In place of a method's draws: numbers by name."""

    def __init__(self, **numbers: Tensor) -> None:
        self.numbers = numbers

    def uniform(self, name: str) -> Tensor:
        return self.numbers[name]

    def normal(self, name: str, shape: Any) -> Tensor:
        assert self.numbers[name].shape[1:] == torch.Size(shape)
        return self.numbers[name]


def drawn(index: Tensor, count: int) -> Tensor:
    """The uniform numbers in [0, 1) of which an index below ``count`` is drawn."""
    return (index + 0.5) / count


def texts() -> tuple[Tensor, Tensor]:
    """Of the clips, and of no caption."""
    torch.manual_seed(7)
    return torch.randn(CLIPS, *TEXT), torch.randn(*TEXT)


def clips() -> Tensor:
    """``[CLIPS, *SHAPE]`` of noise, the same in each program."""
    torch.manual_seed(0)
    return torch.randn(CLIPS, *SHAPE)


def new_method(kind: str, models: dict[str, Any], unconditional: Tensor, **options: Any) -> Any:
    method = load_method(kind)
    setting = Setting(SHAPE, unconditional, torch.device("cpu"))
    return method(method.Config(**options), models, setting)


def share_times(method: Any, solver: Any) -> None:
    """Give a method and an authors' solver the same points, in float32; they are the same but for rounding.

    Models tell times apart by waves of a few timesteps' length, and near pure noise the student's way is so short that
    rounding its ends differently would be seen.
    """
    times = 1000 * torch.cat([solver.sigmas_prev[:1], solver.sigmas]).float()
    torch.testing.assert_close(method.config.trajectory(), times, rtol=1e-6, atol=0)
    while not torch.equal(times, again := times / 1000 * 1000):  # they count from 0 to 1, and multiply
        times = again
    method._trajectory.copy_(times)
    solver.sigmas, solver.sigmas_prev = times[1:] / 1000, times[:-1] / 1000


def loss_of(method: Any, clips: Tensor, text: Tensor, draws: Given, part: str = "", role: str = "student") -> Loss:
    """The one loss of a turn."""
    (loss,) = method.losses(Turn(role, ("clips",), part), {"clips": Batch(clips, Condition(text))}, draws)
    return loss


def gradients(model: Any) -> Tensor:
    """Of all parameters that have one, in one tensor; they are cleared."""
    module = getattr(model, "module", model)
    found = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    assert found
    for parameter in module.parameters():
        parameter.grad = None
    return torch.cat(found)


def agree(mine: Tensor, theirs: Tensor) -> float:
    """To 1e-5 of the largest number; returns how near they are."""
    mine, theirs = mine.detach().float(), theirs.detach().float()
    assert mine.shape == theirs.shape
    assert theirs.abs().max() > 1e-4
    apart = ((mine - theirs).abs().max() / theirs.abs().max()).item()
    assert apart < 1e-5, apart
    return apart


def hold(
    method: Any, model: Any, batch: tuple[Tensor, Tensor], draws: Given, theirs: tuple[Tensor, Tensor], **turn: str
) -> float:
    """A turn's loss and its gradient at a model's weights agree with theirs; returns how near both are.

    Args:
        method: Ours.
        model: What the turn trains.
        batch: Clips and their texts.
        draws: What the authors have drawn.
        theirs: Loss and gradient.
        turn: ``part`` and ``role``, where they are not the student's own.
    """
    loss = loss_of(method, *batch, draws, **turn)
    loss.backward(1)
    return max(agree(loss.value, theirs[0]), agree(gradients(model), theirs[1]))


def report(main: Callable[[Path], Any]) -> None:
    """Run a program, whose argument is a folder to write to, and print what it returns as JSON."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*CUDA.*")
    print(json.dumps(main(Path(sys.argv[1]))))


class Answers(SimpleNamespace):
    """What a model of diffusers returns: ``answer.sample`` and ``answer[0]``."""

    def __getitem__(self, place: int) -> Tensor:
        return (self.sample,)[place]


def asked_as_diffusers(model: Callable[..., Tensor]) -> Callable[..., Answers]:
    """A model of rectified flow, called with diffusers' names; its answer keeps what the authors' lines ask of it."""

    def call(
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        **_: Any,
    ) -> Answers:
        return Answers(sample=model(hidden_states.float(), timestep.float(), Condition(encoder_hidden_states)))

    return call


def statements(source: str, first: str, last: str) -> CodeType:
    """The statements of one block of a script, from the one that begins with a text to the one behind it that does."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        for body in (value for _, value in ast.iter_fields(node) if isinstance(value, list)):
            body = [each for each in body if isinstance(each, ast.stmt)]
            begins = [i for i, each in enumerate(body) if lines[each.lineno - 1].strip().startswith(first)]
            ends = [i for i, each in enumerate(body) if lines[each.lineno - 1].strip().startswith(last)]
            found += [body[i : j + 1] for i in begins for j in ends if i < j]
    assert len(found) == 1, f"{len(found)} blocks have statements from {first!r} to {last!r}, expected one"
    return compile(ast.Module(found[0], []), "the authors' lines", "exec")
