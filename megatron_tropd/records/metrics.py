"""One record per step: metrics.jsonl and trackers; written by one rank.

Lines are flushed as they are written, so a killed run keeps what it measured; on resume the steps that will run again
are dropped first. Beside it lie `evaluations.jsonl`, `answers.jsonl` and `samples.jsonl`: an object per
evaluation, graded response to a problem, or sampled rollout.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError
from megatron_tropd.records.trackers import Tracker
from megatron_tropd.system.json_files import refuse_foreign, write_bytes

logger = logging.getLogger(__name__)

JSONL_FILES = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "answers.jsonl")


class MetricsWriter:
    """Writes a run's records into its folder; every method does nothing where `enabled` is false.

    Args:
        folder: the run's folder; made if missing.
        start: the first step that will be written; records of it and of later steps, left by a killed run, are dropped.
        trackers: what gets the numbers, too.
        enabled: whether this is the rank that writes.
    """

    def __init__(
        self,
        folder: str | Path,
        start: int = 0,
        trackers: Sequence[Tracker] = (),
        enabled: bool = True,
    ):
        self.enabled = enabled
        if not enabled:
            return
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        # An evaluation is labelled with the number of steps before it: that of `start` is kept in a resumed run.
        evaluated = start if start else -1
        last_steps = {"metrics": start - 1, "samples": start - 1, "evaluations": evaluated, "answers": evaluated}
        self._files = {name: _open(self._folder / f"{name}.jsonl", last) for name, last in last_steps.items()}
        self._trackers = trackers

    def write(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write one step's numbers (Python or zero-dimensional tensors), and return them as they are in the file.

        Not-a-number and infinity become null.
        """
        record = {"step": step, **{key: _number(value) for key, value in metrics.items()}}
        if self.enabled:
            self._append("metrics", record)
            self._track(step, record)
        return record

    def write_evaluation(self, record: dict[str, Any]) -> None:
        """Write one evaluation; `record["step"]` is the number of steps done before it."""
        if not self.enabled:
            return
        record = {key: _number(value) for key, value in record.items()}
        self._append("evaluations", record)
        self._track(record["step"], {f"evaluation/{key}": value for key, value in record.items()})

    def write_answers(self, records: list[dict[str, Any]]) -> None:
        """Write an evaluation's graded responses; each `step` is the number of steps done before it."""
        for record in records if self.enabled else ():
            self._append("answers", _finite(record))

    def write_samples(self, step: int, records: list[dict[str, Any]]) -> None:
        """Write rollouts with their tokens' gate, as `tools/inspect_rollouts.py` reads them."""
        for record in records if self.enabled else ():
            self._append("samples", _finite({"step": step, **record}))

    def close(self, finished: bool = True) -> None:
        """Close files and trackers; `finished`: whether all planned steps are done."""
        if not self.enabled:
            return
        for file in self._files.values():
            file.close()
        for tracker in self._trackers:
            tracker.close(finished)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._files[name].write(line.encode("utf-8", errors="backslashreplace"))
            self._files[name].flush()
        except OSError as error:
            raise UserError(
                f"{self._folder / name}.jsonl cannot be written ({error.strerror}); make room, and start the command "
                "again to continue from the newest checkpoint."
            ) from error

    def _track(self, step: int, record: dict[str, Any]) -> None:
        names = ("step", "evaluation/step")
        numbers = {k: v for k, v in record.items() if k not in names and isinstance(v, int | float)}
        for tracker in self._trackers:
            tracker.write(step, numbers)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSONL file of records.

    Blank lines, and a last line that a killed run left incomplete, are skipped; for other lines that are no JSON
    object, a warning names the number.
    """
    records = []
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")  # splitlines would also split in texts
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif line.strip() and number < len(lines):
            logger.warning("%s line %d is damaged and was skipped", path, number)
    return records


def is_record_file(path: str | Path) -> bool:
    """Whether a file's first whole line is a record of a step, as this module writes them."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.endswith("\n"):
                return line.startswith('{"step": '[: len(line)])  # all that a killed run could write
            record = _parse(line)
            if record is not None or line.strip():
                return record is not None and isinstance(record.get("step"), int)
    return True


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _open(path: Path, last_step: int) -> Any:
    """Open for appending without the records later than `last_step`; the old file stands until the new is whole.

    Lines that are damaged stay as they are, but for the last one, which a killed run left incomplete.
    """
    refuse_foreign(path, is_record_file, "a run's records", "logging.dir holds")
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
        kept = [line for line in lines[:-1] if _stays(line, last_step)]
        if _parse(lines[-1]) is not None and _stays(lines[-1], last_step):
            kept.append(lines[-1])
        text = "".join(line + "\n" for line in kept)
        write_bytes(path, text.encode("utf-8", errors="surrogateescape"))
    return open(path, "ab")


def _stays(line: str, last_step: int) -> bool:
    record = _parse(line)
    return record is None or not isinstance(record.get("step"), int) or record["step"] <= last_step


def _number(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return _finite(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
