"""The work of a study: a variant with one seed is trained, sampled on held-out captions, and measured."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avd_core import (
    HalfRateInterpolationSampler,
    LatentFrameInterpolator,
    NonFiniteError,
    interpolate_linearly,
)
from avd_core.sampling import Interpolator, SamplerKind
from avd_trainer.config.sections import ShapesData
from avd_trainer.data.examples import condition_of
from avd_trainer.data.in_memory import CaptionedLatents, InMemoryData, encode_shapes
from avd_trainer.data.moving_shapes import MovingShapes
from avd_trainer.data.sources import TrainingData, held_out_shapes, load_clips
from avd_trainer.evaluation.controls import RENDERING, Encoded, controls_of_shapes
from avd_trainer.evaluation.measures import measure
from avd_trainer.evaluation.reference import encode_rendering, reference_of_shapes
from avd_trainer.inference.generation import load_merged
from avd_trainer.methods.distillation import DistillationConfig
from avd_trainer.methods.dmd import DMDMethodConfig
from avd_trainer.models.architecture import image_input
from avd_trainer.models.codecs.block_dct import BlockDCTCodec
from avd_trainer.models.condition import Condition
from avd_trainer.models.samplers import clean_predictor, sample_teacher
from avd_trainer.models.text_encoders.hashed import TEXT_LENGTH, HashTextEmbedding
from avd_trainer.models.transformer import VelocityModel, load_transformer
from avd_trainer.models.weight_files import ADAPTERS
from avd_trainer.models.weights import open_weights
from avd_trainer.runtime.draws import seed_of
from avd_trainer.runtime.environment import environment
from avd_trainer.runtime.errors import UserError
from avd_trainer.runtime.files import read_json, write_json
from avd_trainer.runtime.progress import ProgressBar
from avd_trainer.runtime.ranks import Ranks
from avd_trainer.runtime.timing import timed
from avd_trainer.studies.budget import time_step
from avd_trainer.studies.definition import CONTROLS, REFERENCE, HalfRateVariant, Study, TeacherVariant, Unit, start_of
from avd_trainer.studies.deviations import read_deviations
from avd_trainer.studies.monitoring import judge_samples, read_findings
from avd_trainer.studies.training_record import read_training
from avd_trainer.training.checkpoint import latest_checkpoint
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.folder import CHECKPOINTS
from avd_trainer.training.metrics_log import METRICS_FILE
from avd_trainer.training.run import FINDINGS, train

RUN = "run"
"""The run in a unit's folder; what it trained stays, its checkpoints go when nothing goes on from them any more."""
BEGINNING = "beginning"
"""Key of a unit's results, and file in its folder: the unit whose run its own has gone on from, and at which step."""
REUSED = "reused_from"
"""Key of a unit's results: the study and the unit that they were taken from. Where only the run was, to be measured
anew, also a file in its folder, with what the results there said of training."""
CLOCKS: Mapping[str, Callable[[], float]] = {"seconds": time.monotonic, "cpu_seconds": time.process_time}
"""Keys of a unit's results: time by the clock, and of the processor, which other processes do not lengthen."""
TRAINING_SECONDS = ("train", "train_rest")

Times = Mapping[str, dict[str, float]]
"""Seconds of each part of a unit, by clock."""

Stopping = Callable[[], bool]
"""Whether somebody asked the study to stop."""

Sample = Callable[[Tensor, Sequence[torch.Generator], Condition], Tensor]
"""Noise ``[B, C, F, h, w]``, a stream of further noise for each sample, and what they show, to samples."""


class StoppedError(Exception):
    """A signal came; what was trained is saved."""


class Workplace:
    """What the units of a process share: clips, captions and the codec are made once.

    Args:
        study: What is done.
        folder: Where units have their folders.
        ranks: The one process that computes.
        stopping: Asked between batches.
    """

    def __init__(self, study: Study, folder: Path, ranks: Ranks, stopping: Stopping = lambda: False) -> None:
        self.study, self.folder, self.ranks = study, folder, ranks
        self._stopping = stopping
        self._codec = BlockDCTCodec()

    def do(self, unit: Unit) -> dict[str, Any]:
        """Train where the variant is trained, and measure where it makes clips.

        Returns:
            ``seconds`` since this process began it, by the clock, ``cpu_seconds`` of its processor, and ``environment``
            as of then. Of a run also ``training`` (:func:`read_training`). Of a run that has gone on from another
            unit's also ``beginning``, the unit and the step; seconds then have ``train_rest``, of the steps after that,
            and no ``train``. Of a variant that makes clips also ``noises``, the measures of each of several noises,
            ``monitor``, what a :class:`avd_core.CollapseMonitor` says of them, and ``deviations`` that the adaptive
            weight judged; or ``failed``, why there are none: a student that diverged is a result, too. Of a run that
            was taken from another study, ``reused_from``, its seconds there and its ``training_environment``. Of
            ``reference`` the ``spreads`` of real clips, of ``controls`` the ``controls``.

        Raises:
            StoppedError: If somebody asked to stop.
            UserError: As :func:`train`.
        """
        begun_in = environment()
        times: Times = {clock: {} for clock in CLOCKS}
        result: dict[str, Any] = {"variant": unit.variant, "seed": unit.seed}
        with _timed(times, "all"):
            try:
                result |= self._results(unit, times)
            except NonFiniteError as error:
                result["failed"] = str(error)
        if (self.run_folder(unit) / METRICS_FILE).exists():
            result["training"] = read_training(self.run_folder(unit))
        if (beginning := self._beginning_file(unit)).exists():
            result[BEGINNING] = read_json(beginning)
            for own in times.values():
                if "train" in own:
                    own["train_rest"] = own.pop("train")
        if (reused := self.folder / str(unit) / f"{REUSED}.json").exists():
            taken = read_json(reused)
            for clock, own in times.items():
                for name in TRAINING_SECONDS:
                    own.pop(name, None)
                own |= taken.get(clock, {})
            result |= {name: each for name, each in taken.items() if name not in CLOCKS}
        return {**result, **times, "environment": begun_in}

    def _results(self, unit: Unit, times: Times) -> dict[str, Any]:
        if unit.variant == REFERENCE:
            sets = self.study.config.evaluation.renderings
            with ProgressBar(str(unit), sets) as bar:

                def advance() -> None:
                    bar.advance()
                    self.check_stop()

                reference = reference_of_shapes(
                    self._shapes, self._codec, sets=sets, images=self._of_images, on_set=advance
                )
            return {"sets": reference.sets, "spreads": {name: asdict(each) for name, each in reference.spreads.items()}}
        if unit.variant == CONTROLS:
            controls = controls_of_shapes(self._shapes, self._codec)
            images = encode_rendering(self._shapes, RENDERING, self._codec).video[:, :, 0]
            return {"controls": {name: self._measure(each, images) for name, each in controls.items()}}
        variant = self.study.variants[unit.variant]
        if isinstance(variant, TrainConfig):
            with _timed(times, "train"):
                self._train(unit, variant)
        if not self.study.is_measured(unit.variant):
            return {}
        noises = range(self.study.config.evaluation.noises)
        batches = batches_of(len(self._shapes), self.study.config.evaluation.batch_size)
        with _timed(times, "sample"), ProgressBar(f"{unit} samples", len(noises) * len(batches)) as bar:
            samples = [self._sample(unit, noise, batches, bar.advance) for noise in noises]
        if broken := sum(int((~each.isfinite()).flatten(1).any(1).sum()) for each in samples):
            raise NonFiniteError(f"{broken} of {sum(map(len, samples))} samples hold NaN or infinity.")
        with _timed(times, "measure"):
            images = self._real.video[:, :, 0]
            measured = [self._measure(Encoded(each, self._codec.decode(each)), images) for each in samples]
        trained = isinstance(variant, TrainConfig)
        found = {"of_samples": judge_samples(torch.cat(samples), self._real.latents)}
        if trained and (said := read_findings(self.run_folder(unit) / FINDINGS)) is not None:
            found["while_training"] = said
        return {
            "noises": measured,
            "monitor": found,
            "deviations": read_deviations(self.run_folder(unit) / METRICS_FILE) if trained else None,
        }

    def show(self, unit: Unit, count: int) -> Tensor:
        """What a unit's variant makes of the first held-out captions, from the first noise that it is measured with.

        Returns:
            ``[count, 3, F, H, W]`` RGB in [0, 1].

        Raises:
            StoppedError: If somebody asked to stop.
            UserError: If what the unit has trained is not there.
        """
        batches = batches_of(count, self.study.config.evaluation.batch_size)
        return self._codec.decode(self._sample(unit, 0, batches, lambda: None))

    def show_real(self, count: int) -> tuple[Tensor, Sequence[str]]:
        """The first held-out clips ``[count, 3, F, H, W]`` through the codec, RGB in [0, 1], and their captions."""
        return self._codec.decode(self._held_out.latents[:count]), self._held_out.captions[:count]

    def time_step(self, run: TrainConfig) -> float:
        """Seconds that a step of a run takes here.

        Raises:
            StoppedError: If somebody asked to stop.
        """
        return time_step(run, self._training_data(run), self.ranks, self.check_stop)

    def check_stop(self) -> None:
        """Raise StoppedError if somebody asked to stop."""
        if self._stopping():
            raise StoppedError

    def run_folder(self, unit: Unit) -> Path:
        """Where a unit's run is."""
        return self.folder / str(unit) / RUN

    def _train(self, unit: Unit, config: TrainConfig) -> None:
        folder = self.run_folder(unit)
        if not self._is_trained(unit):
            self._take_over(unit)
            start = start_of(config)
            weights = config.student_weights if start is None else str(self._product(Unit(start, unit.seed)))
            seeded = config.model_copy(update={"seed": unit.seed, "student_weights": weights})
            if not train(seeded, folder, self.ranks, data=self._training_data(config), description=str(unit)):
                raise StoppedError
        if not self._is_awaited(unit):
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)

    def _take_over(self, unit: Unit) -> None:
        """Let a run that has not begun go on where the run that is its beginning has ended, which gives up its state.

        Where that one was done elsewhere, there is no state here, and the run begins itself.

        Raises:
            NonFiniteError: If that one has diverged.
        """
        if self._has_begun(unit):
            return
        self._forget(unit)  # what a process has left that was killed before it took the state
        beginning = self.study.beginnings.get(unit.variant)
        if beginning is None:
            return
        earlier = Unit(beginning, unit.seed)
        there, here = self.run_folder(earlier), self.run_folder(unit)
        if self._has_diverged(earlier) and not self._is_trained(earlier):  # while it trained, and not when sampled
            raise NonFiniteError(f"{earlier} has diverged, and its steps are the first ones of this run.")
        if (there / CHECKPOINTS).exists():
            steps = self.study.run(beginning).max_steps
            write_json(self._beginning_file(unit), {"unit": str(earlier), "steps": steps})
            here.mkdir()
            shutil.copy(there / METRICS_FILE, here / METRICS_FILE)
            try:
                (there / CHECKPOINTS).rename(here / CHECKPOINTS)  # last, and all at once: before, nothing has begun
            except FileNotFoundError:  # a process that works on other variants has been faster
                self._forget(unit)

    def _forget(self, unit: Unit) -> None:
        self._beginning_file(unit).unlink(missing_ok=True)
        shutil.rmtree(self.run_folder(unit), ignore_errors=True)

    def _is_awaited(self, unit: Unit) -> bool:
        """Whether another run is to go on from the state of this one."""
        later = (Unit(name, unit.seed) for name, each in self.study.beginnings.items() if each == unit.variant)
        return not all(map(self._has_begun, later))

    def _has_begun(self, unit: Unit) -> bool:
        return self._is_trained(unit) or latest_checkpoint(self.run_folder(unit) / CHECKPOINTS) is not None

    def _is_trained(self, unit: Unit) -> bool:
        # What a run trains is written whole, after the last step.
        return (self.run_folder(unit) / self.study.run(unit.variant).method.main_role).exists()

    def _beginning_file(self, unit: Unit) -> Path:
        return self.folder / str(unit) / f"{BEGINNING}.json"

    def _sample(self, unit: Unit, noise: int, batches: Sequence[range], on_batch: Callable[[], None]) -> Tensor:
        """``[N, C, F, h, w]``: a clip for each of some held-out captions."""
        variant = self.study.variants[unit.variant]
        sample = self._teacher(variant) if isinstance(variant, TeacherVariant) else self._student(unit)

        def advance() -> None:
            on_batch()
            self.check_stop()

        self.check_stop()
        return sample_captions(sample, self._asked, batches, (unit.seed, noise), self.ranks.device, advance)

    def _teacher(self, variant: TeacherVariant) -> Sample:
        config = self.study.run(variant.teacher_of)
        method, steps = config.method, variant.steps
        assert config.teacher is not None
        model = VelocityModel(load_transformer(config.teacher, self.ranks.device))
        if steps is None:
            assert isinstance(method, DistillationConfig)
            return few_step_sample(model, method.few_steps, kind=method.sampled_by)
        assert isinstance(method, DMDMethodConfig)
        return teacher_sample(model, steps, method.guidance_scale, method.sampling_shift)

    def _student(self, unit: Unit) -> Sample:
        variant, method = self.study.variants[unit.variant], self.study.run(unit.variant).method
        assert isinstance(method, DistillationConfig)
        source, half_rate_steps = unit, 0
        interpolator: Interpolator = interpolate_linearly
        if isinstance(variant, HalfRateVariant):
            source, *others = self.study.needs(unit)
            half_rate_steps = variant.half_rate_steps
            for other in others:
                trained = LatentFrameInterpolator.from_pretrained(self._product(other))
                interpolator = trained.to(self.ranks.device)
        # How it is sampled its variant says, so that a student by an earlier version, which does not, will do.
        product = self._product(source)
        adapters = product / ADAPTERS if (product / ADAPTERS).is_file() else None
        weights = str(product) if adapters is None else self.study.run(source.variant).teacher
        assert weights is not None, "adapters are those of a teacher"
        model = VelocityModel(load_merged(weights, adapters, self.ranks.device, torch.float32))
        return few_step_sample(model, method.few_steps, interpolator, half_rate_steps, method.sampled_by)

    def _product(self, unit: Unit) -> Path:
        """The folder of what a unit has trained."""
        product = self.run_folder(unit) / self.study.run(unit.variant).method.main_role
        if not product.exists():  # the unit is done all the same
            if self._has_diverged(unit):
                raise NonFiniteError(f"There is nothing to sample with: {unit} has diverged.")
            raise UserError(
                f"{unit} is done, but {product}, which other units start from, is not there. Copy it from where it was "
                f"trained, or delete {self.folder / str(unit)}.json to have it trained again."
            )
        return product

    def _has_diverged(self, unit: Unit) -> bool:
        """Whether a unit that is done has failed."""
        results = self.folder / f"{unit}.json"
        return results.exists() and "failed" in read_json(results)

    def _measure(self, clips: Encoded, images: Tensor) -> dict[str, float]:
        """The measures of clips; for image to video also those against the images that they were to begin with."""
        self.check_stop()
        return measure(*clips, self._held_out.captions, self._real, images if self._of_images else None)

    @property
    def _of_images(self) -> bool:
        """Whether the study is one of image to video."""
        return self._asked[0].image_latents is not None

    def _training_data(self, run: TrainConfig) -> TrainingData:
        """What a run reads. All runs share the clips, but not always their captions."""
        assert isinstance(run.data, ShapesData)
        examples = self._examples(self._clips.with_misfits(run.data.misfits))
        return TrainingData(examples, examples)

    @cached_property
    def _clips(self) -> CaptionedLatents:
        return load_clips(self.study.data, self._codec, held_out=False).train

    @cached_property
    def _asked(self) -> InMemoryData:
        """What samples are to show: captions of held-out clips, and for image to video their first frames."""
        return self._examples(self._held_out)

    @cached_property
    def _shapes(self) -> MovingShapes:
        evaluation = self.study.config.evaluation
        return held_out_shapes(self.study.data, evaluation.captions, evaluation.caption_seed)

    @cached_property
    def _held_out(self) -> CaptionedLatents:
        return encode_shapes(self._shapes, self._codec)

    @cached_property
    def _real(self) -> Encoded:
        return Encoded(self._held_out.latents, self._codec.decode(self._held_out.latents))

    def _examples(self, clips: CaptionedLatents) -> InMemoryData:
        """Clips as the teacher's kind of model reads them."""
        if self.study.teacher is None:
            return InMemoryData(clips, HashTextEmbedding(TEXT_LENGTH, 2))  # nobody looks at captions
        with open_weights(self.study.teacher) as weights:
            embed = HashTextEmbedding(TEXT_LENGTH, weights.config["text_dim"])
            return InMemoryData(clips, embed, image=image_input(weights.config) is not None)


def few_step_sample(
    model: VelocityModel,
    timesteps: Sequence[float],
    interpolator: Interpolator = interpolate_linearly,
    half_rate_steps: int = 0,
    kind: SamplerKind = "re-noise",
) -> Sample:
    """How a student is sampled; ``kind`` says how it goes from one step to the next."""
    denoiser = clean_predictor(model)
    sampler = HalfRateInterpolationSampler(denoiser, interpolator, timesteps, half_rate_steps, sampler=kind)
    return lambda noise, streams, condition: sampler(noise, streams, condition=condition)


def teacher_sample(model: VelocityModel, steps: int, guidance_scale: float, shift: float) -> Sample:
    """How a teacher is sampled: by Euler's method, with guidance."""

    def sample(noise: Tensor, streams: Sequence[torch.Generator], condition: Condition) -> Tensor:
        return sample_teacher(
            model,
            condition,
            torch.zeros_like(condition.text[0]),
            noise.shape[1:],
            lambda shape: noise,
            steps=steps,
            guidance_scale=guidance_scale,
            shift=shift,
        )

    return sample


@torch.no_grad()
def sample_captions(
    sample: Sample,
    asked: InMemoryData,
    batches: Sequence[range],
    seeds: tuple[int, int],
    device: torch.device,
    on_batch: Callable[[], None],
) -> Tensor:
    """A clip for each of a data set's rows.

    Args:
        sample: The model's way from noise to clips.
        asked: What clips are to show.
        batches: Rows that are sampled at once.
        seeds: Of the model and of the noise. Each row has a stream of its own, so that neither batches nor models
            change its noise.
        device: Where the model is.
        on_batch: Called after each.

    Returns:
        ``[N, C, F, h, w]`` on the CPU.
    """
    shape, parts = asked.clips.latents.shape[1:], []
    for places in batches:
        streams = [torch.Generator().manual_seed(seed_of("study", *seeds, place)) for place in places]
        start = torch.stack([torch.randn(shape, generator=stream) for stream in streams])
        condition = condition_of([asked[place] for place in places])
        parts.append(sample(start.to(device), streams, condition.to(device)).cpu())
        on_batch()
    return torch.cat(parts)


def batches_of(count: int, size: int) -> list[range]:
    """Places of captions that are sampled at once."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@contextmanager
def _timed(times: Times, part: str) -> Iterator[None]:
    with ExitStack() as stack:
        for name, clock in CLOCKS.items():
            stack.enter_context(timed(times[name], part, clock))
        yield
