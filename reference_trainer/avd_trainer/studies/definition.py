"""A study as its folder says it: which variants of a run are compared, and how they are measured.

``study.yaml`` is about the whole (:class:`StudyConfig`). Files whose names begin with ``_`` are for others to extend.
Each other file is a variant, and the first sentence of its comment says what it is:

- a run (:class:`TrainConfig`, usually with ``extends:``), which is trained once for each seed; with
  ``student_weights: variant:NAME`` from the student of another variant and the same seed;
- with ``teacher_of: VARIANT`` the teacher of that run (:class:`TeacherVariant`);
- with ``of: VARIANT`` the students of that run, sampled in another way (:class:`HalfRateVariant`).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from avd_core import step_rates
from avd_trainer.config.loading import ConfigError, load_config, read_values
from avd_trainer.config.sections import Section, ShapesData
from avd_trainer.evaluation.measures import VERSION
from avd_trainer.methods.distillation import DistillationConfig
from avd_trainer.methods.dmd import DMDMethodConfig
from avd_trainer.models.weights import open_weights
from avd_trainer.runtime.errors import UserError
from avd_trainer.studies.catalog import STUDY, describe, find_study
from avd_trainer.training.config import TrainConfig
from avd_trainer.training.folder import is_beginning

SHARED = "_"
"""Files whose names begin so are no variants; others extend them."""
EVALUATION = "evaluation."
"""Keys of ``--set`` that begin so are about measuring, all others about training."""


NEEDS = ("of", "interpolator")
"""Keys that name a variant whose results this one starts from."""
START = "variant:"
"""What ``student_weights`` begin with that are those of a variant's student of the same seed: ``variant:dmd2``."""

COSTS = "costs"
"""Key of ``study.json`` and of results: what a step of each student costs, where all share a budget."""
SECONDS = "-seconds"
"""What the name of a variant ends with that is trained for as many seconds as another one."""
REFERENCE, CONTROLS = "reference", "controls"
"""Units beside the variants: what real clips score, and clips that were spoiled on purpose."""


class StudyEvaluationConfig(Section):
    """How students are sampled and measured."""

    captions: int = Field(default=256, ge=2)
    """Held-out captions, the same for all variants and seeds."""
    caption_seed: int = Field(default=1, ge=0)
    """Which of the held-out captions. Values are chosen on those of 0, which are the demo's too, and results are of
    others; of 256 captions, two seeds share about 15."""
    noises: int = Field(default=4, ge=1)
    """How often each caption is sampled. Noises differ between seeds, and are the same for all variants of a seed."""
    batch_size: int = Field(default=64, ge=1)
    """Clips that are sampled at once; changes no sample beyond rounding."""
    renderings: int = Field(default=20, ge=3)
    """How often the captions are drawn for the real reference."""


class StudyConfig(Section):
    """``study.yaml``."""

    baseline: str
    """The variant that all others are compared with."""
    against: Mapping[str, str] = {}
    """By variant the one that it is compared with in place of the baseline. Both by their own names: what is trained
    for as many seconds is then compared with what is trained so, too."""
    variants: tuple[str, ...] = Field(min_length=1)
    """All variants, in the order of tables and figures."""
    seeds: str = "1..8"
    """Seeds of training, where none are asked for, as :func:`parse_seeds` reads them. Those from 100 on are for
    choosing values."""
    budget_of: str | None = None
    """The variant whose own ``max_steps`` say what each student may cost (:mod:`avd_trainer.studies.budget`); None:
    each is trained for its own."""
    budgets: tuple[Literal["forwards", "seconds"], ...] = Field(default=("forwards", "seconds"), min_length=1)
    """In what students may cost the same: in ``forwards`` always, and in ``seconds`` a second time."""
    choose: bool = False
    """Whether the study is to choose, of the variants of each method, one (:mod:`avd_trainer.studies.choices`)."""
    evaluation: StudyEvaluationConfig = StudyEvaluationConfig()
    """How they are measured."""

    @model_validator(mode="after")
    def _check_budgets(self) -> Self:
        given = ", ".join(self.budgets)
        if "budgets" in self.model_fields_set and self.budget_of is None:
            raise ValueError(
                f"budgets are of budget_of, the variant that says what students may cost, got {given} alone"
            )
        if "forwards" not in self.budgets:
            raise ValueError("budgets must have forwards, which each study of a budget begins with")
        if len(set(self.budgets)) < len(self.budgets):
            raise ValueError(f"budgets must be named once each, got {given}")
        return self

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        for variant, other in self.against.items():
            if variant == other or any(name.endswith(SECONDS) for name in (variant, other)):
                raise ValueError(
                    f"against names two variants in each pair, without {SECONDS}, which follows from it, got "
                    f"{variant}: {other}"
                )
        return self


class TeacherVariant(Section):
    """Samples of the teacher of a variant, with the guidance that its students learn from, or as they are sampled."""

    teacher_of: str
    """The variant; its method has a guidance scale, if there are ``steps``."""
    steps: int | None = Field(default=25, ge=1)
    """Euler steps. None: the few steps of its students, by their sampler and without guidance. That is a student before
    its first update, and what a method has to be better than."""


class HalfRateVariant(Section):
    """The students of another variant, their first steps run on every second latent frame."""

    of: str
    """The variant whose students are sampled."""
    half_rate_steps: int = Field(default=2, ge=1)
    """How many steps run at half rate. Paper: 2 of 4."""
    interpolator: str | None = None
    """The variant that trains the interpolator, once for all seeds; None interpolates linearly."""


Variant = TrainConfig | TeacherVariant | HalfRateVariant


class Unit(NamedTuple):
    """What one process does in one go: a variant with one seed."""

    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}-{self.seed}"


class Cost(NamedTuple):
    """What a step costs: means over a run.

    Attributes:
        forwards: Forward equivalents of all examples of the batch, a backward pass counted as two.
        seconds: On the machine that the study began on, in one process: of its processor, or by the clock where a GPU
            computes. None where no budget is in seconds, or it is not measured yet.
        memory: MB of 2^20 bytes in tensors in the step's worst phase, as ``avd plan`` computes it for a GPU.
    """

    forwards: float
    seconds: float | None
    memory: float


@dataclass(frozen=True)
class Study:
    """A study, read and checked.

    Attributes:
        name: Of its folder.
        title: What it is, in a sentence.
        titles: The same of each variant of its folder.
        config: How variants are measured and compared.
        variants: In the order of tables; those that were chosen and all that they refer to.
        worked_on: Those that there is work for: the chosen ones and what they need results of. A teacher needs only the
            values of its run.
        source: The name or path that it was asked for by.
        overrides: What ``--set`` has changed.
        costs: What a step of each student costs, where all share a budget and it is known.
        asked_baseline: What tables compare with in place of the study's own baseline; None for that.
    """

    name: str
    title: str
    titles: Mapping[str, str]
    config: StudyConfig
    variants: Mapping[str, Variant]
    worked_on: Set[str]
    source: str
    overrides: Sequence[str]
    costs: Mapping[str, Cost] = field(default_factory=dict)
    asked_baseline: str | None = None

    @property
    def data(self) -> ShapesData:
        """The real clips, which all variants share, with their own captions."""
        data = next(variant.data for variant in self.variants.values() if isinstance(variant, TrainConfig))
        assert isinstance(data, ShapesData)
        return data.model_copy(update={"wrong_captions": None})

    @property
    def teacher(self) -> str | None:
        """The teacher, which all variants share; None where none of the chosen ones has one."""
        return next((run.teacher for run in map(self.run, self.variants) if run.teacher is not None), None)

    @cached_property
    def teacher_digest(self) -> str | None:
        """A word for the teacher's weights: a name or a path may come to stand for others."""
        if self.teacher is None:
            return None
        with open_weights(self.teacher) as weights:
            return weights.digest()

    @property
    def order(self) -> list[str]:
        """All names that results can have, in the order of tables."""
        in_seconds = self.config.budget_of is not None and "seconds" in self.config.budgets
        endings = ("", SECONDS) if in_seconds else ("",)
        return [name + ending for name in self.config.variants for ending in endings]

    def run(self, variant: str) -> TrainConfig:
        """The run behind a variant."""
        found = self.variants[variant]
        while not isinstance(found, TrainConfig):
            found = self.variants[found.of if isinstance(found, HalfRateVariant) else found.teacher_of]
        return found

    def is_measured(self, variant: str) -> bool:
        """Whether a variant makes clips; one that trains an interpolator does not."""
        return isinstance(self.run(variant).method, DistillationConfig)

    def units(self, seeds: Sequence[int]) -> list[Unit]:
        """All there is to do, seed by seed, so that a study that is not done yet has whole rows of pairs."""
        worked_on = [name for name in self.variants if name in self.worked_on]
        once = [Unit(name, self.data.seed) for name in (REFERENCE, CONTROLS)]
        once += [Unit(name, self.run(name).seed) for name in worked_on if not self.is_measured(name)]
        return once + [Unit(name, seed) for seed in seeds for name in worked_on if self.is_measured(name)]

    @cached_property
    def beginnings(self) -> Mapping[str, str]:
        """By variant the one whose run is the beginning of its own, which goes on where that one ends.

        Of several the longest, so that no step of a seed is trained twice. Only those that there is work for.
        """
        runs = {name: run for name, run in self.variants.items() if isinstance(run, TrainConfig)}
        names = sorted((name for name in runs if name in self.worked_on), key=lambda name: runs[name].max_steps)
        found: dict[str, str] = {}
        for place, name in enumerate(names):
            for earlier in names[:place]:
                if is_beginning(runs[earlier], runs[name]):
                    found[name] = earlier
        return found

    def needs(self, unit: Unit) -> list[Unit]:
        """The units that have to be done before a unit: those whose results it starts from, and its beginning."""
        variant = self.variants.get(unit.variant)
        if isinstance(variant, TrainConfig):
            first = (start_of(variant), self.beginnings.get(unit.variant))
            return [Unit(name, unit.seed) for name in first if name is not None]
        if not isinstance(variant, HalfRateVariant):
            return []
        needed = [Unit(variant.of, unit.seed)]
        if variant.interpolator is not None:
            needed.append(Unit(variant.interpolator, self.run(variant.interpolator).seed))
        return needed

    @property
    def baseline(self) -> str:
        """The variant that tables compare the others with, but for those that are ``against`` one of their own."""
        return self.asked_baseline or self.config.baseline

    def compared_with(self, name: str, names: Container[str]) -> str | None:
        """The variant that tables compare one with: for as many seconds if this one is, where there is such a one.

        Args:
            name: Of the variant, maybe for equal seconds.
            names: All that there are.

        Returns:
            What was asked for, the variant's own, or the study's baseline; None of that one itself.
        """
        own = name.removesuffix(SECONDS)
        other = self.asked_baseline or self.config.against.get(own, self.config.baseline)
        if name != own and other + SECONDS in names:
            other += SECONDS
        return None if other == name else other

    def values(self) -> dict[str, Any]:
        """All values that results depend on, for the study's folder."""
        variants = {name: variant.model_dump(mode="json") for name, variant in self.variants.items()}
        for name, variant in self.variants.items():
            if isinstance(variant, TrainConfig) and variant.teacher is not None:
                variants[name]["teacher_digest"] = self.teacher_digest
        return {
            "study": self.name,
            "evaluation": self.config.evaluation.model_dump(mode="json"),
            "measures_version": VERSION,
            "variants": variants,
            **({COSTS: {name: cost._asdict() for name, cost in self.costs.items()}} if self.costs else {}),
        }


def load_study(
    name: str,
    overrides: Sequence[str] = (),
    variants: Sequence[str] | None = None,
    baseline: str | None = None,
) -> Study:
    """Read a study.

    Args:
        name: Of a study of the package, or the path of a study's folder.
        overrides: ``key=value``: of the evaluation where the key begins with ``evaluation.``, otherwise of the run of
            every variant that is trained.
        variants: Which ones; None for all. What they refer to comes along.
        baseline: What the tables compare with; None for the study's own.

    Raises:
        UserError: If anything in it does not fit, before any work.
    """
    folder = find_study(name)
    of_evaluation = [override for override in overrides if override.startswith(EVALUATION)]
    of_runs = [override for override in overrides if override not in of_evaluation]
    config = load_config(StudyConfig, str(folder / STUDY), of_evaluation)
    parse_seeds(config.seeds)
    files = {
        file.stem: file
        for file in sorted(folder.glob("*.yaml"))
        if file.name != STUDY and not file.name.startswith(SHARED)
    }
    if taken := [name for name in sorted(files) if name in (REFERENCE, CONTROLS) or name.endswith(SECONDS)]:
        raise ConfigError(f"{folder}: {', '.join(taken)} cannot be the name of a variant. Choose another one.")
    if set(config.variants) != files.keys() or len(set(config.variants)) < len(config.variants):
        raise ConfigError(
            f"{folder / STUDY}: variants must name each file of the folder once: {', '.join(files)}. "
            f"Got {', '.join(config.variants)}."
        )
    budget_of = [] if config.budget_of is None else [config.budget_of]
    pairs = [*config.against, *config.against.values()]
    referred = [baseline or config.baseline, *budget_of, *pairs, *(variants or ())]
    if unknown := [each for each in referred if each not in files]:
        raise UserError(f"Study {name} has no variant {unknown[0]!r}. It has {', '.join(config.variants)}.")
    worked_on = _with_needs(folder, variants or config.variants, NEEDS)
    named = _with_needs(folder, [*worked_on, *budget_of], (*NEEDS, "teacher_of"))
    chosen = {each: _load_variant(files[each], of_runs) for each in config.variants if each in named}
    titles = {each: describe(files[each]) for each in config.variants}
    study = Study(
        folder.name,
        describe(folder / STUDY),
        titles,
        config,
        chosen,
        worked_on,
        name,
        overrides,
        asked_baseline=baseline,
    )
    _check(study, folder)
    return study


def parse_seeds(text: str) -> list[int]:
    """``"1..8"`` or ``"1,3,7"`` or both, as ``"1..3,7"``, rising.

    Raises:
        UserError: If it is something else, or names a seed twice.
    """
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dots, last = part.partition("..")
            seeds += range(int(first), int(last) + 1) if dots else [int(first)]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds {text!r}: expected a range such as 1..8, or a list such as 1,3,7, each seed once.")
    return sorted(seeds)


def _with_needs(folder: Path, names: Iterable[str], keys: Sequence[str]) -> set[str]:
    """Names of variants, and of those that they refer to by ``keys``, and so on."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        if (name := waiting.pop()) in found:
            continue
        found.add(name)
        file = folder / f"{name}.yaml"
        if not file.is_file():
            raise UserError(
                f"{folder} has no variant {name!r}, which another one names. Add {file.name}, or correct it."
            )
        values = read_values(file)
        waiting += [values[key] for key in keys if isinstance(values.get(key), str)]
        start = named_start(_extended(folder, name, "student_weights"))
        waiting += [] if start is None else [start]
    return found


def _extended(folder: Path, name: str, key: str) -> str:
    """A value of a file or of those beside it that it extends; empty if none of them has it."""
    seen: set[str] = set()
    while name not in seen and (folder / f"{name}.yaml").is_file():
        seen.add(name)
        values = read_values(folder / f"{name}.yaml")
        if key in values:
            return str(values[key])
        name = str(values.get("extends"))
    return ""


def start_of(run: TrainConfig) -> str | None:
    """The variant whose student a run starts from; None if it starts from none."""
    return named_start(run.student_weights)


def named_start(weights: str | None) -> str | None:
    """The variant that ``student_weights`` name; None if they are others, or none."""
    return weights.removeprefix(START) if weights is not None and weights.startswith(START) else None


def _load_variant(file: Path, overrides: Sequence[str]) -> Variant:
    values = read_values(file)
    if "of" in values:
        return load_config(HalfRateVariant, str(file))
    if "teacher_of" in values:
        return load_config(TeacherVariant, str(file))
    # Samples while training and curves for a browser are of no use where so many runs go on unseen.
    unseen = {"samples": {"every": None}, "logging": {"tensorboard": False}}
    return load_config(TrainConfig, str(file), list(overrides), replace=unseen)


def _check(study: Study, folder: Path) -> None:
    of = study.config.budget_of
    if of is not None:
        own = study.variants[of]
        if not isinstance(own, TrainConfig) or not study.is_measured(of) or start_of(own) is not None:
            raise ConfigError(f"{folder / STUDY}: budget_of must be a variant that trains a student, got {of}.")
    for name in {*study.config.against, *study.config.against.values()} & study.variants.keys():
        if not study.is_measured(name):
            raise ConfigError(f"{folder / STUDY}: against must name variants that make clips, got {name}.")
    for name, variant in study.variants.items():
        file = folder / f"{name}.yaml"
        if not study.titles[name]:
            raise ConfigError(f"{file}: the first line must be a comment that says what the variant is.")
        if isinstance(variant, TrainConfig):
            if not isinstance(variant.data, ShapesData):
                raise ConfigError(f"{file}: data.kind must be shapes, whose held-out captions can be judged.")
            theirs = variant.data.model_copy(update={"held_out": study.data.held_out, "wrong_captions": None})
            if theirs != study.data:
                raise ConfigError(f"{file}: data differs from that of the other variants. All share the real clips.")
            if variant.method.needs_teacher and variant.teacher != study.teacher:
                raise ConfigError(f"{file}: teacher differs from that of the other variants. All share the teacher.")
            start = start_of(variant)
            if start is not None and not (isinstance(study.variants[start], TrainConfig) and study.is_measured(start)):
                raise ConfigError(f"{file}: student_weights must be of a variant that trains a student, got {start}.")
            continue
        source = study.variants[variant.of if isinstance(variant, HalfRateVariant) else variant.teacher_of]
        if not isinstance(source, TrainConfig) or not isinstance(source.method, DistillationConfig):
            raise ConfigError(f"{file}: a variant that trains a student is expected to sample from.")
        if isinstance(variant, TeacherVariant):
            if variant.steps is not None and not isinstance(source.method, DMDMethodConfig):
                raise ConfigError(f"{file}: teacher_of needs a method with a guidance scale, such as dmd.")
            continue
        try:
            step_rates(len(source.method.few_steps), variant.half_rate_steps)
        except ValueError as error:
            raise ConfigError(f"{file}: {error}") from error
        if variant.interpolator is not None and study.is_measured(variant.interpolator):
            raise ConfigError(f"{file}: interpolator must be a variant of method frame_interpolation.")
