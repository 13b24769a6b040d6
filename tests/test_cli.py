"""The command line: quick help, refusals that are printed once and hang nobody, and each command on real files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE

from megatron_tropd.cli import main
from megatron_tropd.recipe import load_recipe

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
PATHS = ["student.hf_path=student", "teacher.hf_path=teacher", "data.prompts=prompts.jsonl"]


def _call(*arguments, launcher=(sys.executable,), **environment):
    command = [*launcher, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def _last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def test_help_is_quick_and_teaches():
    shown = _call("-m", "megatron_tropd", "train", "--help")
    assert "torchrun --nproc-per-node 2 -m megatron_tropd train tiny" in shown.stdout
    heavy = "import megatron_tropd.cli as c, sys; c.build_parser(); print({'torch', 'plotly'} & set(sys.modules))"
    assert _call("-c", heavy).stdout.strip() == "set()"


def test_help_keys_lists_every_section(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help-keys"])
    assert stopped.value.code == 0
    assert "objective.outlier = null" in capsys.readouterr().out


def test_dry_run_prints_the_resolved_recipe(tmp_path, capsys):
    assert main(["train", "tropd_paper", "training.steps=7", "--dry-run", *PATHS, "training.lr=1e-4"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    expected = load_recipe("tropd_paper", [*PATHS, "training.steps=7", "training.lr=1e-4"])
    assert load_recipe(tmp_path / "printed.yaml") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "train needs a recipe"),
        (["train", "training.steps=3"], "train needs a recipe"),
        (["train", "nowhere.yaml"], "recipe 'nowhere.yaml': there is neither a file nor a shipped recipe"),
        (["train", "tropd_paper", "--dry-run"], "student.hf_path or student.checkpoint is missing"),
        (["train", "tiny", "stray", "--dry-run"], "override 'stray' is not of the form"),
        (["train", "tropd_paper", "--dry-run", *PATHS, "objective.name=tropdd"], "tropdd"),
        (["evaluate", "tropd_paper"], "student.hf_path or student.checkpoint is missing"),
        (["evaluate", "--hf-path", "x"], "evaluation.problems is missing"),
        (["generate", "--hf-path", "x", "--output", "y"], "data.prompts is missing"),
        (["report", "tests"], "tests holds no metrics.jsonl"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("megatron-tropd: error: ")
    assert message in lines[0]


@pytest.mark.parametrize("arguments", [["evaluate", "--samples", "0"], ["train", "tiny", "--nothing"], ["fly"]])
def test_wrong_options_leave_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error: " in _last_line(capsys)


def test_ranks_refuse_together_and_print_once():
    refused = _call("-m", "megatron_tropd", "train", "tiny", "training.steps=0", launcher=TORCHRUN)
    assert refused.returncode != 0
    assert refused.stderr.count("megatron-tropd: error: training.steps=0") == 1


def test_one_rank_that_fails_ends_the_other():
    """Rank 1 is refused while rank 0 waits for it: the launcher must end both, and rank 1's reason must be shown."""
    script = f"""
if [ "$RANK" = 1 ]; then exec {sys.executable} -m megatron_tropd train tiny training.steps=0; fi
exec {sys.executable} -c 'from megatron_tropd import config, parallel; parallel.initialize(config.ModelConfig())'
"""
    refused = _call("--no-python", "bash", "-c", script, launcher=TORCHRUN)
    assert refused.returncode != 0
    assert refused.stderr.count("[rank 1] megatron-tropd: error: training.steps=0") == 1


def _raise(kind):
    """Return a command that ends with an exception of this kind."""
    from torch.distributed.checkpoint.api import CheckpointException

    makers = {
        "checkpoint": lambda: CheckpointException("reading failed", {}),
        "system_exit_text": lambda: SystemExit("a library gave up"),
        "system_exit_number": lambda: SystemExit(3),
        "generator_exit": GeneratorExit,
        "interrupt": KeyboardInterrupt,
        "group": lambda: type("Odd", (BaseException,), {})("odd"),
    }

    def command(*_):
        raise makers[kind]()

    return command


@pytest.mark.parametrize(
    ("kind", "status", "text"),
    [
        ("checkpoint", 1, "CheckpointException"),
        ("system_exit_text", 1, "a library gave up"),
        ("system_exit_number", 3, "megatron-tropd: ended"),
        ("generator_exit", 1, "GeneratorExit"),
        ("interrupt", 130, "interrupted"),
        ("group", 1, "Odd: odd"),
    ],
)
def test_field_cases_b5_every_exception_is_printed_and_ends_with_its_status(kind, status, text, monkeypatch, capsys):
    from megatron_tropd import commands

    monkeypatch.setattr(commands, "plan", _raise(kind))
    assert main(["plan"]) == status
    assert text in capsys.readouterr().err
