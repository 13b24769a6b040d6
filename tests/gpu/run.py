"""Run the stages one after another within a budget of time, and leave JSON, logs and one readable table.

    bash tests/gpu/run.sh OUTPUT_FOLDER [--small] [--only STAGE ...]

Each stage is a process with its own limit: one that fails or hangs costs only its figures. The exit status is 1 if
any stage did not pass. summary.json and table.md are written after each stage, so an interrupted run leaves them, too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu import environment
from gpu.runner import Outcome, run_stage
from gpu.table import as_markdown

# By worth: (limit in seconds, least that is worth a start).
STAGES = {
    "doctor": (90, 15),
    "kernel_tests": (120, 30),
    "eight_b": (130, 60),
    "decode": (80, 40),
    "quickstart": (110, 50),
    "kernel_times": (150, 40),
}
BUDGET = 520
SLOW = 4  # with --small a stage may take so many times its limit: the CPU may be busy with other things


def main() -> int:
    """Run what the command line asks for; return the exit status."""
    arguments = _arguments()
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    work = output / "work"
    shutil.rmtree(work, ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        environment.make_work_folder(work)
        outcomes = _run_all(arguments, output, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"\n{(output / 'table.md').read_text(encoding='utf-8')}", flush=True)
    return int(any(outcome.status != "passed" for outcome in outcomes))


def _run_all(arguments: argparse.Namespace, output: Path, work: Path) -> list[Outcome]:
    """Run the stages; write each one's outcome, and the summary up to it."""
    started = time.monotonic()
    facts = _facts(environment.probe(work), arguments)
    say = _Progress(started)
    say(f"{facts['name']} ({facts['device']}); {arguments.budget:.0f} s for {', '.join(arguments.only)}")
    outcomes: list[Outcome] = []
    for name in arguments.only:
        outcome = _run(name, arguments, facts["device"], started, output, work, say)
        outcomes.append(outcome)
        outcome.write(output)
        _write_summary(output, facts, outcomes, time.monotonic() - started)
    return outcomes


class _Progress:
    """Prints a line with the seconds since the start."""

    def __init__(self, started: float):
        self._started = started

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:5.0f} s] {text}", flush=True)


def _run(
    name: str,
    arguments: argparse.Namespace,
    device: str,
    started: float,
    output: Path,
    work: Path,
    say: _Progress,
) -> Outcome:
    """Run one stage, or say why there is no time for it."""
    limit, least = STAGES[name]
    limit = arguments.limit.get(name, limit * (SLOW if arguments.small else 1))
    left = arguments.budget - (time.monotonic() - started)
    if left < min(limit, least):
        reason = f"{max(left, 0):.0f} s are left of {arguments.budget:.0f}, too few to start it"
        say(f"{name}: skipped, {reason}")
        return Outcome(name, "skipped", reason=reason)
    limit = min(limit, left)
    say(f"{name}: started, at most {limit:.0f} s")
    options = ["--device", device, *(["--small"] if arguments.small else [])]
    options += [word for text in arguments.override for word in ("--override", text)]
    outcome = run_stage(name, limit, options, output, work, environment.variables(work))
    say(f"{name}: {outcome.status} after {outcome.seconds:.0f} s" + (f" ({outcome.reason})" if outcome.reason else ""))
    return outcome


def _facts(probed: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    command = f"bash tests/gpu/run.sh {shlex.join(sys.argv[1:])}"
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {**probed, "command": command, "date": date, "small": arguments.small}


def _write_summary(output: Path, facts: dict[str, Any], outcomes: list[Outcome], seconds: float) -> None:
    summary = {**facts, "seconds": round(seconds, 1), "stages": [asdict(outcome) for outcome in outcomes]}
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (output / "table.md").write_text(as_markdown(summary), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("output", type=Path, help="folder for STAGE.json, STAGE.log, summary.json and table.md")
    add("--small", action="store_true", help="small sizes: a test of this script, on a CPU too")
    add("--only", nargs="+", metavar="STAGE", default=list(STAGES), help=f"of {', '.join(STAGES)} (default: all)")
    add("--budget", type=float, help=f"seconds for all stages (default: {BUDGET}; --small: {SLOW * BUDGET})")
    add(
        "--limit", action="append", default=[], metavar="STAGE=SECONDS", help="a stage's limit, in place of its default"
    )
    add("--override", action="append", default=[], metavar="KEY=VALUE", help="recipe key for quickstart and eight_b")
    arguments = parser.parse_args()
    arguments.limit = {name: float(seconds) for name, _, seconds in (text.partition("=") for text in arguments.limit)}
    unknown = [name for name in (*arguments.only, *arguments.limit) if name not in STAGES]
    if unknown:
        raise SystemExit(f"run.sh: unknown stage {unknown[0]!r}; use some of {', '.join(STAGES)}")
    arguments.budget = arguments.budget or BUDGET * (SLOW if arguments.small else 1)
    arguments.only = [name for name in STAGES if name in arguments.only]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
