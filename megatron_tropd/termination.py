"""SIGTERM as a flag that all ranks agree on after a step, so that they save together and leave."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from megatron_tropd.parallel import any_rank


class TerminationFlag:
    """Context manager: SIGTERM (from Slurm, torchrun or a person) sets a flag instead of killing the process."""

    def __init__(self):
        self._raised = False
        self._previous: signal.Handlers | None = None

    def __enter__(self) -> TerminationFlag:
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._raised = True

    def agreed(self) -> bool:
        """Return whether any rank was signalled; collective, one number a step."""
        return any_rank(self._raised)
