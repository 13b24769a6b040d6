"""Declares a key of the recipe: its default, documentation and range."""

from __future__ import annotations

from dataclasses import field
from typing import Any

FILES = "str | list[str] | null"  # OmegaConf does not support a union with a list: such keys are declared as Any


def key(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    words: tuple[str, ...] = (),
    takes: str | None = None,
) -> Any:
    """Declare a key: documentation, allowed values of an enumeration, range [low, high] or values > `above`.

    `words` are the texts that a numeric key takes beside its numbers; `takes` the types of a key declared as Any.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "above": above, "words": words}
    metadata["takes"] = takes
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)
