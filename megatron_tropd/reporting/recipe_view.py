"""Recipes in a report: the keys that differ from the defaults, and those that differ between runs.

An unknown key of an older run is shown as different.
"""

from __future__ import annotations

from typing import Any

from megatron_tropd.config import Recipe
from megatron_tropd.recipe import help_of
from megatron_tropd.recipe_changes import settings_of
from megatron_tropd.reporting.run_records import RunRecords

_OF_THE_PLACE = {"logging.dir", "checkpoint.dir"}  # no choice of method: they differ whenever runs do


def defaults() -> dict[str, tuple[Any, str]]:
    """Return key -> (default, documentation) of every recipe key."""
    return {key: (value, help_of(key)) for key, value in settings_of(Recipe()).items()}


def settings(run: RunRecords) -> list[dict[str, Any]]:
    """Return each key of the run's recipe: key, value, default, help and whether it differs from the default."""
    known = defaults()
    return [
        {
            "key": key,
            "value": show(value),
            "default": show(known[key][0]) if key in known else "(unknown key)",
            "help": known[key][1] if key in known else "",
            "changed": key not in known or value != known[key][0],
        }
        for key, value in run.recipe.items()
    ]


def differences(runs: list[RunRecords]) -> list[dict[str, Any]]:
    """Return each key in which the runs differ, with every run's value; a run without a recipe is left out of it."""
    known = defaults()
    recipes = [run.recipe for run in runs]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe if key not in _OF_THE_PLACE))
    found = []
    for key in keys:
        values = [_value(recipe, key, known) for recipe in recipes]
        if len({repr(value) for value, recipe in zip(values, recipes, strict=True) if recipe}) > 1:
            shown = [show(value) if recipe else "?" for value, recipe in zip(values, recipes, strict=True)]
            found.append({"key": key, "values": shown, "help": known[key][1] if key in known else ""})
    return found


def _value(recipe: dict[str, Any], key: str, known: dict[str, tuple[Any, str]]) -> Any:
    """Return a recipe's value; of a key that it lacks (added since), the default."""
    return recipe.get(key, known[key][0] if key in known else None)


def show(value: Any) -> str:
    """Return a value as a recipe would have it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
