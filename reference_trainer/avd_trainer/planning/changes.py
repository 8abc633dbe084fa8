"""What to change where a run does not fit its GPUs, in order of least harm."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from avd_trainer.config.sections import LoRAConfig
from avd_trainer.planning.description import LatentShape, Run
from avd_trainer.planning.memory import GB, plan_memory, worst

_MOST_GPUS = 512


class Change(NamedTuple):
    """A run that was changed, and what it needs.

    Attributes:
        run: The changed run.
        words: What was changed, one entry each.
        settings: As ``key=value`` for ``--set``.
    """

    run: Run
    words: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    @property
    def needed(self) -> int:
        """Bytes per GPU with all of that."""
        return worst(plan_memory(self.run)).needed

    def fits(self, gpu_memory: float) -> bool:
        """Whether a GPU with so many GB is enough."""
        return self.needed <= gpu_memory * GB

    def then(self, run: Run, words: str, *settings: str) -> Change:
        """A further change."""
        return Change(run, (*self.words, words), (*self.settings, *settings))


def find_changes(run: Run, gpu_memory: float) -> Iterator[Change]:
    """What would make a run fit GPUs with so many GB: each step with those before it, then the searches.

    First what leaves the result as it is, then adapters, until one fits; then the least number of GPUs that is enough
    for what is trained now; and where nothing else was enough, the longest clips that fit.
    """
    last = harmless = Change(run)
    for change in _harmless(harmless):
        yield change
        last = harmless = change
        if change.fits(gpu_memory):
            break
    if not harmless.fits(gpu_memory):
        for change in _adapters(harmless):
            yield change
            last = change
            if change.fits(gpu_memory):
                break
    if more := _more_gpus(harmless, gpu_memory):
        yield more
    if not last.fits(gpu_memory) and (shorter := _fewer_frames(last, gpu_memory)):
        yield shorter


def _harmless(change: Change) -> Iterator[Change]:
    """What leaves the result as it is."""
    if change.run.batches.micro > 1 and change.run.can_accumulate:
        change = change.then(change.run._replace(micro_batch_size=1), "one example at a time", "micro_batch_size=1")
        yield change
    if not change.run.checkpointing:
        run = change.run._replace(checkpointing=True)
        yield change.then(run, "activation checkpointing", "parallel.activation_checkpointing=true")


def _adapters(change: Change) -> Iterator[Change]:
    """Adapters in place of all weights, last for the model that the run is about."""
    lora = LoRAConfig()
    for role in sorted(change.run.trained, key=lambda role: role.averaged):
        if role.adapter is None and role.adapter_setting is not None:
            adapted = role._replace(adapter=lora)
            roles = tuple(adapted if one == role else one for one in change.run.roles)
            setting = f"{role.adapter_setting}.rank={lora.rank}"
            change = change.then(change.run._replace(roles=roles), f"LoRA for the {role.title}", setting)
            yield change


def _more_gpus(change: Change, gpu_memory: float) -> Change | None:
    """The least number of GPUs that is enough."""
    run = change.run

    def with_gpus(gpus: int) -> Change:
        if gpus <= run.batch_size:
            return change.then(run._replace(gpus=gpus), f"{gpus} GPUs")
        larger = run._replace(gpus=gpus, batch_size=gpus)
        return change.then(larger, f"{gpus} GPUs and a batch of {gpus}", f"batch_size={gpus}")

    numbers = range(2 * run.gpus, _MOST_GPUS + 1, run.gpus)
    # A number that divides the batch leaves the run as it is; beyond, the batch grows to one example for each.
    dividing = [number for number in numbers if run.batch_size % number == 0]
    beyond = [number for number in numbers if number > run.batch_size]
    return _first_that_fits(dividing, with_gpus, gpu_memory) or _first_that_fits(beyond, with_gpus, gpu_memory)


def _fewer_frames(change: Change, gpu_memory: float) -> Change | None:
    """The longest clips that fit."""
    channels, frames, height, width = change.run.latent_shape

    def with_frames(number: int) -> Change:
        shape: LatentShape = (channels, number, height, width)
        words = f"clips of {number} latent frames in place of {frames}, encoded anew"
        return change.then(change.run._replace(latent_shape=shape), words)

    return _first_that_fits(range(frames - 1, 0, -1), with_frames, gpu_memory)


def _first_that_fits(numbers: Sequence[int], make: Callable[[int], Change], gpu_memory: float) -> Change | None:
    """By bisection: of ``numbers`` each takes no more than those before it."""
    place = bisect_left(numbers, True, key=lambda number: make(number).fits(gpu_memory))
    return make(numbers[place]) if place < len(numbers) else None
