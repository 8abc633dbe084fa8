"""What the programs of CausVid's family share: their trainers without a GPU, and the added loss by hand.

Stood in for: CUDA's device by the CPU, NCCL by gloo, torchvision's operators (its wheel brings none for a PyTorch
without CUDA) by declarations, Weights & Biases by nothing, Wan's transformer, text encoder and VAE by tiny ones. The
host's own code is all real.
"""

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from by_hand import RegressionByHand
from page_lines import with_lines
from references import reference_motion, reference_sample_losses, reference_weights
from without_gpu import declare_torchvision_operators, free_port, stand_in_for_wandb

CHANNELS, FRAMES, SIZE = 3, 21, 4

declare_torchvision_operators()


def prepare(scratch: Path) -> None:
    """Before the host is imported."""
    torch.cuda.current_device = lambda: 0  # is a default argument in the text encoder, and part of a device's name
    torch.cuda.set_device = lambda device: None
    torch.cuda.empty_cache = lambda: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    start = dist.init_process_group
    dist.init_process_group = lambda backend, **options: start("gloo", **options)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    stand_in_for_wandb(scratch / "wandb")


def on_cpu() -> None:
    """After the host is imported: what it takes for the number of a GPU is the CPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")


def edit(scratch: Path, script: str, blocks: list[tuple[str, str, str]]) -> None:
    """Put a page's lines into a copy of the script's package, which is found before the host's own."""
    package, copy = Path(script).parent, scratch / "edited"
    shutil.copytree(package, copy / package)
    (copy / script).write_text(with_lines(Path(script).read_text(), blocks))
    sys.path.insert(0, str(copy))


class Wan(nn.Module):
    """A pointwise transformer, so to say; notes what the student saw and said with gradient, and that gradient."""

    seen = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(CHANNELS, CHANNELS, 1)
        with torch.no_grad():  # most of what it sees is noise to it, so its samples move less than the floor asks for
            self.layer.weight.mul_(0.1).add_(0.6 * torch.eye(CHANNELS).view(self.layer.weight.shape))

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> Self:
        torch.manual_seed(1)
        return cls()

    def enable_gradient_checkpointing(self) -> None:
        pass

    def forward(self, x: Tensor, t: Tensor, context: Tensor, seq_len: int, **caches: Any) -> Tensor:
        shift = t.reshape(len(x), 1, -1, 1, 1).float() / 1000 + context.mean()
        flow = self.layer(x) + 0.1 * shift
        if torch.is_grad_enabled() and not caches.get("kv_cache"):
            gradients = []  # the trainer's own backward() brings it
            flow.register_hook(gradients.append)
            self.seen.append((x.detach(), t.detach(), flow.detach(), context.detach(), gradients))
        return flow


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, text_prompts: list[str]) -> dict[str, Tensor]:
        lengths = torch.tensor([[[0.1 * len(prompt)]] for prompt in text_prompts])
        return {"prompt_embeds": self.layer(lengths)}


class VAE(nn.Module):
    pass


class Loader:
    """Real clips and their prompts; goes round in two batches of two."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        clips = torch.randn(2, 2, FRAMES, CHANNELS, SIZE, SIZE, generator=generator)
        self.batches = [(clips[0], ["a ball falls", "rain"]), (0.1 * clips[1], ["waves", "a wide green field"])]
        self.given = []

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        for batch in self.batches:
            self.given.append(batch)
            yield batch


class ByHand(RegressionByHand):
    """Eq. 5-8 in plain arithmetic, from what the student saw and said."""

    def __init__(self, scheduler: Any, steps: list[float]) -> None:
        super().__init__()
        self.sigmas, self.timesteps, self.steps = scheduler.sigmas.double(), scheduler.timesteps.double(), steps

    def regression(self, clips: Tensor, seen: tuple[Any, ...], context: Tensor) -> float:
        x_t, times, flow, text, (gradient,) = seen
        assert torch.equal(text, context), "the student was told another text than the clips'"
        x_t, flow, gradient = (x.transpose(1, 2).double() for x in (x_t, flow, gradient))
        times = times.double().reshape(len(x_t), -1)
        assert torch.equal(times, times[:, :1].expand_as(times))
        times, targets = times[:, 0].tolist(), []
        for clip, x, time in zip(clips.double(), x_t, times, strict=True):
            assert min(abs(time - step) for step in self.steps) < 1e-3
            sigma = self.sigmas[(self.timesteps - time).abs().argmin()]
            noise = (x - (1 - sigma) * clip) / sigma
            assert abs(noise.std() - 1) < 0.15, "what was added is no standard normal noise"
            targets.append(noise - clip)
        target = torch.stack(targets)
        self.check_gradient(gradient, flow, target, times)
        return self(flow, target, times)

    def check_gradient(self, gradient: Tensor, flow: Tensor, target: Tensor, times: list[float]) -> None:
        """What the velocity was given, before the cache moves: weights are constants in Eq. 5."""
        losses = reference_sample_losses(flow.tolist(), target.tolist())
        usual = [self.cache.read(time, loss) for time, loss in zip(times, losses, strict=True)]
        weights = torch.tensor(reference_weights(losses, usual, self.sharpness, weight=2.0)).view(-1, 1, 1, 1, 1)
        expected = weights * 2 * (flow - target) / flow.numel()
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())

    @staticmethod
    def motion(video: Tensor, added_gradient: Tensor) -> float:
        """Of samples that move less than the floor asks for, so that there is a gradient, which is compared too."""
        x = video.double().requires_grad_()  # [B, F, C, H, W]
        temporal_loss = -((x - x.mean(dim=1, keepdim=True)).square().mean() + 1e-6).log()
        assert temporal_loss > 0.6, f"{temporal_loss.item()} is at the floor"
        (gradient,) = torch.autograd.grad(0.05 * temporal_loss, x)
        slack = 1e-3 * gradient.abs().max().item()
        torch.testing.assert_close(added_gradient.double(), gradient, rtol=1e-3, atol=slack)
        return reference_motion(video.transpose(1, 2).tolist())


def noting_gradient(method: Callable[..., Any], host_calls: list[Any], log: list[Tensor]) -> Callable[..., Any]:
    """The adapter's method over the host's, whose calls are noted; notes the gradient that it adds to the sample's."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        added = result[0] - host_calls[-1][-1][0]
        log.append(torch.autograd.grad(added, kwargs["image_or_video"], retain_graph=True)[0])
        return result

    return call


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])
