"""The benchmark of the kernels: it measures what it says, and prints a row for every contestant."""

import os
import re
import subprocess
import sys

import pytest
import torch

from megatron_tropd.kernels.benchmarks.measure import exponent, measure


def test_memory_and_traffic_of_a_known_call():
    source = torch.ones(1 << 20)
    measured = measure(lambda: (source * 2).add_(1), torch.device("cpu"), repeats=1, count_traffic=True)
    assert measured.extra_bytes == pytest.approx(4 << 20, rel=0.01)
    # mul reads one tensor and writes one; add_ reads and writes its own.
    assert measured.moved_bytes == 4 * (4 << 20)
    assert measured.seconds > 0


def test_exponent_of_a_known_law():
    assert exponent([1, 2, 4, 8], [3.0, 6.0, 12.0, 24.0]) == pytest.approx(1.0)
    assert exponent([1, 2, 4], [1.0, 4.0, 16.0]) == pytest.approx(2.0)


def test_every_contestant_has_a_row():
    command = [sys.executable, "-m", "megatron_tropd.kernels.benchmarks"]
    sizes = ["--tokens", "16", "32", "--vocab", "128", "--k", "4", "--hidden", "8", "--repeats", "1"]
    options = ["--dtype", "fp32", "--only", "log-probs", "jsd", "top-k forward KL", "fused linear JSD"]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # compiling takes longer than all the rest
    done = subprocess.run(
        [*command, *sizes, *options], capture_output=True, text=True, timeout=280, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert all(len(row) == 9 for row in rows)
    ours = [row for row in rows if row[2].strip() == "ours"]
    assert len(ours) == 8  # four operations at two sizes
    assert all(float(row[3]) > 0 and float(row[4]) > 0 for row in ours)
    for baseline in ("PyTorch", "torch.compile", "Megatron-Core", "Model-Optimizer", "TRL", "Liger-Kernel"):
        assert any(baseline in row[2] for row in rows), f"{baseline} is missing"
    assert re.search(r"log-probs: time ~ tokens\^-?\d", done.stdout)
