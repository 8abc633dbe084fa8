"""Training of the network that inserts latent frames: Sec. 8 of the paper."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset

from avd_core import LatentFrameInterpolator, NonFiniteGuard, interpolate_linearly, repeat_frames
from avd_trainer.config.loading import validate
from avd_trainer.config.run import InterpolatorConfig
from avd_trainer.config.sections import ShardsData
from avd_trainer.data.batches import Batch, Examples, read_batches
from avd_trainer.data.in_memory import InMemoryData
from avd_trainer.data.order import ShuffledOrder
from avd_trainer.data.shards import Example, ShardDataset
from avd_trainer.data.sources import load_clips
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.checkpoint import latest_checkpoint, read_state, read_tensors
from avd_trainer.training.optimizers import (
    Metrics,
    adamw,
    detached,
    indices_by_forward,
    optimizer_tensors,
    over_ranks,
    share_batch,
    whole,
)

# Held-out clips that are measured at once.
EVALUATION_BATCH = 8


class InterpolatorData(NamedTuple):
    """What an interpolator is trained and measured on.

    Attributes:
        train: Real clips.
        held_out: Clips that training never sees.
        workers: Processes that read ahead.
        shards: Where the clips come from a data set on disk, the whole of it.
    """

    train: Examples
    held_out: Examples
    workers: int = 0
    shards: ShardDataset | None = None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """``(C, F, H, W)``."""
        return tuple(_latent(self.train, 0).shape)


class InterpolatorErrors(BaseModel):
    """Mean squared errors of inserted frames on held-out clips."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    clips: int
    """Number of held-out clips."""
    frames: int
    """Number of frames that were left out of them and inserted again."""
    network: float
    """Of the trained network."""
    linear: float
    """Of :func:`avd_core.interpolate_linearly`."""
    repeat: float
    """Of :func:`avd_core.repeat_frames`."""


class InterpolatorTrainer:
    """Trains an interpolator by regression: every second frame of a real clip is left out and has to be inserted.

    Everything that is drawn is a function of seed and step, so a run does not depend on the number of ranks, and
    resumes from the step alone.

    Args:
        config: The run.
        data: Clips.
        ranks: The processes of the run.

    Attributes:
        step: Steps done.
        channels: Latent channels of the data, and so of the network.
        interpolator: The network, sharded over ``ranks``.

    Raises:
        UserError: If the batch cannot be shared out among the ranks, or the clips are too short or too small.
    """

    def __init__(self, config: InterpolatorConfig, data: InterpolatorData, ranks: Ranks) -> None:
        self.config = config
        self.data = data
        self.ranks = ranks
        self.step = 0
        _check_shape(data.latent_shape)
        self.channels = data.latent_shape[0]
        self._rows = share_batch(config.batch_size, config.micro_batch_size, ranks)
        self.interpolator = _build(config, self.channels, ranks)
        self._parameters: dict[str, nn.Parameter] = dict(self.interpolator.named_parameters())
        self.optimizer = adamw(self._parameters, config.optimizer)
        self.guard = NonFiniteGuard(config.max_skipped_steps, name="interpolator")

    def run(self) -> Iterator[Metrics]:
        """Train from the current step to ``max_steps``; yields the metrics of each step, which are those of all ranks.

        Detached scalars ``loss``, ``gradient_norm`` and ``skipped`` (0 or 1).
        """
        config = self.config
        order = ShuffledOrder(len(self.data.train), config.seed)
        batches = indices_by_forward(order, range(self.step, config.max_steps), config.batch_size, self._rows)
        clips = read_batches(self.data.train, batches, self.data.workers)
        while self.step < config.max_steps:
            yield self._train_step(clips)

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of the run by owner and name: the very ones that training changes, to be saved or filled."""
        return {
            "interpolator": detached(self._parameters),
            "optimizer": optimizer_tensors(self._parameters, self.optimizer),
        }

    def state(self) -> dict[str, Any]:
        """The rest of the run's state: numbers, strings and containers of them."""
        return {"step": self.step, "guard": self.guard.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` gave; the tensors are filled in place by who read them."""
        self.guard.load_state_dict(state["guard"])
        self.step = int(state["step"])

    def _train_step(self, clips: Iterator[Batch]) -> Metrics:
        self.step += 1
        losses = []
        for _ in self._rows:
            loss = interpolation_loss(self.interpolator, next(clips).latents.to(self.ranks.device))
            (loss / len(self._rows)).backward()
            losses.append(loss.detach())
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        metrics = {
            "loss": torch.stack(losses).mean(),
            "gradient_norm": whole(nn.utils.get_total_norm(gradients)),
        }
        stepped = self.guard.before_step(self.step, metrics)
        if stepped:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config, self.step)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return over_ranks(metrics | {"skipped": metrics["loss"].new_tensor(float(not stepped))}, self.ranks)


def interpolation_loss(interpolator: nn.Module, clips: Tensor) -> Tensor:
    """Mean squared error of the inserted frames.

    The frames that were kept are those of the clip by construction; counting them would only scale the loss.

    Args:
        interpolator: ``[B, C, F, H, W]`` to ``[B, C, 2 F - 1, H, W]``, new frames at odd places.
        clips: Real latents ``[B, C, F, H, W]``, ``F >= 3``.
    """
    kept, missing = split_frames(clips)
    return F.mse_loss(interpolator(kept)[:, :, 1::2], missing)


def split_frames(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Every second frame of clips ``[B, C, F, H, W]``, and the frames between those.

    Of an even number of frames the last is left out, so that kept frames are always two apart. (Sampling keeps it
    there, as it must end at the last frame; the network sees such a pair for the first time then.)
    """
    odd = clips[:, :, : (clips.shape[2] - 1) // 2 * 2 + 1]
    return odd[:, :, ::2], odd[:, :, 1::2]


def learning_rate(config: InterpolatorConfig, step: int) -> float:
    """The learning rate of a step, counted from 1."""
    if config.lr_schedule == "constant":
        return config.optimizer.lr
    return config.optimizer.lr * (1 + math.cos(math.pi * (step - 1) / config.max_steps)) / 2


def load_interpolator_data(config: InterpolatorConfig) -> InterpolatorData:
    """Open what an interpolator is trained on; captions are not read.

    Held out are a further set of shapes, the last quarter of each video, or the last ``config.evaluation.clips``
    samples of a data set.

    Raises:
        UserError: If data is missing or damaged, has prompts only, or too few clips to hold some out.
    """
    if not isinstance(config.data, ShardsData):
        clips = load_clips(config.data, BlockDCTCodec())
        embed = HashTextEmbedding(TEXT_LENGTH, 2)  # data sets carry text; nobody looks at this one
        return InterpolatorData(InMemoryData(clips.train, embed), InMemoryData(clips.held_out, embed))
    shards = ShardDataset(config.data.path)
    if not shards.has_latents:
        raise UserError(
            f"data.path {config.data.path} holds prompts only; an interpolator learns from clips. Encode videos with "
            "`avd data encode`."
        )
    count = len(shards) - config.evaluation.clips
    if count < 1:
        raise UserError(
            f"data.path {config.data.path} holds {len(shards)} clips, of which the last {config.evaluation.clips} "
            "would be held out: none is left to train on. Encode more videos, or lower evaluation.clips."
        )
    return InterpolatorData(
        _Part(shards, range(count)), _Part(shards, range(count, len(shards))), config.data.workers, shards
    )


def export_interpolator(run: Path, output: Path) -> LatentFrameInterpolator:
    """Write the interpolator of a run's newest checkpoint as ``save_pretrained`` does; one process calls.

    Args:
        run: The folder of a run that has saved a checkpoint.
        output: Where to write; what an earlier call wrote there is replaced.

    Returns:
        What was written, in evaluation mode, on the CPU.

    Raises:
        UserError: If there is no whole checkpoint of an interpolator, or ``output`` cannot be written.
    """
    checkpoint = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{run} holds no checkpoint yet. Pass the --output folder of an `avd train-interpolator` run.")
    state = read_state(checkpoint)
    config = validate(InterpolatorConfig, state["config"], f"{checkpoint}")
    interpolator = LatentFrameInterpolator(state["channels"], config.widths)
    read_tensors(checkpoint, {"interpolator": detached(dict(interpolator.named_parameters()))}, distributed=False)
    part = output.with_name(output.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        interpolator.save_pretrained(part)
        shutil.rmtree(output, ignore_errors=True)
        os.replace(part, output)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{output} cannot be written: {error}. Free some space, then run the same command again."
        ) from error
    return interpolator.eval()


@torch.no_grad()
def evaluate_interpolator(interpolator: LatentFrameInterpolator, clips: Examples) -> InterpolatorErrors:
    """Measure a network, and what it has to beat, on clips that it was not trained on."""
    device = next(interpolator.parameters()).device
    methods: dict[str, Callable[[Tensor], Tensor]] = {
        "network": interpolator,
        "linear": interpolate_linearly,
        "repeat": repeat_frames,
    }
    sums = dict.fromkeys(methods, 0.0)
    frames = numbers = 0
    for start in range(0, len(clips), EVALUATION_BATCH):
        rows = range(start, min(start + EVALUATION_BATCH, len(clips)))
        kept, missing = split_frames(torch.stack([_latent(clips, row) for row in rows]).to(device))
        frames += len(missing) * missing.shape[2]
        numbers += missing.numel()
        for name, method in methods.items():
            difference = method(kept)[:, :, 1::2].double() - missing
            sums[name] += float(difference.square().sum())
    return InterpolatorErrors(
        clips=len(clips), frames=frames, **{name: value / numbers for name, value in sums.items()}
    )


def render(errors: InterpolatorErrors) -> Table:
    """The errors for a terminal."""
    caption = f"{errors.frames} frames of {errors.clips} held-out clips. Lower is better."
    table = Table(title="Inserted frames", caption=caption)
    table.add_column("")
    table.add_column("mean squared error", justify="right")
    table.add_column("of linear", justify="right")
    for name, error in (
        ("repeat the frame before", errors.repeat),
        ("linear interpolation", errors.linear),
        ("trained network", errors.network),
    ):
        table.add_row(name, f"{error:.4g}", f"{error / errors.linear:.0%}" if errors.linear else "")
    return table


class _Part(Dataset[Example]):
    """Some rows of a data set, without their text, which is as large as a clip and would be copied along."""

    def __init__(self, data: Examples, rows: range) -> None:
        self._data, self._rows = data, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._data[self._rows[index]]._replace(text=torch.empty(0))


def _latent(data: Examples, index: int) -> Tensor:
    latent = data[index].latent
    assert latent is not None  # data of prompts is refused when it is opened
    return latent


def _check_shape(latent_shape: tuple[int, ...]) -> None:
    _, frames, height, width = latent_shape
    if frames < 3:
        raise UserError(
            f"data has clips of {frames} latent frame(s); an interpolator learns from at least 3, of which it inserts "
            "the middle one. Encode longer clips: 9 frames of video make 3 of Wan2.1's latents."
        )
    if min(height, width) < 4:
        raise UserError(
            f"data has latents {height} high and {width} wide; the network's three levels need at least 4 of each. "
            "Encode larger videos."
        )


def _build(config: InterpolatorConfig, channels: int, ranks: Ranks) -> LatentFrameInterpolator:
    """The network with its first weights, the same on any number of ranks, sharded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        interpolator = LatentFrameInterpolator(channels, config.widths)
    interpolator.to(ranks.device)
    fully_shard(interpolator, mesh=ranks.mesh)
    return interpolator
