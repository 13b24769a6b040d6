"""The tools that read a run's records: compare_runs tells equal from different, inspect_rollouts shows every token."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import PATIENCE

from megatron_tropd.records.metrics import MetricsWriter

TOOLS = Path(__file__).parents[1] / "tools"


def _write_run(folder, scale=1.0, steps=4, **extra):
    with MetricsWriter(folder) as writer:
        writer.write_evaluation({"step": 0, "accuracy": 0.25})
        for step in range(steps):
            record = {"loss": scale / (step + 1), "trust_fraction": 0.5 + 0.1 * step, "tokens_per_second": 100.0 + step}
            stages = {"seconds_rollout": 2.0, "seconds_teacher": 1.0, "seconds_update": 1.5}
            writer.write(step, record | stages | {"rho_histogram": [1, 2, 3 + step]} | extra)
        writer.write_evaluation({"step": steps, "accuracy": 0.75})
    (folder / "recipe.yaml").write_text("training:\n  steps: 4 # <&>\n")
    (folder / "summary.json").write_text(json.dumps({"seconds": 12.4}))
    return folder


def _tool(name, *arguments):
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_compare_runs(tmp_path):
    one, same = (
        _write_run(tmp_path / name, seconds_rollout=x, memory_rollout_gb=x) for name, x in (("one", 1.0), ("same", 9.0))
    )
    near, short = _write_run(tmp_path / "near", 1.0 + 1e-6), _write_run(tmp_path / "short", steps=3)
    equal = _tool("compare_runs.py", one, same, "--assert-equal")
    assert equal.returncode == 0, equal.stderr
    assert not [name for name in ("seconds_rollout", "memory_rollout_gb") if name in equal.stdout]
    different = _tool("compare_runs.py", one, near / "metrics.jsonl", "--assert-equal")
    assert different.returncode == 1
    assert "loss differs by 1e-06" in different.stderr
    assert _tool("compare_runs.py", one, near, "--assert-equal", "--rtol", "1e-5").returncode == 0
    assert _tool("compare_runs.py", one, near).returncode == 0
    assert "1 steps are in one run only" in _tool("compare_runs.py", one, short, "--assert-equal").stderr
    assert _tool("compare_runs.py", one, tmp_path / "none").returncode == 2


def test_inspect_rollouts(tmp_path):
    kinds = [("guidance", "Well"), ("trust", " then"), ("outlier", " 7")]
    tokens = [
        {"text": text, "kind": kind, "rho": 0.5, "weight": 1.0, "student_logprob": -1.0, "teacher_logprob": None}
        for kind, text in kinds
    ]
    record = {"sample_id": 3, "prompt": "3 + 4?", "finish_reason": "eos", "tokens": tokens}
    with MetricsWriter(tmp_path) as writer:
        writer.write_samples(0, [record | {"prompt": "first"}])
        writer.write_samples(1, [record])
    last = _tool("inspect_rollouts.py", tmp_path)
    assert "-> <Well> then[ 7]" in last.stdout
    assert "first" not in last.stdout
    assert "first" in _tool("inspect_rollouts.py", tmp_path, "--step", "0").stdout
    coloured = _tool("inspect_rollouts.py", tmp_path, "--all", "--colour", "always", "--numbers").stdout
    assert "\033[34mWell\033[0m\033[32m then\033[0m\033[1;31m 7\033[0m" in coloured
    assert coloured.count("0.500") == 6
    assert _tool("inspect_rollouts.py", tmp_path, "--step", "7").returncode == 2


@pytest.mark.parametrize(("name", "direction"), [("hf_to_mcore", "hf-to-mcore"), ("mcore_to_hf", "mcore-to-hf")])
def test_the_converters_in_tools_are_the_commands_directions(name, direction):
    command = [sys.executable, TOOLS / f"convert_{name}.py", "--output", "x"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert f"error: convert {direction}: the following arguments are required: --" in refused.stderr
