"""The benchmark of the kernels: it measures what it says, and prints a row for every contestant."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from support.helpers import PATIENCE

from megatron_tropd.kernels.benchmarks.__main__ import run
from megatron_tropd.kernels.benchmarks.cases import Case, Contestant
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


def test_a_contestant_that_fails_is_named_and_ends_nothing(capsys):
    def fails():
        raise AssertionError("of another kind")

    contestants = [Contestant("broken", fails), Contestant("PyTorch", lambda: torch.ones(1 << 18) + 1)]
    contestants.append(Contestant("ours", lambda: torch.ones(1 << 18).add_(1)))
    rows = run(Case("sum", 1, 1 << 18, 1 << 20, contestants), torch.device("cpu"), 1, 1e9)
    assert [row["implementation"] for row in rows] == ["broken", "PyTorch", "ours"]
    assert rows[0]["error"] == "AssertionError: of another kind"
    assert rows[0]["ms"] is None
    assert rows[2]["ms"] > 0
    assert rows[2]["extra_over_pytorch"] == pytest.approx(0.5, rel=0.01)
    assert "AssertionError: of another kind" in capsys.readouterr().out


def test_every_contestant_has_a_row(tmp_path):
    command = [sys.executable, "-m", "megatron_tropd.kernels.benchmarks"]
    sizes = ["--tokens", "16", "32", "--vocab", "128", "--k", "4", "--hidden", "8", "--repeats", "1"]
    options = ["--dtype", "fp32", "--only", "log-probs", "jsd", "top-k forward KL", "fused linear JSD"]
    options += ["--json", str(tmp_path / "rows.json")]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # compiling takes longer than all the rest
    done = subprocess.run(
        [*command, *sizes, *options], capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert all(len(row) == 9 for row in rows)
    ours = [row for row in rows if row[2].strip() == "ours"]
    assert len(ours) == 8  # four operations at two sizes
    assert all(float(row[3]) > 0 and float(row[4]) > 0 for row in ours)
    for baseline in ("PyTorch", "torch.compile", "Megatron-Core", "Model-Optimizer", "TRL", "Liger-Kernel"):
        assert any(baseline in row[2] for row in rows), f"{baseline} is missing"
    written = json.loads((tmp_path / "rows.json").read_text())
    assert "torch" in written["about"]
    assert [row["implementation"] for row in written["rows"]] == [row[2].strip() for row in rows]
    for in_file, in_table in zip(written["rows"], rows, strict=True):
        assert in_file["dtype"] == "fp32"
        assert f"{in_file['tokens']:,} × {in_file['vocabulary']:,}" == in_table[1].strip()
        if in_file["ms"] is not None:
            assert f"{in_file['ms']:.1f}" == in_table[3].strip()
            assert f"{in_file['share_of_copy_bandwidth']:.0%}" == in_table[8].strip()
    assert re.search(r"log-probs: time ~ tokens\^-?\d", done.stdout)
