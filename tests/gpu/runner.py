"""Runs one stage as a separate process group, under a time limit, its output in a log; its failure stays its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_LOG_LINES = 15


@dataclass
class Outcome:
    """How a stage ended, and what it measured until then."""

    stage: str
    status: str  # passed, failed, timed out, skipped
    seconds: float = 0.0
    limit: float | None = None
    reason: str = ""
    log_tail: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `folder`/STAGE.json."""
        (folder / f"{self.stage}.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def run_stage(
    name: str, limit: float, arguments: list[str], output: Path, work: Path, environment: dict[str, str]
) -> Outcome:
    """Run `python -m gpu.NAME`; kill it and all that it started after `limit` seconds."""
    log, result = output / f"{name}.log", work / f"{name}.result.json"
    command = [sys.executable, "-m", f"gpu.{name}", "--result", str(result), "--work", str(work), *arguments]
    started = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, cwd=work, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status, reason = _ending(process.wait(limit))
        except subprocess.TimeoutExpired:
            status, reason = "timed out", f"killed after its limit of {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started, too
            process.wait()
    outcome = Outcome(name, status, round(time.monotonic() - started, 1), limit, reason)
    if result.exists():
        outcome.figures = json.loads(result.read_text(encoding="utf-8"))
    if status != "passed":
        outcome.log_tail = _last_lines(log)
    return outcome


def _ending(code: int) -> tuple[str, str]:
    if code == 0:
        return "passed", ""
    return "failed", f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def _last_lines(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return [line for line in text.splitlines() if line.strip()][-_LOG_LINES:]
