"""A training run in a separate process, followed through the records that it writes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def follow(
    recipe: str | Path,
    keys: list[str],
    run: Path,
    report: Callable[[list[dict[str, Any]]], None],
    steps: int | None = None,
) -> None:
    """Train until `steps` are recorded, then end the process; without `steps` until it ends by itself.

    `report` gets all records each time that there are more, so that what was measured is safe if time runs out.
    Raises SystemExit if the run fails, or ends before `steps`.
    """
    from megatron_tropd.records.metrics import read_records

    metrics, records = run / "metrics.jsonl", []
    process = subprocess.Popen([sys.executable, "-m", "megatron_tropd", "train", str(recipe), *keys])
    try:
        while steps is None or len(records) < steps:
            ended = process.poll() is not None  # before reading, so that the last records are seen
            found = read_records(metrics)[:steps] if metrics.exists() else []
            if len(found) > len(records):
                records = found
                report(records)
            elif ended:
                break
            time.sleep(0.2)
        else:
            return
    finally:
        process.kill()
        process.wait()
    if process.returncode or steps is not None:
        raise SystemExit(f"training ended with status {process.returncode} after {len(records)} steps")
