"""Progress of a run for people: a live panel on a terminal, a line per interval in a log, or nothing.

with open_progress("auto", interval=10.0, total=200, steps_done=0) as progress:
    progress.stage("rollout")
    progress.step(0, record)          # a record of metrics.jsonl
    progress.evaluation({"step": 0, "accuracy": 0.3})

All output goes to standard error. A failure there, such as a closed pipe, never ends a run.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from types import TracebackType
from typing import Any

from megatron_tropd.records.progress_text import BY_STAGE, evaluation_text, figures, line_of, sample_text

_REFRESHES_PER_SECOND = 2.0
_COLUMNS = 4  # of numbers


class Progress:
    """Shows nothing; what the others have in common."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def introduce(self, parts: list[tuple[str, str]]) -> None:
        """Print what is about to run, a line per (name, text); before the first step."""

    def stage(self, name: str) -> None:
        """Say what is being done now."""

    def step(self, step: int, record: dict[str, Any], samples: list[dict[str, Any]] | None = None) -> None:
        """Show a step's record of metrics.jsonl, and perhaps of its records of samples.jsonl."""

    def evaluation(self, record: dict[str, Any]) -> None:
        """Show an evaluation's record."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class _Shown(Progress):
    """What prints at all. Not through logging, which is silent but on rank 0: the reporting rank is a last stage's."""

    def introduce(self, parts: list[tuple[str, str]]) -> None:
        """Print the lines."""
        for name, text in parts:
            _print(f"{name:<9} {text}")


class Lines(_Shown):
    """One line per interval, for log files.

    Args:
        total: planned number of steps.
        interval: seconds between lines; the last step always has one.
        steps_done: before this start.
    """

    def __init__(self, total: int, interval: float, steps_done: int = 0):
        self._total, self._interval = total, interval
        self._first, self._started, self._last_line = steps_done, time.monotonic(), float("-inf")
        self._accuracy: float | None = None

    def step(self, step: int, record: dict[str, Any], samples: list[dict[str, Any]] | None = None) -> None:
        """Print a line unless the last one is too new."""
        now = time.monotonic()
        if now - self._last_line < self._interval and step + 1 != self._total:
            return
        self._last_line = now
        left = (now - self._started) / (step + 1 - self._first) * (self._total - step - 1)
        _print(line_of(step, self._total, record, self._accuracy, left))

    def evaluation(self, record: dict[str, Any]) -> None:
        """Print a line."""
        self._accuracy = record.get("accuracy", self._accuracy)
        _print(evaluation_text(record))


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed pipe; training goes on
        print(text, file=sys.stderr, flush=True)


class Panel(_Shown):
    """A live panel of rich's; takes the parameters of Lines but for the interval."""

    def __init__(self, total: int, steps_done: int = 0):
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True, highlight=False)
        columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False))
        self._bar = Bar(TextColumn("[bold]{task.description}"), *columns, *left, console=self._console, expand=True)
        self._task = self._bar.add_task("starting", total=total, completed=steps_done)
        self._record: dict[str, Any] = {}
        self._sample: dict[str, Any] | None = None
        self._evaluations: list[dict[str, Any]] = []
        self._handlers: list[tuple[logging.StreamHandler, Any]] = []
        self._live = Live(
            get_renderable=self._render,
            console=self._console,
            refresh_per_second=_REFRESHES_PER_SECOND,
            redirect_stdout=False,
        )

    def __enter__(self) -> Panel:
        self._live.start()
        # What is logged meanwhile goes above the panel: rich has put its own stream into sys.stderr.
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler):
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stderr)
        return self

    def stage(self, name: str) -> None:
        """Show what is being done now."""
        self._bar.update(self._task, description=name)

    def step(self, step: int, record: dict[str, Any], samples: list[dict[str, Any]] | None = None) -> None:
        """Show a step's numbers and its first sample."""
        self._record = record
        self._sample = samples[0] if samples else self._sample
        self._bar.update(self._task, completed=step + 1)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Show the newest evaluation beside the first."""
        self._evaluations.append(record)

    def close(self) -> None:
        """Stop; the panel's last state stays on the screen."""
        self._live.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()

    def _render(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel as Box
        from rich.table import Table

        table = Table.grid(padding=(0, 3))
        shown = dict(figures(self._record, self._evaluations))
        wide = {name: shown.pop(name) for name in BY_STAGE if name in shown}
        cells = [f"[dim]{name}[/dim] {text}" for name, text in shown.items()]
        for start in range(0, len(cells), _COLUMNS):
            table.add_row(*cells[start : start + _COLUMNS])
        parts: list[Any] = [self._bar, table] if cells else [self._bar]
        parts += [f"[dim]{name}[/dim] {text}" for name, text in wide.items()]
        if self._sample:
            parts += [sample_text(self._sample, width=self._console.width)]
        return Box(Group(*parts), title="megatron-tropd train", title_align="left", border_style="dim")


def open_progress(mode: str, *, interval: float, total: int, steps_done: int, enabled: bool = True) -> Progress:
    """Return what shows a run's progress.

    Args:
        mode: logging.progress; auto: a panel on a terminal, else lines.
        interval: seconds between lines.
        total: planned number of steps.
        steps_done: before this start.
        enabled: whether this rank shows anything.
    """
    if not enabled or mode == "none":
        return Progress()
    if mode == "panel" or (mode == "auto" and sys.stderr.isatty()):
        return Panel(total, steps_done)
    return Lines(total, interval, steps_done)
