"""The kernels' tests: compiled on a GPU, in Triton's interpreter on a CPU; counts, and the failures by name."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu.environment import ROOT
from gpu.stage import Stage, open_stage

_PROCESSES = 6  # compiling keeps the cores busy, the GPU hardly


def main() -> None:
    """Run pytest and record its report; its exit status becomes the stage's."""
    stage = open_stage()
    report = stage.work / "kernel_tests.xml"
    folder = ROOT / "tests" / "kernels"
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "--timeout=100"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), f"--junitxml={report}"]
    if stage.device == "cuda" and importlib.util.find_spec("xdist"):
        command += ["-n", str(_PROCESSES)]
    done = subprocess.run([*command, str(folder / "test_topk.py" if stage.small else folder)])
    if report.exists():
        tabulate(stage, report)
    if done.returncode:
        raise SystemExit(done.returncode)


def tabulate(stage: Stage, report: Path) -> None:
    """Record counts by file, and each failure with the first line of its message."""
    counts: dict[str, dict[str, float]] = {}
    failures: list[list[str]] = []
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").split(".")[-1]
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        row = counts.setdefault(file, {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        row[kind] += 1
        row["seconds"] += float(case.get("time", 0))
        if kind == "failed":
            message = next(child.get("message", "") for child in case if child.tag in ("failure", "error"))
            failures.append([f"{file}::{case.get('name')}", (message.splitlines() or [""])[0][:160]])
    stage.record(counts=counts, failures=failures)
    columns = ["passed", "failed", "skipped", "seconds"]
    stage.table("Tests", ["file", *columns], [[file, *map(row.get, columns)] for file, row in counts.items()])
    if failures:
        stage.table("Failures", ["test", "message"], failures)


if __name__ == "__main__":
    main()
