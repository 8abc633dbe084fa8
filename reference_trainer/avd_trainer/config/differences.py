"""What differs between two configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignored: tuple[str, ...] = ()) -> list[str]:
    """A line per field that differs, for an error message; sorted.

    Args:
        before: The saved configuration, as ``model_dump(mode="json")`` gives it.
        now: The other one.
        ignored: Beginnings of dotted names that may differ.
    """
    old, new = _flatten(before), _flatten(now)
    names = sorted(name for name in old.keys() | new.keys() if not name.startswith(ignored))
    return [
        f"  {name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in names if old.get(name) != new.get(name)
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
