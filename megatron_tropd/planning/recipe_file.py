"""Writes a recipe for people: only the keys that matter, each with what it means.

write_recipe("recipe.yaml", {"training.steps": 200}, heading=["..."], notes={"training.steps": "the paper's"})
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError
from megatron_tropd.recipe import help_of
from megatron_tropd.system.json_files import refuse_unwritable, write_text

_WIDTH = 118


def write_recipe(
    path: str | Path,
    settings: Mapping[str, Any],
    *,
    heading: list[str],
    notes: Mapping[str, str],
    base: str | None = None,
) -> None:
    """Write a recipe that `load_recipe` reads; atomic.

    Args:
        path: of the new file, see `check_new`.
        settings: `section.key` -> value, written in this order; the keys of a section must follow one another.
        heading: comment lines at the top.
        notes: key -> comment in place of the key's help.
        base: recipe from which this one starts.
    """
    lines = [f"# {line}".rstrip() for line in heading]
    lines += [f"base: {base}"] if base else []
    section = None
    for key, value in settings.items():
        where, _, name = key.rpartition(".")
        if where != section:
            section = where
            lines += ["", f"{where}:"]
        lines += _setting(f"  {name}: {_yaml(value)}", notes.get(key, help_of(key)))
    write_text(path, "\n".join(lines) + "\n")


def check_new(path: str | Path, option: str) -> None:
    """Raise UserError where a recipe cannot be written, or where a file exists already: it is never overwritten."""
    refuse_unwritable(Path(path).parent, f"{option} {path}")
    if Path(path).exists():
        raise UserError(f"{option} {path} exists and is not overwritten: give another name, or move the file away.")


def _setting(text: str, note: str) -> list[str]:
    line = f"{text}  # {note}" if note else text
    if len(line) <= _WIDTH:
        return [line]
    return [*(f"  # {part}" for part in textwrap.wrap(note, _WIDTH - 4)), text]


def _yaml(value: Any) -> str:
    """JSON is YAML, and texts that look like something else are quoted; plain paths and words need no quotes."""
    if isinstance(value, str) and value.replace("/", "").replace("_", "").replace("-", "").replace(".", "").isalpha():
        return value if value not in ("null", "true", "false", "yes", "no", "on", "off") else json.dumps(value)
    return json.dumps(value, ensure_ascii=False)
