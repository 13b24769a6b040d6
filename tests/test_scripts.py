"""The examples' device: the CPU unless CUDA is asked for, no more processes than GPUs, and the user's own settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOW = 'echo "$DEVICE|${CUDA_VISIBLE_DEVICES-unset}|${PYTORCH_CUDA_ALLOC_CONF-}|${NCCL_GRAPH_REGISTER-}|${DTYPE[*]-}"'
OWN = ("DEVICE", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_GRAPH_REGISTER")


def _bash(script, **variables):
    inherited = {name: value for name, value in os.environ.items() if name not in OWN}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = inherited | {"PATH": path} | variables
    command = ["bash", "-c", f"set -euo pipefail; source examples/setup_device.sh; {script}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({}, "cpu||||"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "cpu||||"),
        ({"DEVICE": "cuda"}, "cuda|unset|expandable_segments:True|0|student.dtype=bfloat16 teacher.dtype=bfloat16"),
        (
            {"DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "1", "PYTORCH_ALLOC_CONF": "x:1", "NCCL_GRAPH_REGISTER": "1"},
            "cuda|1||1|student.dtype=bfloat16 teacher.dtype=bfloat16",
        ),
    ],
)
def test_what_the_scripts_export(variables, shown):
    assert _bash(SHOW, **variables).stdout.strip() == shown


def test_an_unknown_device_is_refused():
    refused = _bash(SHOW, DEVICE="gpu")
    assert refused.returncode == 2
    assert "DEVICE=gpu: expected cpu or cuda" in refused.stderr


def test_more_processes_than_gpus_are_refused():
    refused = _bash("require_gpus 3; echo started", DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    assert refused.returncode == 2
    assert "this layout needs 3, and 0 can be used" in refused.stderr
    assert "started" not in refused.stdout
    assert _bash("require_gpus 3; echo started").stdout.strip() == "started"
