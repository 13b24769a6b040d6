"""The script of the GPU's figures, small and on a CPU: real numbers, and what happens to stages that go wrong."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(900)  # seven processes that import everything, on a machine that may be busy
SCRIPT = Path(__file__).parent / "gpu" / "run.sh"


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Call the script with this Python and without any GPU."""
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), *map(str, arguments), "--small"]
    return subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment)


def figures(output: Path) -> dict[str, dict]:
    """Return the stages of the summary, each of which has a separate file as well."""
    stages = {stage["stage"]: stage for stage in json.loads((output / "summary.json").read_text())["stages"]}
    assert stages == {name: json.loads((output / f"{name}.json").read_text()) for name in stages}
    return stages


def assert_positive(*numbers: float) -> None:
    assert all(isinstance(n, int | float) and math.isfinite(n) and n > 0 for n in numbers), numbers


def test_stages_measure_real_numbers_and_tabulate_them(tmp_path):
    done = run(tmp_path, "--only", "quickstart", "eight_b", "decode")
    assert done.returncode == 0, done.stdout + done.stderr
    stages = figures(tmp_path)
    assert list(stages) == ["eight_b", "decode", "quickstart"]
    assert {stage["status"] for stage in stages.values()} == {"passed"}

    training = stages["eight_b"]["figures"]
    assert [step["step"] for step in training["steps"]] == [0, 1, 2]
    phases = ("rollout", "teacher", "update")
    assert_positive(*(step[f"seconds_{phase}"] for step in training["steps"] for phase in phases))
    assert_positive(*(step[f"memory_{phase}_gb"] for step in training["steps"] for phase in phases))
    assert_positive(*training["planned"]["memory_gb"].values())
    # One id in a hundred ends a response, so some do not reach their 12 tokens.
    assert 1 < training["mean_response_length"] < 12

    decode = stages["decode"]["figures"]
    assert_positive(decode["copy_gb_per_second"], decode["floor_ms_per_step"])
    off = decode["settings"]["off"]
    assert_positive(off["ms_per_step"], off["tokens_per_second"], *off["peak_gb"])
    assert 4 < off["tokens"] <= decode["batch"] * decode["tokens"]

    quickstart = stages["quickstart"]["figures"]
    assert quickstart["finished"]
    assert quickstart["steps"] == len(quickstart["losses"]) == 5
    assert_positive(*quickstart["losses"], *quickstart["medians"].values())
    assert 0 <= quickstart["accuracy_before"] <= 1
    assert 0 <= quickstart["accuracy_after"] <= 1

    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    assert f"{off['tokens_per_second']:.4g}" in table or f"{off['tokens_per_second']:,.0f}" in table
    assert f"{training['planned']['memory_gb']['update']:.4g}" in table
    assert "--small" in table
    assert not (tmp_path / "work").exists()


def test_a_failing_stage_is_shown_and_stops_no_other(tmp_path):
    done = run(tmp_path, "--only", "eight_b", "quickstart", "--override", "training.stepz=3")
    assert done.returncode == 1
    stages = figures(tmp_path)
    assert {name: stage["status"] for name, stage in stages.items()} == {"eight_b": "failed", "quickstart": "failed"}
    assert any("training.stepz" in line for line in stages["quickstart"]["log_tail"])
    section = done.stdout[done.stdout.index("## quickstart") :]
    assert "failed: exit status" in section
    assert "training.stepz" in section


def test_a_stage_past_its_limit_is_killed_with_all_that_it_started(tmp_path):
    done = run(tmp_path, "--only", "eight_b", "quickstart", "--limit", "quickstart=4", "--budget", "30")
    assert done.returncode == 1
    stages = figures(tmp_path)
    assert stages["quickstart"]["status"] == "timed out"
    assert stages["quickstart"]["seconds"] >= 4
    assert "killed after its limit of 4 s" in done.stdout
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    # Thirty seconds are too few for the other, which is not started.
    assert stages["eight_b"]["status"] == "skipped"
    assert "are left of 30" in stages["eight_b"]["reason"]


def test_an_unknown_stage_is_refused_by_name(tmp_path):
    done = run(tmp_path, "--only", "eightb")
    assert done.returncode == 1
    assert "unknown stage 'eightb'; use some of doctor, kernel_tests, eight_b" in done.stderr
