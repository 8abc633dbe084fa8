"""From a configuration to data: what to train on, and what to hold out."""

from __future__ import annotations

from typing import Any, NamedTuple

from avd_trainer.config.run import TrainConfig
from avd_trainer.config.sections import ShapesData, ShardsData, VideosData
from avd_trainer.data.batches import CaptionedExamples
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData, encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.shards import ShardDataset
from avd_trainer.data.videos import load_videos, video_files
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.progress import ProgressBar

# Seeds from here on are for clips that nothing trains on.
HELD_OUT = 1_000_000


class TrainingData(NamedTuple):
    """What a run reads.

    Attributes:
        clips: Real clips, for the regression.
        prompts: Prompts, for the matching term.
        workers: Processes that read ahead.
        fingerprint: What a resumed run must find again; None for data that the configuration determines.
    """

    clips: CaptionedExamples
    prompts: CaptionedExamples
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


def _open_shards(config: ShardsData, prompts: ShardsData | None) -> TrainingData:
    clips = ShardDataset(config.path)
    if not clips.has_latents:
        raise UserError(f"data.path {config.path} holds prompts only. Encode videos with `avd data encode`.")
    prompt_data = clips if prompts is None else ShardDataset(prompts.path)
    fingerprint = {"data": clips.fingerprint(), "prompts": prompt_data.fingerprint()}
    workers = config.workers if prompts is None else max(config.workers, prompts.workers)
    return TrainingData(clips, prompt_data, workers, fingerprint)
