"""From a configuration to data: what to train on, and what to hold out."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avd_trainer.config import ShapesData, ShardsData, TrainConfig, VideosData
from avd_trainer.data.codec import BlockDCTCodec
from avd_trainer.data.latents import CaptionedLatents, InMemoryData, encode_shapes
from avd_trainer.data.shapes import MovingShapes
from avd_trainer.data.shards import Sample, ShardDataset
from avd_trainer.data.text import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.data.videos import load_videos, video_files
from avd_trainer.errors import UserError
from avd_trainer.progress import ProgressBar
from avd_trainer.signals import SIGNALS

# Seeds from here on are for clips that nothing trains on.
HELD_OUT = 1_000_000


class Samples(Protocol):
    """Samples by index."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Sample:
        """A sample."""


class Data(Samples, Protocol):
    """Captioned samples, with the text embedding of the negative prompt."""

    def unconditional(self) -> Tensor:
        """``[L, D]``."""


class TrainingData(NamedTuple):
    """What a run reads.

    Attributes:
        clips: Real clips, for the regression.
        prompts: Prompts, for the matching term.
        workers: Processes that read ahead.
        fingerprint: What a resumed run must find again; None for data that the configuration determines.
    """

    clips: Data
    prompts: Data
    workers: int = 0
    fingerprint: dict[str, Any] | None = None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """``(C, F, H, W)``."""
        latent = self.clips[0].latent
        if latent is None:
            raise UserError(
                "data holds prompts only; the regression needs clips. Encode videos with `avd data encode`."
            )
        return tuple(latent.shape)


class Batch(NamedTuple):
    """Samples side by side.

    Attributes:
        latents: ``[B, C, F, H, W]`` float32; empty where the data has prompts only.
        text: ``[B, L, D]`` float32.
    """

    latents: Tensor
    text: Tensor


class Clips(NamedTuple):
    """Clips in memory, and what only evaluation sees."""

    train: CaptionedLatents
    held_out: CaptionedLatents


def load_data(config: TrainConfig, text_dim: int, channels: int) -> TrainingData:
    """Open what a run trains on.

    Args:
        config: The run.
        text_dim: Width of the text embeddings that the models expect.
        channels: Latent channels that they expect.

    Raises:
        UserError: If it is missing, damaged, or does not fit the models.
    """
    if isinstance(config.data, ShardsData):
        data = _open_shards(config.data, config.prompts)
    else:
        clips = load_clips(config.data, BlockDCTCodec(), held_out=False).train
        memory = InMemoryData(clips, HashTextEmbedding(TEXT_LENGTH, text_dim))
        data = TrainingData(memory, memory)
    widths = {name: part[0].text.shape[-1] for name, part in (("data", data.clips), ("prompts", data.prompts))}
    for name, width in widths.items():
        if width != text_dim:
            raise UserError(
                f"{name} has text embeddings of width {width}, the teacher expects {text_dim}. Encode the captions "
                "with the teacher's own text encoder (`avd data encode --model TEACHER`)."
            )
    if data.latent_shape[0] != channels:
        raise UserError(
            f"data has {data.latent_shape[0]} latent channels, the teacher expects {channels}. Encode the videos with "
            "the teacher's own VAE (`avd data encode --model TEACHER`)."
        )
    return data


def load_clips(config: ShapesData | VideosData, codec: BlockDCTCodec, *, held_out: bool = True) -> Clips:
    """Make or read clips, and encode them.

    Of each video the last quarter is held out. With ``held_out=False`` shapes are not made for that.

    Raises:
        UserError: If there is no readable video.
    """
    if isinstance(config, ShapesData):
        parts = [MovingShapes(config.clips, config.seed)]
        if held_out:
            parts.append(MovingShapes(config.held_out, HELD_OUT + config.seed))
        with ProgressBar("clips", sum(map(len, parts))) as bar:
            encoded = [encode_shapes(part, codec, bar.advance) for part in parts]
        return Clips(encoded[0], encoded[-1])
    with ProgressBar("videos", len(video_files(config.path))) as bar:
        return Clips(*load_videos(config.path, codec, on_file=bar.advance))


def read_batches(data: Samples, batches: Iterable[list[int]], workers: int) -> Iterator[Batch]:
    """Read the samples of each list of indices, ahead of need where there are workers."""
    loader = DataLoader(
        _Reporting(data),
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: starting a loader must not move the global one, which checkpoints hold.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Reporting(Dataset[Sample | UserError]):
    """Hands errors over as values: a DataLoader would bury their message in its worker's traceback."""

    def __init__(self, data: Samples) -> None:
        self._data = data

    def __getitem__(self, index: int) -> Sample | UserError:
        try:
            return self._data[index]
        except UserError as error:
            return error


def _leave_signals_to_the_trainer(worker: int) -> None:
    # Launchers signal whole process groups; the trainer needs its data until it has saved, and then ends its workers.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _collate(items: list[Sample | UserError]) -> Batch | UserError:
    errors = [item for item in items if isinstance(item, UserError)]
    if errors:
        return errors[0]
    samples = [item for item in items if isinstance(item, Sample)]
    latents = [sample.latent for sample in samples if sample.latent is not None]
    return Batch(torch.stack(latents) if latents else torch.empty(0), torch.stack([sample.text for sample in samples]))


def _open_shards(config: ShardsData, prompts: ShardsData | None) -> TrainingData:
    clips = ShardDataset(config.path)
    if not clips.has_latents:
        raise UserError(f"data.path {config.path} holds prompts only. Encode videos with `avd data encode`.")
    prompt_data = clips if prompts is None else ShardDataset(prompts.path)
    fingerprint = {"data": clips.fingerprint(), "prompts": prompt_data.fingerprint()}
    workers = config.workers if prompts is None else max(config.workers, prompts.workers)
    return TrainingData(clips, prompt_data, workers, fingerprint)
