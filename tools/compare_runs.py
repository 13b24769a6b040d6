#!/usr/bin/env python
"""Compare the metrics of two runs step by step; for refactors, demand that they are equal.

    python tools/compare_runs.py runs/before runs/after
    python tools/compare_runs.py runs/before runs/after --assert-equal --keys loss grad_norm
    python tools/compare_runs.py runs/tp1 runs/tp2 --assert-equal --rtol 1e-5

A run is its folder or its metrics.jsonl. What depends on the machine is left out, unless named with --keys.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError
from megatron_tropd.records.metrics import read_records

_OF_THE_MACHINE = ("seconds", "tokens_per_second", "memory")


def main(argv: list[str] | None = None) -> int:
    """Print the table; return 1 if --assert-equal was given and the runs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="run folder or metrics.jsonl")
    parser.add_argument("second", type=Path, help="run folder or metrics.jsonl")
    parser.add_argument("--keys", nargs="+", help="metrics to compare (default: all but times and memory)")
    parser.add_argument("--assert-equal", action="store_true", help="exit with 1 unless steps and numbers are equal")
    parser.add_argument(
        "--rtol", type=float, default=0.0, help="relative difference that counts as equal (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        first, second = (_read(path) for path in (arguments.first, arguments.second))
    except UserError as error:
        print(f"compare_runs: error: {error}", file=sys.stderr)
        return 2
    steps = sorted(first.keys() & second.keys())
    problems = _compare_steps(first, second)
    keys = arguments.keys or sorted(
        {
            k
            for record in (*first.values(), *second.values())
            for k in record
            if k != "step" and not k.startswith(_OF_THE_MACHINE)
        }
    )
    print(f"{'metric':<28}{'first':>14}{'second':>14}{'largest rel. difference':>26}  at step")
    for key in keys:
        pairs = [(step, first[step].get(key), second[step].get(key)) for step in steps]
        step, difference = max(((s, _difference(a, b)) for s, a, b in pairs), key=lambda x: x[1], default=(None, 0.0))
        last = pairs[-1][1:] if pairs else (None, None)
        print(f"{key:<28}{_show(last[0]):>14}{_show(last[1]):>14}{difference:>26.3g}  {step if difference else ''}")
        if difference > arguments.rtol:
            problems.append(f"{key} differs by {difference:.3g} (relative) at step {step}")
    print(f"{len(steps)} steps in common; the columns show the last of them")
    if arguments.assert_equal and problems:
        print("not equal: " + "; ".join(problems), file=sys.stderr)
        return 1
    return 0


def _read(path: Path) -> dict[int, dict[str, Any]]:
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist; give a run's folder or its metrics.jsonl.")
    records = {record["step"]: record for record in read_records(file)}
    if not records:
        raise UserError(f"{file} holds no records; there is nothing to compare.")
    return records


def _compare_steps(first: dict[int, Any], second: dict[int, Any]) -> list[str]:
    only = sorted(first.keys() ^ second.keys())
    return [f"{len(only)} steps are in one run only, the first of them {only[0]}"] if only else []


def _difference(a: Any, b: Any) -> float:
    """Relative difference of two numbers (infinite if only one is there); of lists, the largest."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return max(map(_difference, a, b), default=0.0)
    if a == b:
        return 0.0
    if not all(isinstance(x, int | float) for x in (a, b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def _show(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else "" if value is None else "..."


if __name__ == "__main__":
    sys.exit(main())
