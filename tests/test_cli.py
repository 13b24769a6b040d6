"""The command line: quick help, refusals that are printed once and hang nobody, and each command on real files."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import PATIENCE

from megatron_tropd.cli import build_parser, main
from megatron_tropd.commands.arguments import STATUSES
from megatron_tropd.methods import METHODS
from megatron_tropd.recipe import load_recipe

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
PATHS = ["student.hf_path=student", "teacher.hf_path=teacher", "data.prompts=prompts.jsonl"]


def _call(*arguments, launcher=(sys.executable,), **environment):
    command = [*launcher, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def test_help_is_quick_and_teaches():
    shown = _call("-m", "megatron_tropd", "train", "--help")
    assert "torchrun --nproc-per-node 2 -m megatron_tropd train tiny" in shown.stdout
    heavy = "import megatron_tropd.cli as c, sys; c.build_parser(); print({'torch', 'plotly'} & set(sys.modules))"
    assert _call("-c", heavy).stdout.strip() == "set()"


COMMANDS = build_parser().commands


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_teaches_by_examples_that_parse(command, capfd):
    assert main([command, "--help"]) == 0
    text = capfd.readouterr().out
    examples = text[text.index("examples:\n") :].replace(" \\\n   ", "").splitlines()
    calls = [line.split("  #")[0] for line in map(str.strip, examples)]
    calls = [call for call in calls if call.startswith(("megatron-tropd", "torchrun")) and f" {command}" in call]
    assert calls
    for call in calls:
        words = shlex.split(call)
        arguments = words[words.index(command) :]
        if "--help-keys" not in arguments:
            build_parser().parse_args(arguments)


def test_the_overview_names_every_command_and_the_statuses(capfd):
    assert main(["--help"]) == 0
    text = capfd.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in text
    assert STATUSES in text


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("init", "report", "convert")])
def test_every_recipe_command_explains_the_keys(command, capfd):
    assert main([command, "--help-keys", "guidance"]) == 0
    text = capfd.readouterr().out
    assert "guidance.beta = 0.001" in text
    assert "training." not in text


@pytest.mark.parametrize(
    ("about", "key"),
    [([], "objective.outlier = null"), (["data.columns"], "data.columns.id"), (["kv_cache"], "rollout.kv_cache_gb")],
)
def test_help_keys_takes_a_section_or_a_word(about, key, capfd):
    assert main(["train", "--help-keys", *about]) == 0
    assert key in capfd.readouterr().out


def test_help_keys_of_the_objective_says_when_to_use_which(capfd):
    assert main(["train", "--help-keys", "objective"]) == 0
    text = capfd.readouterr().out
    for name, method in METHODS.items():
        assert f"{name} " in text
        assert method.what in text
        assert method.when in text


def test_a_broken_pipe_is_silent():
    shown = _call("-c", f"set -o pipefail; {sys.executable} -m megatron_tropd --help | true", launcher=("bash",))
    assert shown.stderr == ""
    assert shown.returncode in (0, 141)  # 0: all was written before the reader left


def test_dry_run_shows_what_differs_and_the_plan(capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["train", "tiny", "--dry-run", "training.steps=7"]) == 0
    text = capfd.readouterr().out
    assert "#   training.steps" in text
    assert "7  (default 200)" in text
    assert "# plan for 2 GPU(s)" in text
    assert "GB of 79: fits" in text


def test_dry_run_prints_the_resolved_recipe(tmp_path, capfd):
    assert main(["train", "tropd_paper", "training.steps=7", "--dry-run", *PATHS, "training.lr=1e-4"]) == 0
    (tmp_path / "printed.yaml").write_text(capfd.readouterr().out)
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
        (["evaluate", "--samples", "0"], "evaluate: argument --samples: 0 is not a whole number of at least 1"),
        (["evaluate", "--temperature", "warm"], "evaluate: argument --temperature: 'warm' is not a number"),
        (["train", "tiny", "--dryrun"], "unknown argument '--dryrun': did you mean --dry-run?"),
        (["trian", "tiny"], "unknown command 'trian': did you mean train?"),
        ([], "the following arguments are required: COMMAND"),
        (["convert", "hf-to-mcor"], "unknown direction 'hf-to-mcor': did you mean hf-to-mcore?"),
        (["train", "--help-keys", "objektive"], "no key is about 'objektive': did you mean objective?"),
        (["init"], "init needs --teacher, --student, --prompts, --gpus"),
        (["init", "--gpus", "none"], "argument --gpus: none is not a whole number"),
        (["plan", "tiny", "--write", "README.md"], "--write README.md exists and is not overwritten"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("megatron-tropd: error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (["train", "tiny"], "student.tensor_model_parallel_size=2"),
        (["evaluate", "tiny", "--model", "teacher"], "teacher.tensor_model_parallel_size=2"),
    ],
)
def test_a_layout_that_the_processes_cannot_hold_is_refused_with_its_key(command, key, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(command) == 2
    assert f"1 process(es) cannot hold {key} x " in capfd.readouterr().err


def test_ranks_refuse_together_and_print_once():
    refused = _call("-m", "megatron_tropd", "train", "tiny", "training.steps=0", launcher=TORCHRUN)
    assert refused.returncode != 0
    assert refused.stderr.count("megatron-tropd: error: training.steps=0") == 1


def test_one_rank_that_fails_ends_the_other():
    """Rank 1 is refused while rank 0 waits for it: the launcher must end both, and rank 1's reason must be shown."""
    script = f"""
if [ "$RANK" = 1 ]; then exec {sys.executable} -m megatron_tropd train tiny training.steps=0; fi
exec {sys.executable} -c 'from megatron_tropd import config, initialize; initialize(config.ModelConfig())'
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
def test_field_cases_b5_every_exception_is_printed_and_ends_with_its_status(kind, status, text, monkeypatch, capfd):
    from megatron_tropd.commands import run as commands

    monkeypatch.setattr(commands, "plan", _raise(kind))
    assert main(["plan"]) == status
    assert text in capfd.readouterr().err
