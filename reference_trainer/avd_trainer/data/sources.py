"""From a configuration to data: what to train on, and what to keep for evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from avd_trainer.config.sections import DataSection, ShapesData, ShardsData, VideosData
from avd_trainer.data.decoding import video_files
from avd_trainer.data.examples import CaptionedExamples, Examples, PartOfData
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData, encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.schema import Encoding
from avd_trainer.data.shard_reading import ShardDataset
from avd_trainer.data.videos import load_videos
from avd_trainer.models.architecture import ImageInput, image_input, latent_channels
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.codecs.latent_space import LATENT_SPACES, latent_space_of
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.progress import ProgressBar

# diffusers' attention finds the image's tokens by there being so many of the text behind them.
TEXT_TOKENS = 512
# Seeds from here on are for clips that nothing trains on.
HELD_OUT = 1_000_000


class TrainingData(NamedTuple):
    """What a run reads.

    Attributes:
        clips: Real clips, for the regression.
        prompts: Prompts, for the matching term.
        workers: Processes that read ahead.
        fingerprint: What a resumed run compares its data with; None for data that the configuration determines.
        encoding: How clips became latents, if that is known.
        held_out: Clips that training never sees, if any were asked for.
    """

    clips: CaptionedExamples
    prompts: CaptionedExamples
    workers: int = 0
    fingerprint: dict[str, Any] | None = None
    encoding: Encoding | None = None
    held_out: Examples | None = None

    def check_fingerprint(self, saved: Mapping[str, Any]) -> None:
        """Compare with the fingerprint in a checkpoint.

        Raises:
            UserError: If the data is another.
        """
        for name, part in (("data", self.clips), ("prompts", self.prompts)):
            whole = part.whole if isinstance(part, PartOfData) else part
            if isinstance(whole, ShardDataset):
                whole.check_fingerprint(saved[name])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """``(C, F, H, W)``."""
        latent = self.clips[0].latent
        assert latent is not None  # prompts alone are refused when they are opened
        return tuple(latent.shape)


class Clips(NamedTuple):
    """Clips in memory, and what only evaluation sees."""

    train: CaptionedLatents
    held_out: CaptionedLatents


def load_data(
    data: DataSection,
    prompts: ShardsData | None,
    *,
    teacher: str | None,
    architecture: Mapping[str, Any] | None,
    text: bool = True,
    held_out: int = 0,
) -> TrainingData:
    """Open what a run trains on.

    Args:
        data: Which clips.
        prompts: Which prompts; None for the captions of the clips.
        teacher: The teacher's name, as in the configuration; the data has to fit it. None if there is none.
        architecture: Keyword arguments of the transformers that read it, which say the width of text embeddings, the
            latents' channels and whether they are given the first frame; None if there are none.
        text: Whether captions are read.
        held_out: How many clips evaluation wants: so many of the last of data on disk, and the held-out clips of shapes
            and videos.

    Raises:
        UserError: If it is missing, damaged, too little, or does not fit the teacher.
    """
    text_dim: int | None = architecture["text_dim"] if architecture and text else None
    image = image_input(architecture) if architecture else None
    if isinstance(data, ShardsData):
        found = _open_shards(data, prompts, held_out, text=text_dim is not None, image=image)
    else:
        clips = load_clips(data, BlockDCTCodec(), held_out=held_out > 0)
        embed = HashTextEmbedding(TEXT_LENGTH, text_dim or 2)  # where captions are not read, nobody looks at theirs
        memory = InMemoryData(clips.train, embed, image=image is not None)
        rest = InMemoryData(clips.held_out, embed) if held_out else None
        found = TrainingData(memory, memory, encoding=assumed_encoding(data, teacher), held_out=rest)
    for name, part in (("data", found.clips), ("prompts", found.prompts)) if text_dim is not None else ():
        length, width = part[0].text.shape
        if width != text_dim:
            raise UserError(
                f"{name} has text embeddings of width {width}, the teacher expects {text_dim}. Encode the captions "
                "with the teacher's own text encoder (`avd data encode --model TEACHER`)."
            )
        if image is not None and image.embedding_dim and length != TEXT_TOKENS:
            raise UserError(
                f"{name} has text embeddings of {length} tokens, and an image-to-video teacher that reads an image "
                f"embedding takes {TEXT_TOKENS}. Encode the captions with the teacher's own text encoder (`avd data "
                "encode --model TEACHER`)."
            )
    if architecture and found.latent_shape[0] != latent_channels(architecture):
        raise UserError(
            f"data has {found.latent_shape[0]} latent channels, the teacher expects {latent_channels(architecture)}. "
            "Encode the videos with the teacher's own VAE (`avd data encode --model TEACHER`)."
        )
    if teacher is not None:
        _check_latent_space(found.encoding, teacher)
    return found


def open_clips(data: ShardsData, image: ImageInput | None = None) -> ShardDataset:
    """Open shards that hold clips; ``image`` is what a model reads of their first frames.

    Raises:
        UserError: If they hold prompts only; otherwise as :class:`ShardDataset`.
    """
    clips = ShardDataset(*data.path, image=image)
    if not clips.has_latents:
        raise UserError(
            f"data.path {', '.join(map(str, data.path))} holds prompts only, and clips are needed. Encode videos with "
            "`avd data encode`."
        )
    return clips


def assumed_encoding(data: DataSection, teacher: str | None) -> Encoding:
    """How clips became latents if the data does not say it: as for the teacher, or else as for Wan.

    Clips that are encoded when a run starts are always in the block DCT's space.
    """
    if not isinstance(data, ShardsData):
        return Encoding("block-dct-4")
    return Encoding((None if teacher is None else latent_space_of(teacher)) or "wan")


def load_clips(config: ShapesData | VideosData, codec: BlockDCTCodec, *, held_out: bool = True) -> Clips:
    """Make or read clips, and encode them.

    Of each video the last quarter is held out. With ``held_out=False`` shapes are not made for that.

    Raises:
        UserError: If there is no readable video.
    """
    if isinstance(config, ShapesData):
        parts = [MovingShapes(config.clips, config.seed, saturation=config.saturation, captions=config.captions)]
        if held_out:
            parts.append(held_out_shapes(config, config.held_out))
        with ProgressBar("clips", sum(map(len, parts))) as bar:
            encoded = [encode_shapes(part, codec, bar.advance) for part in parts]
        # Clips do not depend on their place, so the first ones are as good as any.
        return Clips(encoded[0].with_misfits(config.misfits), encoded[-1])
    with ProgressBar("videos", len(video_files(config.path))) as bar:
        return Clips(*load_videos(config.path, codec, on_file=bar.advance))


def held_out_shapes(config: ShapesData, count: int, caption_seed: int = 0) -> MovingShapes:
    """The first of the clips that no run with this data trains on.

    Args:
        config: Which data.
        count: How many clips.
        caption_seed: Which of the held-out captions. Sets of two seeds are drawn one without regard to the other.
    """
    seed = HELD_OUT * (1 + caption_seed) + config.seed
    return MovingShapes(count, seed, held_out=True, saturation=config.saturation, captions=config.captions)


def _open_shards(
    data: ShardsData, prompts: ShardsData | None, held_out: int, *, text: bool, image: ImageInput | None
) -> TrainingData:
    clips = open_clips(data, image)
    prompt_data = clips if prompts is None else ShardDataset(*prompts.path, image=image)
    fingerprint = {"data": clips.fingerprint(), "prompts": prompt_data.fingerprint()}
    workers = data.workers if prompts is None else max(data.workers, prompts.workers)
    if not held_out:
        return TrainingData(clips, prompt_data, workers, fingerprint, clips.encoding)
    count = len(clips) - held_out
    if count < 1:
        raise UserError(
            f"data.path {', '.join(map(str, data.path))} holds {len(clips)} clips, of which the last {held_out} would "
            "be held out: none is left to train on. Encode more videos, or lower method.held_out."
        )
    train, rest = (PartOfData(clips, places, text=text) for places in (range(count), range(count, len(clips))))
    own_prompts = train if prompts is None else prompt_data
    return TrainingData(train, own_prompts, workers, fingerprint, clips.encoding, rest)


def _check_latent_space(encoding: Encoding | None, teacher: str) -> None:
    space = latent_space_of(teacher)
    if space is not None and encoding is not None and encoding.latent_space != space:
        raise UserError(
            f"data is encoded by {encoding}, and the teacher {teacher} makes latents of {LATENT_SPACES[space]}: its "
            "channels mean other things. Encode the videos with the teacher's own codec (`avd data encode --model "
            f"{'tiny' if space == 'block-dct-4' else 'TEACHER'}`) and pass them by --data."
        )
