"""The flow matching of a small teacher, and the teacher that it made for the package."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from avd_core import derive_floor, shift_timesteps
from avd_trainer.config.loading import load_config
from avd_trainer.data.in_memory import CaptionedLatents, encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.sources import HELD_OUT, TrainingData
from avd_trainer.evaluation.clip_measures import energy_distance
from avd_trainer.evaluation.shape_measures import shape_measures
from avd_trainer.evaluation.shape_tracking import track_shapes
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import EulerSampler, sample_teacher, schedule
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, build_transformer, load_transformer
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.run import train
from avd_trainer.training.trainer import Trainer
from runs import ARCHITECTURE, LATENT_SHAPE, MakeConfig, MakeTrainer, load_data_of, order_of, weights
from runs import EMBED as TINY_EMBED

CLIPS = 72
PRESET = load_config(TrainConfig, "tiny")
METHOD: Any = PRESET.method
EMBED = HashTextEmbedding(TEXT_LENGTH, 32)


# --- The method


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_steps_are_those_of_the_plain_algorithm(
    make_trainer: MakeTrainer, clips: CaptionedLatents, micro_batch_size: int | None
) -> None:
    optimizer = {"lr": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.1, "schedule": "one_cycle"}
    method = {"optimizer": optimizer, "caption_dropout": 0.4, "ema_decay": 0.9, "timestep_shift": 2.0}
    trainer = make_trainer(
        "flow_matching", method=method, max_steps=5, batch_size=4, micro_batch_size=micro_batch_size, seed=3,
        max_gradient_norm=1.0,
    )  # fmt: skip
    losses = [metrics["loss"].item() for metrics in trainer.run()]

    torch.manual_seed(3)
    model = VelocityModel(build_transformer(ARCHITECTURE))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(adamw, 1e-2, total_steps=5)
    averages = [parameter.detach().clone() for parameter in model.parameters()]
    order, text = order_of("clips", seed=3), TINY_EMBED(clips.captions)
    dropped = 0
    for step, loss in enumerate(losses, start=1):
        index = order.batch(4 * (step - 1), 4)
        draws = Draws((3, "teacher", step, 0), range(4), torch.device("cpu"))
        without = draws.uniform("caption_dropout") < 0.4
        dropped += int(without.sum())
        captions = text[index] * ~without.view(4, 1, 1)  # the empty caption's embedding is zero
        timesteps = shift_timesteps(1000 * draws.uniform("timesteps"), 2.0)
        noise = draws.normal("noise", LATENT_SHAPE)
        sigma = (timesteps / 1000).view(4, 1, 1, 1, 1)
        velocity = model((1 - sigma) * clips.latents[index] + sigma * noise, timesteps, Condition(captions))
        expected = F.mse_loss(velocity, noise - clips.latents[index])
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        expected.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        scheduler.step() if step < 5 else None
        decay = min(0.9, (1 + step) / (10 + step))  # it starts low, so that the first weights are soon forgotten
        for average, parameter in zip(averages, model.parameters(), strict=True):
            average.lerp_(parameter.detach(), 1 - decay)
    assert 0 < dropped < 20
    torch.testing.assert_close(weights(trainer.models["teacher"]), weights(model), rtol=0, atol=1e-4)
    with trainer.averages["ema"].average_parameters():
        found = weights(trainer.models["teacher"])
    torch.testing.assert_close(found, torch.cat([average.flatten() for average in averages]), rtol=0, atol=1e-4)


def test_training_a_teacher_lowers_its_loss(ranks: Ranks) -> None:
    changes = ["max_steps=60", "data.clips=16", "batch_size=8", "method.architecture.num_layers=1"]
    config = load_config(TrainConfig, "tiny", changes, method="flow_matching")
    losses = [metrics["loss"].item() for metrics in Trainer(config, load_data_of(config), ranks).run()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_run_leaves_the_averaged_teacher_in_bfloat16_and_sample_clips(
    make_config: MakeConfig, data: TrainingData, tmp_path: Path, ranks: Ranks
) -> None:
    config = make_config(
        "flow_matching", method={"ema_decay": 0.5}, max_steps=4, samples={"every": 2, "count": 1},
        logging={"tensorboard": False},
    )  # fmt: skip
    assert train(config, tmp_path, ranks, data=data)
    trainer = Trainer(config, data, ranks)
    list(trainer.run())
    with trainer.averages["ema"].average_parameters():
        expected = weights(trainer.models["teacher"])
    with safe_open(tmp_path / "teacher" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert torch.equal(weights(load_transformer(str(tmp_path / "teacher"))), expected.bfloat16().float())
    assert not torch.equal(weights(trainer.models["teacher"]), expected)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-00000002", "step-00000004"]


# --- The teacher of the package


@pytest.fixture(scope="module")
def shapes() -> CaptionedLatents:
    """Clips with captions that no seed trains on."""
    return encode_shapes(MovingShapes(4 * CLIPS, HELD_OUT, held_out=True), BlockDCTCodec())


@pytest.fixture(scope="module")
def samples(shapes: CaptionedLatents) -> Tensor:
    teacher = VelocityModel(load_transformer("bundled:tiny"))
    draws = torch.Generator().manual_seed(0)
    return sample_teacher(
        teacher,
        Condition(EMBED(shapes.captions[:CLIPS])),
        EMBED([""])[0],
        shapes.latents.shape[1:],
        lambda shape: torch.randn(CLIPS, *shape, generator=draws),
        steps=15,
        guidance_scale=METHOD.guidance_scale,
        shift=METHOD.sampling_shift,
    )


def test_sample_clips_are_shifted_as_the_configuration_says(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        "flow_matching", method={"sampling_shift": 4.0, "guidance_scale": 2.0, "timestep_shift": 1.5}
    )
    assert trainer.method.sampler == EulerSampler(guidance_scale=2.0, shift=4.0, steps=25)


def test_the_bundled_teacher_denoises_unseen_clips(shapes: CaptionedLatents) -> None:
    teacher = VelocityModel(load_transformer("bundled:tiny"))
    text = EMBED(shapes.captions)
    losses = {}
    for timestep in (250.0, 500.0, 750.0, 950.0):
        timesteps = torch.full((len(shapes),), timestep)
        noise = torch.randn(shapes.latents.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            velocity = teacher(schedule.add_noise(shapes.latents, noise, timesteps), timesteps, Condition(text))
        losses[timestep] = float(F.mse_loss(velocity, noise - shapes.latents))
    # Guessing the mean of data and noise costs 2.
    assert max(losses.values()) < 1.0
    assert losses[500.0] < 0.6


def test_its_samples_are_close_to_real_clips(samples: Tensor, shapes: CaptionedLatents) -> None:
    real = shapes.latents[CLIPS:]
    # Pooled over space and time, where noise averages out and shapes do not.
    distances = {
        name: energy_distance(F.avg_pool3d(x, (3, 2, 2)), F.avg_pool3d(real, (3, 2, 2)))
        for name, x in {
            "samples": samples,
            "clips": shapes.latents[:CLIPS],
            "noise": torch.randn(samples.shape),
        }.items()
    }
    assert abs(distances["clips"]) < 0.02
    assert distances["samples"] < 0.2 * distances["noise"], distances


def test_its_samples_show_what_their_captions_say(samples: Tensor, shapes: CaptionedLatents) -> None:
    measures = shape_measures(track_shapes(BlockDCTCodec().decode(samples), shapes.captions[:CLIPS]))
    shares = {name: float(measures[name].mean()) for name in ("visible", "kind", "direction")}
    assert shares["visible"] > 0.9, shares
    assert shares["kind"] > 0.7, shares
    assert shares["direction"] > 0.7, shares


def test_the_presets_floor_is_derived_from_its_samples(samples: Tensor) -> None:
    assert METHOD.motion.floor == pytest.approx(derive_floor(samples), abs=0.1)
