"""What adapters share: finding their host and what they use of it, or saying what is missing; small conversions."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from torch import Tensor

from avd_core import AVDConfig, RegressionConfig

Members = Mapping[str, Sequence[str]]
"""What is used of something: dotted names, each with the arguments that it is called with."""

_NOTHING: Members = MappingProxyType({})


@dataclass(frozen=True)
class Host:
    """Someone else's code, which may be absent, and may have moved on.

    Args:
        name: What its users call it.
        proven_on: Where the adapter's tests ran: repository and commit, or version.
        remedy: How to get it: a sentence. For hosts that are imported here.
    """

    name: str
    proven_on: str
    remedy: str = ""

    def load(self, module: str, members: Members = _NOTHING) -> Any:
        """Import one of its modules, and :meth:`check` that.

        Raises:
            ImportError: If it cannot be imported.
            RuntimeError: If something is missing in it.
        """
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"{self.name} is needed here, and importing its {module} failed: {error}. {self.remedy} "
                f"{self._proven()}"
            ) from error
        self.check(found, members)
        return found

    def check(self, owner: Any, members: Members) -> None:
        """Require that a module, class or object has these members, and that they take these arguments.

        Raises:
            RuntimeError: If something is missing.
        """
        if gone := dict.fromkeys(filter(None, (_missing(owner, path) for path in members))):
            raise self.moved(f"{name_of(owner)} has no {', '.join(gone)}")
        for path, arguments in members.items():
            taken = inspect.signature(attrgetter(path)(owner)).parameters if arguments else ()
            if missing := [argument for argument in arguments if argument not in taken]:
                raise self.moved(f"{name_of(owner)}.{path} takes no argument {', '.join(missing)}")

    def moved(self, what: str) -> RuntimeError:
        """The error to raise where the host is not as it was."""
        return RuntimeError(f"{what}: not the {self.name} that this adapter fits. {self._proven()}")

    def _proven(self) -> str:
        return f"This adapter was proven on {self.proven_on}."


def _missing(owner: Any, path: str) -> str | None:
    """As much of a dotted name as it takes to see that it is not there."""
    names = path.split(".")
    for count, name in enumerate(names, 1):
        if not hasattr(owner, name):
            return ".".join(names[:count])
        owner = getattr(owner, name)
    return None


def name_of(owner: Any) -> str:
    """Of a module or class, or of an object's class."""
    if inspect.ismodule(owner):
        return owner.__name__
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}"


def with_accumulation(config: AVDConfig, rounds: int) -> AVDConfig:
    """The configuration whose cache waits for ``update()`` where an optimizer step has several micro-batches.

    Raises:
        ValueError: If ``order="update_first"`` is asked for with more than one.
    """
    if config.regression is None:
        return config
    regression = RegressionConfig(**{**config.regression.model_dump(), "auto_update": rounds <= 1})
    return config.model_copy(update={"regression": regression})


def named(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Metrics as they are in a host's log."""
    return {f"avd/{name}": value for name, value in metrics.items()}


def named_means(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for hosts that log scalars only."""
    return named({name: value.detach().float().mean() for name, value in metrics.items()})
