import pytest
import torch
import torch.nn.functional as F
from avd_trainer.config.run import TeacherConfig
from torch import Tensor

from avd_core import derive_floor
from avd_trainer.config.loading import load_config
from avd_trainer.config.sections import ShapesData
from avd_trainer.data.in_memory import CaptionedLatents, encode_shapes
from avd_trainer.data.moving_shapes import SHAPE_COLORS, MovingShapes
from avd_trainer.evaluation.clip_metrics import energy_distance
from avd_trainer.methods.flow_matching import TeacherTrainer
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.samplers import sample_teacher, schedule
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.training.config import TrainConfig

CLIPS = 72
PRESET = load_config(TrainConfig, "tiny")
EMBED = HashTextEmbedding(TEXT_LENGTH, 32)


@pytest.fixture(scope="module")
def clips() -> CaptionedLatents:
    """Clips of the tiny preset, which the teacher was not trained on."""
    assert isinstance(PRESET.data, ShapesData)
    return encode_shapes(MovingShapes(4 * CLIPS, PRESET.data.seed), BlockDCTCodec())


@pytest.fixture(scope="module")
def samples(clips: CaptionedLatents) -> Tensor:
    teacher = VelocityModel(load_transformer("bundled:tiny"))
    draws = torch.Generator().manual_seed(0)
    return sample_teacher(
        teacher,
        EMBED(clips.captions[:CLIPS]),
        EMBED([""])[0],
        clips.latents.shape[1:],
        lambda shape: torch.randn(CLIPS, *shape, generator=draws),
        steps=15,
        guidance_scale=PRESET.guidance_scale,
    )


def test_the_bundled_teacher_denoises_unseen_clips(clips: CaptionedLatents) -> None:
    teacher = VelocityModel(load_transformer("bundled:tiny"))
    text = EMBED(clips.captions)
    losses = {}
    for timestep in (250.0, 500.0, 750.0, 950.0):
        timesteps = torch.full((len(clips),), timestep)
        noise = torch.randn(clips.latents.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            velocity = teacher(schedule.add_noise(clips.latents, noise, timesteps), timesteps, text)
        losses[timestep] = float(F.mse_loss(velocity, noise - clips.latents))
    # Guessing the mean of data and noise costs 2.
    assert max(losses.values()) < 1.0
    assert losses[500.0] < 0.6


def test_its_samples_are_close_to_real_clips(samples: Tensor, clips: CaptionedLatents) -> None:
    real = clips.latents[CLIPS:]
    # Pooled over space and time, where noise averages out and shapes do not.
    distances = {
        name: energy_distance(F.avg_pool3d(x, (3, 2, 2)), F.avg_pool3d(real, (3, 2, 2)))
        for name, x in {"samples": samples, "clips": clips.latents[:CLIPS], "noise": torch.randn(samples.shape)}.items()
    }
    assert abs(distances["clips"]) < 0.02
    assert distances["samples"] < 0.2 * distances["noise"], distances


def test_its_samples_have_the_colours_of_their_captions(samples: Tensor, clips: CaptionedLatents) -> None:
    """The colour that most moving pixels are nearest to is one of the two in the caption, more often than not."""
    video = BlockDCTCodec().decode(samples)
    obeyed = 0
    for clip, caption in zip(video, clips.captions, strict=False):
        moving = clip.var(dim=1).sum(dim=0)
        pixels = clip[:, :, moving > moving.quantile(0.9)].flatten(1).T
        colors = torch.tensor(list(SHAPE_COLORS.values()))
        # Hue is what a caption fixes; guidance raises the contrast.
        nearest = torch.cdist(pixels - pixels.mean(1, keepdim=True), colors - colors.mean(1, keepdim=True)).argmin(1)
        counts = torch.bincount(nearest, minlength=len(colors))
        words = caption.split()
        ranking = [list(SHAPE_COLORS)[i] for i in counts.argsort(descending=True).tolist()]
        obeyed += ranking[0] in {words[1], words[7]}
    assert obeyed > CLIPS / 2


def test_the_presets_floor_is_derived_from_its_samples(samples: Tensor) -> None:
    motion = PRESET.objective.motion
    assert motion is not None
    assert motion.floor == pytest.approx(derive_floor(samples), abs=0.1)


def test_training_a_teacher_lowers_its_loss() -> None:
    changes = ["max_steps=60", "data.clips=16", "batch_size=8", "architecture.num_layers=1"]
    losses = list(TeacherTrainer(load_config(TeacherConfig, "tiny", changes)).run())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
