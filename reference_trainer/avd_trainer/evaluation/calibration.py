"""The motion term's floor for a latent space, from samples of its teacher and from real clips."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from torch import Tensor

from avd_core import temporal_variance
from avd_trainer.data.sources import load_data
from avd_trainer.methods.dmd import DMDMethodConfig
from avd_trainer.models.samplers import sample_teacher
from avd_trainer.models.transformer import DTYPES, VelocityModel, load_transformer, prepare
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.training.config import TrainConfig

# How far the paper's floor of 0.6 lies below the 1.5 of its teacher's samples.
PAPER_MARGIN = 0.9
# The paper's k of Eq. 7, for latents that are normalised to unit standard deviation.
PAPER_SHARPNESS = 3.0
# What the loss adds to the variance (eps of Eq. 8); keeps the loss of a clip that stands still finite.
EPS = 1e-6

EXPLANATION = (
    "The temporal loss is -log of the latents' variance along frames: lower means more motion, and 0.7 less is twice "
    "the variance. The motion term pushes the student's down until it reaches method.motion.floor and then stops, "
    "so a lower floor asks for more motion."
)


class LatentScale(BaseModel):
    """How much a set of latents moves and spreads."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    samples: int
    """Number of clips."""
    temporal_loss: float
    """``-log E[Var_t]`` of all clips together, in nats."""
    clip_mean: float
    """Mean of the single clips' temporal losses; above that of all together, more so the more they differ."""
    clip_std: float
    """Standard deviation of the single clips' temporal losses; 0 for one clip."""
    channel_std: tuple[float, ...]
    """Standard deviation of each channel."""

    @property
    def std(self) -> float:
        """Root mean square of the channels' standard deviations."""
        return math.sqrt(sum(std * std for std in self.channel_std) / len(self.channel_std))


class Calibration(BaseModel):
    """What :func:`calibrate` found."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    teacher: LatentScale
    """Samples of the teacher."""
    real: LatentScale
    """Real clips."""
    floor: float
    """Floor at which the term stops once the student moves as much as the teacher: its ``temporal_loss``, which is
    :func:`avd_core.derive_floor` of all samples."""
    paper_floor: float
    """Floor as far below the teacher's temporal loss as the paper's, 0.9: up to 2.5 times the teacher's variance."""
    remarks: tuple[str, ...]
    """What does not fit together, in words, with what to do."""


def calibrate_run(config: TrainConfig, *, samples: int, steps: int) -> Calibration:
    """Sample the teacher of a run and compare with its real clips, in one process.

    Args:
        config: The run: teacher, guidance, data, prompts, seed.
        samples: Number of samples, and of real clips, at most those that there are.
        steps: Euler steps of the teacher.

    Raises:
        UserError: As :func:`calibrate`, or if teacher or data cannot be loaded.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = config.method
    if not isinstance(method, DMDMethodConfig) or config.teacher is None:
        raise UserError(
            f"Method {method.kind} has no teacher with guidance to calibrate. Choose dmd or avd by --method."
        )
    module = load_transformer(config.teacher)
    architecture = module.config
    data = load_data(
        config.data,
        config.prompts,
        teacher=config.teacher,
        text_dim=architecture.text_dim,
        channels=architecture.in_channels,
    )
    dtype = DTYPES[config.precision]
    prepare(module, {}, dtype)
    teacher = VelocityModel(module.to(device), dtype=dtype)
    shape, unconditional = data.latent_shape, data.prompts.unconditional().to(device)
    real, batch = min(samples, len(data.clips)), config.micro_batch_size or config.batch_size
    batches = [range(start, min(start + batch, samples)) for start in range(0, samples, batch)]
    with ProgressBar("teacher samples", steps * len(batches)) as bar:

        def sampled() -> Iterator[Tensor]:
            for rows in batches:
                text = torch.stack([data.prompts[row % len(data.prompts)].text for row in rows]).to(device)
                draws = Draws((config.seed, "calibration"), rows, device)
                yield sample_teacher(
                    teacher,
                    text,
                    unconditional,
                    shape,
                    draws.named("trajectory"),
                    steps=steps,
                    guidance_scale=method.guidance_scale,
                    on_step=bar.advance,
                )

        clips = (data.clips[row * len(data.clips) // real].latent for row in range(real))
        return calibrate(sampled(), (clip.unsqueeze(0) for clip in clips if clip is not None))


def calibrate(teacher_batches: Iterable[Tensor], real_batches: Iterable[Tensor]) -> Calibration:
    """Measure samples of the teacher and real clips; a few dozen of each suffice.

    Batches are read one after the other; what is kept are sums, and one number for each clip.

    Args:
        teacher_batches: ``[B, C, F, H, W]`` finished samples, with the guidance of training, floating, on any device.
        real_batches: ``[B, C, F, H, W]`` latents of the training data.

    Raises:
        UserError: If there are no clips, or clips of fewer than two frames, that are not finite or do not move at all,
            or if the two have different channels.
    """
    teacher = _measure(teacher_batches, "teacher's samples")
    real = _measure(real_batches, "real clips")
    if len(teacher.channel_std) != len(real.channel_std):
        raise UserError(
            f"The teacher's latents have {len(teacher.channel_std)} channels, the real clips' "
            f"{len(real.channel_std)}. Encode the clips with the teacher's VAE."
        )
    return Calibration(
        teacher=teacher,
        real=real,
        floor=teacher.temporal_loss,
        paper_floor=teacher.temporal_loss - PAPER_MARGIN,
        remarks=tuple(_remarks(teacher, real)),
    )


def render(calibration: Calibration) -> Table:
    """The calibration for a terminal."""
    teacher, real = calibration.teacher, calibration.real
    caption = "\n".join([EXPLANATION, *(f"Note: {remark}" for remark in calibration.remarks)])
    table = Table(title="Calibration", caption=caption, caption_justify="left")
    table.add_column("")
    table.add_column("teacher", justify="right")
    table.add_column("real", justify="right")
    table.add_row("clips", str(teacher.samples), str(real.samples))
    table.add_row("temporal loss", f"{teacher.temporal_loss:.3f}", f"{real.temporal_loss:.3f}")
    table.add_row(
        "temporal loss of single clips",
        f"{teacher.clip_mean:.3f} ± {teacher.clip_std:.3f}",
        f"{real.clip_mean:.3f} ± {real.clip_std:.3f}",
    )
    table.add_row("standard deviation", f"{teacher.std:.3f}", f"{real.std:.3f}")
    for channel, stds in enumerate(zip(teacher.channel_std, real.channel_std, strict=True)):
        table.add_row(f"  channel {channel}", *(f"{std:.3f}" for std in stds))
    table.add_section()
    table.add_row("floor: moves as much as the teacher", f"{calibration.floor:.2f}", "")
    table.add_row("floor: as far below it as the paper's", f"{calibration.paper_floor:.2f}", "")
    return table


@torch.no_grad()
def _measure(batches: Iterable[Tensor], what: str) -> LatentScale:
    variances: list[float] = []  # one number for each clip
    count, sums = 0, torch.zeros(2, 0)
    for batch in batches:
        if batch.ndim != 5 or batch.shape[2] < 2:
            raise UserError(
                f"The {what} must be latents [B, C, F, H, W] with at least 2 frames, got {list(batch.shape)}. A single "
                "frame has no motion to measure."
            )
        variances += [float(temporal_variance(clip.unsqueeze(0))) for clip in batch]
        wide = batch.cpu().double()
        own = torch.stack([wide.sum(dim=(0, 2, 3, 4)), wide.square().sum(dim=(0, 2, 3, 4))])
        if count and own.shape != sums.shape:
            raise UserError(f"The {what} have {sums.shape[1]} channels in one batch and {own.shape[1]} in another.")
        sums = own if count == 0 else sums + own
        count += batch.numel() // batch.shape[1]
    if not variances:
        raise UserError(f"There are no {what} to measure. Give at least a few dozen.")
    variance = sum(variances) / len(variances)
    if not math.isfinite(variance):
        raise UserError(f"The {what} hold values that are not finite. Check the weights and the precision.")
    if not variance > 0:
        raise UserError(f"The {what} do not move: their variance along frames is 0. No floor can be taken from them.")
    losses = torch.tensor([-math.log(variance + EPS) for variance in variances], dtype=torch.float64)
    mean, mean_square = sums / count
    return LatentScale(
        samples=len(variances),
        temporal_loss=-math.log(variance),
        clip_mean=float(losses.mean()),
        clip_std=float(losses.std(correction=0)),
        channel_std=tuple((mean_square - mean.square()).clamp_min(0).sqrt().tolist()),
    )


def _remarks(teacher: LatentScale, real: LatentScale) -> list[str]:
    remarks = []
    ratio = real.std / teacher.std
    if not 0.8 <= ratio <= 1.25:
        remarks.append(
            f"real clips spread {ratio:.2f} times as much as the teacher's samples. Check that both are normalised by "
            "the same VAE statistics; if they are, the data is of another kind than the teacher's."
        )
    # The noise has unit variance, so it is against 1 that the data's scale counts.
    if not 0.8 <= real.std <= 1.25:
        sharpness = PAPER_SHARPNESS / real.std**2
        remarks.append(
            f"real clips have a standard deviation of {real.std:.2f}, where the regression's sharpness of "
            f"{PAPER_SHARPNESS:g} is meant for 1. Losses differ from their mean by the square of that: for the same "
            f"weights set method.regression.sharpness to about {sharpness:.2g}."
        )
    if real.temporal_loss - teacher.temporal_loss > PAPER_MARGIN:
        remarks.append(
            "real clips move far less than the teacher's samples, so regression and motion term pull in opposite "
            "directions. Leave still clips out of the data, or raise the floor."
        )
    return remarks
