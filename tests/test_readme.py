"""The README's program for one's own training loop, run as it stands there."""

import os
import re
from pathlib import Path

import pytest
from support.helpers import run_distributed

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


def test_messages_of_the_troubleshooting_are_those_of_the_package():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Troubleshooting")[1].split("## ")[0]
    sources = " ".join(file.read_text(encoding="utf-8") for file in (ROOT / "megatron_tropd").glob("**/*.py"))
    quoted = [text for row in table.splitlines()[4:] if row for text in re.findall(r"`([^`]*)`", row.split("|")[1])]
    assert len(quoted) >= 6
    for message in quoted:
        for part in re.split(r"…|\bN\b", message):
            assert part.strip(" ,:") in sources, part
