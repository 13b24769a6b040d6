"""`megatron-tropd doctor` for the shipped pair: every check with what it measured, and the calibration for `plan`."""

from __future__ import annotations

import json
import subprocess
import sys

from gpu.stage import open_stage


def main() -> None:
    """Run it and record its file, whatever its exit status, which becomes the stage's."""
    stage = open_stage()
    checks, calibration = stage.work / "doctor_checks.json", stage.work / "calibration.json"
    command = [sys.executable, "-m", "megatron_tropd", "doctor", "tiny", "--json", str(checks)]
    command += [] if stage.small else ["--calibrate", str(calibration)]
    command += [f"{role}.{key}" for role in ("student", "teacher") for key in ("tensor_model_parallel_size=1",)]
    command += [f"{role}.dtype={stage.dtype}" for role in ("student", "teacher")]
    done = subprocess.run(command)
    if checks.exists():
        report = json.loads(checks.read_text(encoding="utf-8"))
        stage.record(doctor=report)
        rows = [[check["name"], check["status"], check["detail"]] for check in report["checks"]]
        stage.table("Checks", ["check", "status", "what was measured"], rows)
    if calibration.exists():
        stage.record(calibration=json.loads(calibration.read_text(encoding="utf-8")))
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
