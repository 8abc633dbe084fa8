"""From signals to findings: what the monitors have in common."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollapseFinding:
    """One thing that went wrong.

    Attributes:
        step: When it was noticed.
        kind: One of those that the monitor's docstring lists, such as ``"frozen"`` or ``"blurred"``.
        value: What was measured.
        limit: The limit that it crossed.
        message: In words, with what to do.
    """

    step: int
    kind: str
    value: float
    limit: float
    message: str


@dataclass(frozen=True)
class Rule:
    """``kind`` holds while ``signal`` is above (or below) ``limit``; it is said after ``patience`` steps."""

    kind: str
    signal: str
    limit: float
    above: bool
    message: str
    patience: int = 0

    def holds(self, value: float) -> bool:
        return value > self.limit if self.above else value < self.limit


class Judge:
    """Holds signals against rules, and says once what is wrong until it has been right again.

    Args:
        rules: The rules.

    Attributes:
        findings: All findings so far, oldest first.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.findings: list[CollapseFinding] = []
        self._rules = tuple(rules)
        self._active: set[str] = set()
        self._held_since: dict[str, int] = {}  # the step, as counted, of the first look at which a kind held

    def look(self, step: int, signals: Mapping[str, float], *, counted: int) -> None:
        """Log and keep what the signals of a step show; a rule whose signal is not among them stays as it is.

        Args:
            step: As findings name it.
            signals: By name.
            counted: Steps so far, for rules with patience; a loop may name its steps otherwise.
        """
        for rule in self._rules:
            value = signals.get(rule.signal)
            if value is None:
                continue
            if not rule.holds(value):
                self._active.discard(rule.kind)
                self._held_since.pop(rule.kind, None)
                continue
            since = self._held_since.setdefault(rule.kind, counted)
            if rule.kind not in self._active and counted - since >= rule.patience:
                self._active.add(rule.kind)
                lasting = f", for {rule.patience} steps" if rule.patience else ""
                message = f"Step {step}: {rule.message} ({value:.2f}, limit {rule.limit:g}{lasting})."
                self.findings.append(CollapseFinding(step, rule.kind, value, rule.limit, message))
                logger.warning(message)

    def state_dict(self) -> dict[str, Any]:
        return {
            "active": sorted(self._active),
            "held_since": dict(self._held_since),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._active = set(state_dict["active"])
        self._held_since = dict(state_dict.get("held_since", {}))
        self.findings = [CollapseFinding(**finding) for finding in state_dict["findings"]]
