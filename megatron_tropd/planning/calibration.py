"""Reads the calibration file: JSON of what was measured on a GPU.

gpu = load_accelerator("h100.json")  # written by `megatron-tropd doctor --calibrate h100.json`, doctor/calibrate.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError
from megatron_tropd.planning.accelerator import Accelerator

_NUMBERS = ("memory_gb", "context_gb", "flops", "bandwidth", "layer_seconds_eager", "layer_seconds_graphed")
_BY_RANKS = ("all_reduce_seconds", "all_reduce_bandwidth")
_ABOUT = ("name", "date", "versions")


def load_accelerator(path: str | Path) -> Accelerator:
    """Read a calibration file; keys that it lacks, or that are null, keep their defaults.

    Raises:
        UserError: the file cannot be read, or a key or a value is none that it may hold.
    """
    remedy = f"write it with `megatron-tropd doctor --calibrate {path}`"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"calibration file {path} cannot be read as JSON ({error}); {remedy}.") from error
    if not isinstance(content, dict):
        raise UserError(f"calibration file {path} holds a {type(content).__name__}, expected an object; {remedy}.")
    known = (*_ABOUT, *_NUMBERS, *_BY_RANKS)
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            raise UserError(f"calibration file {path}: unknown key {key!r}, expected {', '.join(known)}; {remedy}.")
        if value is None and key not in _ABOUT:
            continue
        if key in _NUMBERS:
            values[key] = _positive(path, key, value)
        elif key in _BY_RANKS:
            values[key] = _by_ranks(path, key, value)
    return Accelerator(**values)


def _by_ranks(path: str | Path, key: str, value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise UserError(f'calibration file {path}: {key}={value!r}, expected numbers by ranks, such as {{"8": 1.0}}.')
    wrong = [ranks for ranks in value if not (ranks.isdecimal() and int(ranks) > 1)]
    if wrong:
        raise UserError(f"calibration file {path}: {key} names {wrong[0]!r} ranks, expected a whole number above 1.")
    found = {int(ranks): _positive(path, f"{key}.{ranks}", number) for ranks, number in value.items()}
    return found or getattr(Accelerator(), key)


def _positive(path: str | Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"calibration file {path}: {key}={value!r}, expected a number above 0.")
    return float(value)
