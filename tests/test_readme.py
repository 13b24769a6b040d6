"""The README's program for one's own training loop, run as it stands there."""

import os
import re
from pathlib import Path

import pytest
from helpers import run_distributed

ROOT = Path(__file__).parent.parent


def run_program(root, program):
    os.chdir(root)
    variables = {"__name__": "readme"}
    exec(compile(program, "README.md", "exec"), variables)
    return variables["result"].metrics, variables["rollouts"]


def test_own_training_loop_runs_as_printed():
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (program,) = programs
    (metrics, rollouts), (_, on_other_rank) = run_distributed(run_program, 2, ROOT, program)
    assert rollouts.tokens == on_other_rank.tokens
    assert len(rollouts) == 8
    assert 0 < metrics["trust_fraction"] <= 1
    assert metrics["logprob_mismatch"] == pytest.approx(0, abs=1e-4)
