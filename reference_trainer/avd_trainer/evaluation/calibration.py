"""What belongs to a latent space, measured: the motion term's floor, and whether the regression's sharpness fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Group
from rich.table import Table
from torch import Tensor

from avd_core import derive_floor, temporal_variance
from avd_trainer.data.batches import Batch, join
from avd_trainer.data.examples import condition_of
from avd_trainer.data.sources import TrainingData, load_data
from avd_trainer.evaluation.sharpness import ClipBatch, SharpnessCalibration, calibrate_sharpness, render_sharpness
from avd_trainer.methods.dmd import DMDMethodConfig
from avd_trainer.models.samplers import EulerSampler, sample_teacher
from avd_trainer.models.transformer import DTYPES, VelocityModel, load_transformer
from avd_trainer.runtime.draws import Draws
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.training.config import TrainConfig

# How far the paper's floor of 0.6 lies below the 1.5 of its teacher's samples, the mean of single clips' losses.
PAPER_MARGIN = 0.9

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
    still: int = 0
    """How many of them do not move."""
    clip_mean: float
    """Mean of the single clips' temporal losses, ``-log(Var_t + eps)``, in nats; of those that move."""
    clip_std: float
    """Standard deviation of the single clips' temporal losses; 0 for one clip. Of those that move."""
    temporal_loss: float
    """``-log E[Var_t]`` of all clips together; below ``clip_mean``, more so the more they differ (Jensen)."""
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
    """Floor at which the term stops once the student moves as much as the teacher: its ``clip_mean``, which is
    :func:`avd_core.derive_floor` of all samples."""
    paper_floor: float
    """Floor as far below the teacher's temporal loss as the paper's, 0.9: up to 2.5 times the teacher's variance."""
    remarks: tuple[str, ...]
    """What does not fit together, in words, with what to do."""
    sampling: EulerSampler | None = None
    """How the teacher was sampled; None where the samples were given."""
    sharpness: SharpnessCalibration | None = None
    """The weight of the adaptive regression; None for a method without it."""


def calibrate_run(config: TrainConfig, *, samples: int, steps: int) -> Calibration:
    """Sample the teacher of a run, compare with its real clips, and regress those as the student starts; one process.

    Args:
        config: The run: teacher, guidance, sampling shift, regression, data, prompts, seed.
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
    dtype = DTYPES[config.precision]
    module = load_transformer(config.teacher, device, dtype)
    data = load_data(
        config.data,
        config.prompts,
        teacher=config.teacher,
        architecture=module.config,
    )
    return calibrate_models(config, VelocityModel(module, dtype=dtype), data, device, samples=samples, steps=steps)


def calibrate_models(
    config: TrainConfig,
    teacher: VelocityModel,
    data: TrainingData,
    device: torch.device,
    *,
    samples: int,
    steps: int,
) -> Calibration:
    """:func:`calibrate_run` of a teacher and data that are loaded.

    Args:
        config: The run, of method ``dmd`` or one that extends it.
        teacher: The teacher, as which the student starts, unless ``config.student_weights`` are others.
        data: Clips and prompts.
        device: Where the teacher is.
        samples: As for :func:`calibrate_run`.
        steps: As there.

    Raises:
        UserError: As :func:`calibrate` and :func:`calibrate_sharpness`.
    """
    method = config.method
    assert isinstance(method, DMDMethodConfig)
    real, size = min(samples, len(data.clips)), config.micro_batch_size or config.batch_size
    places = [row * len(data.clips) // real for row in range(real)]
    sampler = EulerSampler(guidance_scale=method.guidance_scale, shift=method.sampling_shift, steps=steps)
    with ProgressBar("teacher samples", steps * math.ceil(samples / size)) as bar:

        def sampled() -> Iterator[Tensor]:
            for rows in _batches(samples, size):
                yield sample_teacher(
                    teacher,
                    condition_of([data.prompts[row % len(data.prompts)] for row in rows]).to(device),
                    data.prompts.unconditional().to(device),
                    data.latent_shape,
                    Draws((config.seed, "calibration"), rows, device).named("trajectory"),
                    steps=sampler.steps,
                    guidance_scale=sampler.guidance_scale,
                    shift=sampler.shift,
                    on_step=bar.advance,
                )

        found = calibrate(sampled(), (clips for clips, _ in _real_batches(data, places, 1)))
    regression = None if method.terms is None else method.terms.regression
    if regression is None:
        return found.model_copy(update={"sampling": sampler})
    student = teacher
    if config.student_weights is not None:
        student = VelocityModel(load_transformer(config.student_weights, device, teacher.dtype), dtype=teacher.dtype)
    with ProgressBar("real clips", math.ceil(real / size)) as bar:

        def drawn() -> Iterator[ClipBatch]:
            for rows, batch in zip(_batches(real, size), _real_batches(data, places, size), strict=True):
                latents, condition = batch.to(device)
                yield ClipBatch(latents, condition, Draws((config.seed, "sharpness"), rows, device))
                bar.advance()

        judged = calibrate_sharpness(student, teacher, drawn(), method.few_steps, regression)
    return found.model_copy(update={"sampling": sampler, "sharpness": judged})


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
        floor=teacher.clip_mean,
        paper_floor=teacher.clip_mean - PAPER_MARGIN,
        remarks=tuple(_remarks(teacher, real)),
    )


def render(calibration: Calibration) -> Group:
    """The calibration for a terminal."""
    teacher, real, sampling = calibration.teacher, calibration.real, calibration.sampling
    caption = "\n".join([EXPLANATION, *(f"Note: {remark}" for remark in calibration.remarks)])
    title = "Motion"
    if sampling is not None:
        steps, scale, shift = sampling.steps, sampling.guidance_scale, sampling.shift
        title += f": teacher in {steps} Euler steps, guidance {scale:g}, shift {shift:g}"
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column("")
    table.add_column("teacher", justify="right")
    table.add_column("real", justify="right")
    table.add_row("clips", str(teacher.samples), str(real.samples))
    table.add_row(
        "temporal loss of single clips",
        f"{teacher.clip_mean:.3f} ± {teacher.clip_std:.3f}",
        f"{real.clip_mean:.3f} ± {real.clip_std:.3f}",
    )
    table.add_row("temporal loss of all together", f"{teacher.temporal_loss:.3f}", f"{real.temporal_loss:.3f}")
    table.add_row("standard deviation", f"{teacher.std:.3f}", f"{real.std:.3f}")
    for channel, stds in enumerate(zip(teacher.channel_std, real.channel_std, strict=True)):
        table.add_row(f"  channel {channel}", *(f"{std:.3f}" for std in stds))
    table.add_section()
    table.add_row("floor: moves as much as the teacher", f"{calibration.floor:.2f}", "")
    table.add_row("floor: as far below it as the paper's", f"{calibration.paper_floor:.2f}", "")
    return Group(table) if calibration.sharpness is None else Group(table, render_sharpness(calibration.sharpness))


def _batches(count: int, size: int) -> list[range]:
    """Rows of ``count`` in batches of ``size``."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _real_batches(data: TrainingData, places: Sequence[int], size: int) -> Iterator[Batch]:
    """The clips at some places."""
    for rows in _batches(len(places), size):
        yield join([data.clips[places[row]] for row in rows])


@torch.no_grad()
def _measure(batches: Iterable[Tensor], what: str) -> LatentScale:
    variances: list[float] = []  # one number for each clip
    losses: list[float] = []  # and for each that moves
    count, sums = 0, torch.zeros(2, 0)
    for batch in batches:
        if batch.ndim != 5 or batch.shape[2] < 2:
            raise UserError(
                f"The {what} must be latents [B, C, F, H, W] with at least 2 frames, got {list(batch.shape)}. A single "
                "frame has no motion to measure."
            )
        variances += [float(temporal_variance(clip.unsqueeze(0))) for clip in batch]
        losses += [loss for clip in batch if (loss := _temporal_loss(clip)) is not None]
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
    if not losses:
        raise UserError(f"The {what} do not move: their variance along frames is 0. No floor can be taken from them.")
    nats = torch.tensor(losses, dtype=torch.float64)
    mean, mean_square = sums / count
    return LatentScale(
        samples=len(variances),
        still=len(variances) - len(losses),
        temporal_loss=-math.log(variance),
        clip_mean=float(nats.mean()),
        clip_std=float(nats.std(correction=0)),
        channel_std=tuple((mean_square - mean.square()).clamp_min(0).sqrt().tolist()),
    )


def _temporal_loss(clip: Tensor) -> float | None:
    """In nats; None for a clip that stands still, or is not finite."""
    try:
        return derive_floor(clip.unsqueeze(0), frame_dim=2)
    except ValueError:
        return None


def _remarks(teacher: LatentScale, real: LatentScale) -> list[str]:
    remarks = [
        f"{scale.still} of {scale.samples} {what} stand still, and are left out of the temporal loss of single clips. "
        f"{remedy}"
        for scale, what, remedy in (
            (teacher, "samples of the teacher", "Check its weights and the shift."),
            (real, "real clips", "Leave them out of the data: a student would learn to stand still."),
        )
        if scale.still
    ]
    ratio = real.std / teacher.std
    if not 0.8 <= ratio <= 1.25:
        remarks.append(
            f"real clips spread {ratio:.2f} times as much as the teacher's samples. Check that both are normalised by "
            "the same VAE statistics; if they are, the data is of another kind than the teacher's."
        )
    if real.clip_mean - teacher.clip_mean > PAPER_MARGIN:
        remarks.append(
            "real clips move far less than the teacher's samples, so regression and motion term pull in opposite "
            "directions. Leave still clips out of the data, or raise the floor."
        )
    return remarks
