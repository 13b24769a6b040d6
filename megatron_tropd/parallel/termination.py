"""SIGTERM and Ctrl-C as a flag that all ranks agree on after a step, so that they save together and leave."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from megatron_tropd.parallel.groups import any_rank

# torchrun hands the terminal's Ctrl-C on to its processes, which have had it from the terminal already.
_ONE_CTRL_C_SECONDS = 2.0


_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None  # as signal.signal returns it


class TerminationFlag:
    """Context manager: SIGTERM (from Slurm, torchrun or a person) or Ctrl-C sets a flag instead of ending the process.

    A second Ctrl-C raises KeyboardInterrupt, which ends the run at once.
    """

    def __init__(self, tells: bool = False):
        """`tells`: whether this rank says on standard error that it was told to stop."""
        self.reason = "another rank was told to stop"
        self._tells = tells
        self._raised = False
        self._interrupted = float("inf")
        self._previous: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> TerminationFlag:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if now > self._interrupted + _ONE_CTRL_C_SECONDS:
                raise KeyboardInterrupt
            self._interrupted = min(self._interrupted, now)
        if not self._raised:
            self.reason = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            self._say()
        self._raised = True

    def _say(self) -> None:
        again = "; Ctrl-C again ends at once" if self.reason == "Ctrl-C" else ""
        if self._tells:  # not by print: the signal may have come in the midst of one
            with contextlib.suppress(OSError):
                os.write(2, f"\n{self.reason}: saves a checkpoint after this step, and ends{again}\n".encode())

    def agreed(self) -> bool:
        """Return whether any rank was signalled; collective, one number per step."""
        return any_rank(self._raised)
