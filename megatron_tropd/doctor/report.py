"""The result of each check of `megatron-tropd doctor`, one line each, and their summary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

STATUSES = ("ok", "slow", "missing", "wrong")  # from good to bad
_NAME_WIDTH = 34


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: of the check, the same on every rank.
        status: one of STATUSES.
        detail: what was measured or met.
        remedy: what to do about it; empty where nothing need be done.
        needed: whether the recipe cannot do without: then `missing` and `wrong` fail the whole.
        numbers: what was measured, for --json.
        raised: whether the check was cut short by an exception, so that it may have left other ranks waiting.
    """

    name: str
    status: str
    detail: str = ""
    remedy: str = ""
    needed: bool = True
    numbers: dict[str, float] = field(default_factory=dict)
    raised: bool = False

    @property
    def fails(self) -> bool:
        """Whether the recipe cannot run like this."""
        return self.needed and self.status in ("missing", "wrong")

    def line(self) -> str:
        """Return the check as a line of text."""
        text = "; ".join(filter(None, (self.detail, self.remedy)))
        optional = " (not needed by this recipe)" if not self.needed and self.status in ("missing", "wrong") else ""
        return " ".join(f"{self.status:<8}{self.name:<{_NAME_WIDTH}} {text}{optional}".splitlines()).rstrip()

    def record(self) -> dict[str, Any]:
        """Return the check as JSON's types."""
        return dataclasses.asdict(self)


def from_exception(name: str, error: BaseException, remedy: str = "") -> Check:
    """Return the check that an exception cut short."""
    text = next(iter(str(error).strip().splitlines()), "")
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return Check(name, "wrong", what, remedy, raised=True)


def merge(checks: list[Check]) -> Check:
    """Return one check for all ranks: the first of the worst, with its rank where the others fared better."""
    worst = max(checks, key=lambda check: STATUSES.index(check.status))
    rank = checks.index(worst)
    alike = all(check.status == worst.status for check in checks)
    raised = any(check.raised for check in checks)
    if alike and rank == 0:
        return dataclasses.replace(worst, raised=raised)
    return dataclasses.replace(worst, detail=f"rank {rank}: {worst.detail}", raised=raised)


def verdict(checks: list[Check]) -> str:
    """Return the last line: whether the recipe can run."""
    failed = [check.name for check in checks if check.fails]
    slow = [check.name for check in checks if check.status == "slow"]
    if failed:
        return f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}"
    if slow:
        return f"all that is needed works; slow: {', '.join(slow)}"
    return "all that is needed works"
