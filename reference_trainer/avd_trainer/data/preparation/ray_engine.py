"""Runs a schedule on the machines of a Ray cluster.

An actor looks after one process on its machine, as the local engine does after each of its own: so time limits, memory
limits and crashes are the same under both, and what breaks a process never breaks an actor. Ray says on which machine
an actor runs, and which GPU it has. All machines see the folders under the same paths, and have this package.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from avd_trainer.data.preparation.clip_reader import OpenReader, VideoReader
from avd_trainer.data.preparation.engine import TICK, Engine, Process
from avd_trainer.data.preparation.local_engine import LocalProcess
from avd_trainer.data.preparation.recipe import Recipe
from avd_trainer.data.preparation.worker import Abandoned, Ending, Lost, Message, Task
from avd_trainer.runtime.errors import UserError

logger = logging.getLogger(__name__)

_OBJECTS = 100 * 2**20
"""Bytes for Ray's store of objects, where Ray is started here: only messages go through it."""


class Machines(NamedTuple):
    """What a cluster has.

    Attributes:
        cores: Of all machines.
        gpus: Likewise.
    """

    cores: int
    gpus: int


def connect() -> Machines:
    """Join the cluster that ``RAY_ADDRESS`` names or that runs on this machine, or else start Ray here.

    Raises:
        UserError: If Ray is not installed, or there is no such cluster.
    """
    if find_spec("ray") is None:
        raise UserError('--engine ray needs the package ray: pip install "avd-core[ray]". Or leave --engine out.')
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if not ray.is_initialized():
        quiet = {"include_dashboard": False, "logging_level": logging.WARNING}
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError as error:
            if (address := os.environ.get("RAY_ADDRESS")) is not None:
                raise UserError(
                    f"RAY_ADDRESS={address} cannot be reached: {error}. Start the cluster, or unset RAY_ADDRESS."
                ) from error
            ray.init(address="local", object_store_memory=_OBJECTS, **quiet)
    has = ray.cluster_resources()
    return Machines(int(has.get("CPU", 0)), int(has.get("GPU", 0)))


class RayProcess(Process):
    """A process on some machine.

    Args:
        number: As of :class:`Process`.
        actor: Of :class:`_Keeper`.
    """

    def __init__(self, number: int, actor: Any) -> None:
        super().__init__(number)
        self._actor = actor
        self._alive = True
        self._has_told = False
        self.answer: Any = None

    @property
    def alive(self) -> bool:
        return self._alive

    def give(self, task: Task) -> None:
        self.answer = self._actor.work.remote(task)

    def listen(self) -> list[Message]:
        import ray
        from ray.exceptions import RayError

        if not ray.wait([self.answer], timeout=0)[0]:
            return []
        try:
            told: list[Message] = ray.get(self.answer)
        except RayError as error:
            # No process does that to its actor: the machine is gone, or something there ended the actor.
            why = f"lost its machine: {str(error).strip().splitlines()[0]}"
            told = [Abandoned(f"a process {why}") if self._has_told else Lost(None, why)]
        self._has_told = True
        self._alive = not isinstance(told[-1], Lost | Abandoned)
        if not isinstance(told[-1], Ending):
            self.answer = self._actor.listen.remote()
        return told

    def end(self) -> None:
        import ray

        ray.kill(self._actor)


class RayEngine(Engine[RayProcess]):
    """Processes on the machines of a cluster: each has a core, and a GPU if stages want one. See :func:`connect`."""

    def __init__(
        self, recipe: Recipe, folder: Path, workers: int, *, gpus: int = 0, open_reader: OpenReader = VideoReader
    ) -> None:
        cores = connect().cores
        if workers > cores:
            # Ray would let the others wait for ever, each with a task.
            logger.warning("Ray has %d cores: as many processes work, in place of %d.", cores, workers)
        super().__init__(recipe, folder, max(1, min(workers, cores)), gpus=gpus, open_reader=open_reader)

    def _start(self, number: int) -> RayProcess:
        import ray

        keeper = ray.remote(num_cpus=1, num_gpus=1 if self._gpus else 0)(_Keeper)
        return RayProcess(number, keeper.remote(Path.cwd(), self._recipe, self._folder, self._open_reader))

    def _wait(self, processes: Sequence[RayProcess]) -> None:
        import ray

        ray.wait([process.answer for process in processes], timeout=TICK)


class _Keeper:
    """Looks after a process, on the machine where that runs."""

    def __init__(self, here: Path, recipe: Recipe, folder: Path, open_reader: OpenReader) -> None:
        os.chdir(here)  # names in recipes and on the command line may be relative
        self._process = LocalProcess(0, recipe, folder, open_reader)

    def work(self, task: Task) -> list[Message]:
        """Begin a task; the first things told of it."""
        self._process.give(task)
        return self.listen()

    def listen(self) -> list[Message]:
        """What is told next; at least one thing."""
        while not (told := self._process.listen()):
            wait([self._process.connection], TICK)
        return told
