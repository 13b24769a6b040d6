"""Client of the grading worker (grading/worker.py): starts it, limits every request, and restarts it if it was ended.

with GradingWorker(seconds=5.0) as worker:
    worker.ask("value", "x+1", "1+x")  # True
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError

_STARTING = 120.0  # seconds that the start may take on a busy machine
_WAITING = 20  # wall-clock seconds per CPU second of a question, on a busy machine
_REMEMBERED = 10_000  # questions whose replies are kept: the samples of a problem often agree


class GradingWorker:
    """One worker process, started at the first question.

    `seconds` bounds the CPU time of every question; `exceeded` counts the questions that ran past a limit of time or
    memory, whose reply is None.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # a forked child must not speak through its parent's pipes
        self._buffer = b""
        self._known: dict[tuple[str, ...], Any] = {}
        self.exceeded = 0

    def ask(self, kind: str, left: str, right: str) -> bool | None:
        """Compare two expressions: see answer_comparison.Ask. None where that is not decided."""
        key = (kind, left, right)
        if key not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key] = self._request({"kind": kind, "left": left, "right": right})
        return self._known[key]

    def last_match(self, pattern: str, text: str) -> str | None:
        """Return the last match of a regular expression: its first group, or all of it."""
        return self._request({"kind": "pattern", "pattern": pattern, "text": text})

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        assert process.stdin is not None  # _start opens both pipes
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        process.kill()
        process.wait()

    def __enter__(self) -> GradingWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _request(self, request: dict[str, Any]) -> Any:
        if self._process is None or self._owner != os.getpid():
            self._start()
        assert self._process is not None  # _start sets it, with both pipes
        assert self._process.stdin is not None
        line = json.dumps({**request, "limit": self._seconds}).encode() + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            reply = self._read_line(self._seconds * _WAITING + 10)
        except BrokenPipeError:
            reply = None
        if reply is None:
            self.exceeded += 1
            self.close()
            return None
        return json.loads(reply)

    def _start(self) -> None:
        """Start a process that imports this package, whatever the working directory, and sees no GPU."""
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-m", "megatron_tropd.grading.worker"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        self._process, self._buffer, self._owner = None, b"", os.getpid()
        with tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
            if self._read_line(_STARTING) != b"ready":
                self.close()
                errors.seek(0)
                said = errors.read()[-500:].decode(errors="replace").strip()
                raise UserError(
                    f"the process that grades answers did not start: {said or 'it said nothing'}. Try "
                    f"`{' '.join(command)}` in {root}."
                )

    def _read_line(self, seconds: float) -> bytes | None:
        """Return the next line without its end; None where the process ended or the time is over."""
        assert self._process is not None  # _start sets it, with both pipes
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([output], [], [], left)[0]:
                return None
            chunk = os.read(output, 1 << 16)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
