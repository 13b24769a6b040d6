"""What every stage shares: its arguments, and a result that is on disk after each figure, should the stage be killed.

A stage is a module `gpu.NAME` with `main()`; its figures are any JSON, and `tables` among them become the report's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Stage:
    """One stage under way."""

    path: Path  # of its result
    work: Path  # current directory and place of temporary files, shared with the other stages
    device: str  # "cuda" or "cpu"
    small: bool
    overrides: list[str]
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Of the models: a CPU computes in fp32."""
        return "bfloat16" if self.device == "cuda" else "float32"

    def record(self, **figures: Any) -> None:
        """Add figures and write all of them."""
        self.figures |= figures
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.figures, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Add a table to the report: numbers as they are, None for what was not measured."""
        if any(len(row) != len(columns) for row in rows):
            raise ValueError(f"{title}: rows of {sorted({len(row) for row in rows})} cells, and {len(columns)} columns")
        tables = [table for table in self.figures.get("tables", []) if table["title"] != title]
        self.record(tables=[*tables, {"title": title, "columns": columns, "rows": rows}])

    def note(self, text: str) -> None:
        """Add a line under the stage's tables."""
        self.record(notes=[*self.figures.get("notes", []), text])


def open_stage() -> Stage:
    """Read the command line that `runner` gives a stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--override", dest="overrides", action="append", default=[])
    arguments = vars(parser.parse_args())
    return Stage(path=arguments.pop("result"), **arguments)
