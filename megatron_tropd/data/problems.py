"""Collects problems in rows of data files, so that one message names the first ten and counts all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_tropd.errors import UserError

_REPORTED = 10


@dataclass(frozen=True)
class Problem:
    """One row's."""

    path: str
    unit: str  # "line" or "row"
    number: int
    message: str
    is_length: bool = False  # the prompt is too long, for which there are keys


class Problems:
    """The problems of all rows; only the first ten are kept, and the others counted."""

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.count = 0
        self.too_long = 0
        self._units: Counter[str] = Counter()
        self._paths: dict[str, None] = {}

    def __len__(self) -> int:
        return self.count

    def add(self, path: str, unit: str, number: int, message: str, is_length: bool = False) -> None:
        """Add the problem of row or line `number` of a file."""
        self.count += 1
        self.too_long += is_length
        self._units[unit] += 1
        self._paths[path] = None
        if len(self.first) < _REPORTED:
            self.first.append(Problem(path, unit, number, message, is_length))

    def lines(self) -> list[str]:
        """Return one line per kept problem, and one that counts the others."""
        several = len(self._paths) > 1
        lines = [f"{f'{p.path} ' if several else ''}{p.unit} {p.number}: {p.message}" for p in self.first]
        return lines + ([f"and {self.count - _REPORTED} more"] if self.count > _REPORTED else [])

    def raise_if_any(self, length_remedy: str = "raise data.max_prompt_tokens") -> None:
        """Raise UserError with the first ten; `length_remedy` helps prompts that are too long."""
        if not self.count:
            return
        unit = self._units.most_common(1)[0][0] if len(self._units) == 1 else "row"
        raise UserError(
            f"{', '.join(self._paths)}: {self.count} unusable {unit}{'s' if self.count > 1 else ''}. "
            f"{'; '.join(self.lines())}. Fix or remove them"
            + (f", or for what is too long {length_remedy}." if self.too_long else ".")
        )
