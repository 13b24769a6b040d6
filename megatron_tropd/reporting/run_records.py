"""Reads a run's folder for a report: records as columns, and notes on missing or damaged files.

run = read_run("runs/tropd")
run.column("metrics", "loss")       # [0.9, 0.7, None, ...], one per record
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError
from megatron_tropd.recipe_changes import read_settings


@dataclass
class RunRecords:
    """What one run's folder holds."""

    name: str
    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)  # section.key -> value
    notes: list[str] = field(default_factory=list)  # what could not be read, for the reader of the report

    def column(self, source: str, key: str) -> list[float | None]:
        """Return the value of every record of `metrics` or `evaluations`, None where it has no number."""
        return [_number(record.get(key)) for record in getattr(self, source)]

    def ends(self, source: str, key: str) -> tuple[float, float] | None:
        """Return the first and the last number under a key; None where there is none."""
        numbers = [value for value in self.column(source, key) if value is not None]
        return (numbers[0], numbers[-1]) if numbers else None

    @property
    def steps(self) -> int:
        """Number of steps done, as far as they are recorded."""
        return self.metrics[-1]["step"] + 1 if self.metrics else 0

    @property
    def planned_steps(self) -> int | None:
        """`training.steps` of the recipe."""
        return self.recipe.get("training.steps")

    @property
    def finished(self) -> bool:
        """Whether the run came to the end of its recipe."""
        return bool(self.summary.get("finished"))


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def read_run(folder: str | Path) -> RunRecords:
    """Read what there is of a run.

    Raises:
        UserError: the folder does not exist or holds no metrics.jsonl.
    """
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        what = "holds no metrics.jsonl" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {what}; give the folder of a run (the recipe's logging.dir).")
    run = RunRecords(name=folder.resolve().name, folder=folder)
    run.metrics = _by_step(read_lines(folder / "metrics.jsonl", run.notes))
    run.evaluations = _by_step(read_lines(folder / "evaluations.jsonl", run.notes))
    run.summary = _read_object(folder / "summary.json", run.notes)
    starts = _read_object(folder / "run.json", run.notes).get("starts")
    run.starts = [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    run.recipe = _read_recipe(folder / "recipe.yaml", run.notes)
    if not run.metrics:
        run.notes.append("metrics.jsonl holds no step yet.")
    if not run.starts:
        run.notes.append("run.json is missing or empty: models, hardware, versions and commit are unknown.")
    return run


def _by_step(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records in the order of their steps, of a repeated step the last."""
    found = {record["step"]: record for record in records if isinstance(record.get("step"), int)}
    return [found[step] for step in sorted(found)]


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, [] if it is missing; damaged lines are left out and noted.

    A last line without an end is one that training is writing.
    """
    if not path.is_file():
        return []
    records, damaged = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = parse_line(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            damaged.append(number)
    note_damage(path.name, damaged, notes)
    return records


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the object on a line; None where there is none."""
    try:
        record = json.loads(line, parse_constant=lambda _: None)  # NaN and infinity, which JSON does not know
    except ValueError:  # no JSON, or no UTF-8
        return None
    return record if isinstance(record, dict) else None


def note_damage(name: str, damaged: list[int], notes: list[str]) -> None:
    """Note the lines of a file that could not be read."""
    if damaged:
        lines = "line" if len(damaged) == 1 else "lines"
        more = "" if len(damaged) == 1 else f", the first of {len(damaged)}"
        notes.append(f"{name}: damaged {lines} left out (line {damaged[0]}{more}).")


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = parse_line(path.read_bytes())
    if content is None:
        notes.append(f"{path.name} is damaged and left out.")
    return content or {}


def _read_recipe(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append("recipe.yaml is missing: method, layout and settings are unknown.")
        return {}
    try:
        return read_settings(path)
    except UserError:
        notes.append("recipe.yaml is damaged: method, layout and settings are unknown.")
        return {}
