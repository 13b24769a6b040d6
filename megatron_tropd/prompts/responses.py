"""Files of teacher responses, {"id", "teacher_response", "finish_reason"} per row, joined with prompts by id.

They are what `megatron-tropd generate --model teacher --field teacher_response` writes, in any format of data/files.py,
or what servers and engines write (data/response_formats.py).

    responses = Responses("responses.jsonl", key="guidance.responses")
    responses.get(prompt.id)       # (text, finish reason) or None
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron_tropd.config import ColumnsConfig
from megatron_tropd.data.columns import REASONS, RESPONSES
from megatron_tropd.data.files import open_data
from megatron_tropd.data.layouts import RowReader
from megatron_tropd.data.messages import check_text
from megatron_tropd.data.problems import Problems
from megatron_tropd.data.response_formats import COLUMNS, plain_response
from megatron_tropd.data.values import column_value, finish_reason, id_text

logger = logging.getLogger(__name__)


class Responses:
    """The responses of one or more files by prompt id; read from the file when they are asked for."""

    def __init__(self, spec: str | Path | list[str], key: str, columns: ColumnsConfig | None = None):
        """Check every row.

        Of several responses to a prompt the first that was not cut is taken, else the first.

        Args:
            spec: a path, a glob or a list of them.
            key: of the recipe, which names the files.
            columns: `data.columns.*`; those that the files do not have are ignored.

        Raises:
            UserError: a file cannot be read, or rows have no id or no response.
        """
        self._files = [rows for part in open_data(spec, key) for rows in part]
        self._reader = ResponseReader(columns)
        self._rows: dict[str, tuple[int, int]] = {}  # id -> file and place
        cut: set[str] = set()
        problems, count = Problems(), 0
        for i, rows in enumerate(self._files):
            if rows.columns is not None:
                rows.select(self._reader.names(rows.columns))
            for place, record in rows.scan():
                try:
                    if isinstance(record, ValueError):
                        raise record
                    name, _, reason = self._reader.read(record)
                except ValueError as error:
                    problems.add(rows.path, rows.unit, rows.number(place), str(error))
                    continue
                count += 1
                is_better = name in cut and reason != "length"
                if name not in self._rows or is_better:
                    self._rows[name] = (i, place)
                    (cut.add if reason == "length" else cut.discard)(name)
        problems.raise_if_any()
        several = f", the first whole one of several for {count - len(self)} rows more" if count > len(self) else ""
        logger.info("%s: responses to %d prompts, %d of them cut%s", key, len(self), len(cut), several)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def get(self, name: str) -> tuple[str, str | None] | None:
        """Return the response to the prompt of this id and why it ended ("length": it was cut); None: there is none."""
        if name not in self._rows:
            return None
        i, place = self._rows[name]
        return self._reader.read(self._files[i].read(place))[1:]


class ResponseReader:
    """Turns rows of a file of teacher responses into ids and texts."""

    def __init__(self, columns: ColumnsConfig | None = None):
        """Take `data.columns.*`; a column that a row does not have is looked for under our own name."""
        self.columns = columns or ColumnsConfig()

    def names(self, columns: list[str]) -> set[str]:
        """Return those of a columnar file's columns that are read."""
        return RowReader(self.columns).names(columns) | (COLUMNS & set(columns))

    def read(self, row: dict[str, Any]) -> tuple[str, str, str | None]:
        """Return id, text and why it ended; ValueError names what is wrong with the row."""
        if not (self.columns.teacher_response and column_value(row, self.columns.teacher_response) is not None):
            row = plain_response(row)
        name, text = self._value(row, "id"), self._value(row, "teacher_response")
        if name is None:
            raise ValueError("id is missing: responses are joined with prompts by it")
        if text is None:
            others = [other for other in RESPONSES if row.get(other) is not None]
            raise ValueError(
                "teacher_response is missing"
                + (
                    f"; if {others[0]} is the teacher's, set data.columns.teacher_response={others[0]}"
                    if others
                    else ""
                )
            )
        named = (self.columns.finish_reason, *REASONS)
        reasons = [row[column] for column in named if column is not None and row.get(column) is not None]
        return id_text(name), check_text(text, "teacher_response"), finish_reason(reasons[0] if reasons else None)

    def _value(self, row: dict[str, Any], role: str) -> Any:
        value = column_value(row, getattr(self.columns, role) or role)
        return row.get(role) if value is None else value
