"""What a run says of itself: a block at its start, a table at its end, and commands that can be typed."""

import json
import shlex
import signal
import subprocess
import sys

from support.helpers import PATIENCE
from support.report_runs import write_material
from support.train_runs import overrides_of

from megatron_tropd.cli import build_parser
from megatron_tropd.recipe import load_recipe
from megatron_tropd.training.run_text import end_text

LAYOUT = [("student", "tensor", 1), ("student", "pipeline", 2), ("teacher", "tensor", 1)]
SUMMARY = {
    "steps": 20,
    "finished": True,
    "checkpoint": "runs/x/checkpoints/step_000020",
    "evaluations": [
        {"step": 0, "accuracy": 0.316, "accuracy_low": 0.26, "accuracy_high": 0.37},
        {"step": 10, "accuracy": 0.7, "held_out_kl": 0.5},
        {"step": 20, "accuracy": 0.66, "accuracy_low": 0.6, "accuracy_high": 0.72, "held_out_kl": 0.25},
    ],
}


def test_the_table_has_first_best_and_last_with_the_interval():
    lines = end_text(load_recipe("tiny"), SUMMARY, ["x", "train", "tiny"]).splitlines()
    assert lines[1].split() == ["before", "best", "after", "95%", "interval"]
    assert lines[2].split() == ["accuracy", "31.6%", "70.0%", "66.0%", "60.0%", "to", "72.0%"]
    assert lines[3].split() == ["held-out", "KL", "0.5", "0.25", "0.25"]


def test_the_commands_parse_and_an_unfinished_run_is_continued_as_it_was_started(monkeypatch):
    for name, value in {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    recipe = load_recipe("tiny", ["evaluation.problems=null", "evaluation.interval=0"])
    started = ["/some/__main__.py", "train", "tiny", "logging.dir=runs/a b"]
    for finished in (True, False):
        text = end_text(recipe, {**SUMMARY, "finished": finished, "evaluations": []}, started)
        commands = [line.split("  #")[0].strip() for line in text.splitlines() if line.startswith("  ")]
        assert len(commands) == 3
        for command in commands:
            words = shlex.split(command)
            build_parser().parse_args(words[words.index("megatron_tropd") + 1 if "-m" in words else 1 :])
    assert commands[0] == ("torchrun --nnodes 2 --nproc-per-node 8 -m megatron_tropd train tiny 'logging.dir=runs/a b'")


def test_with_pipeline_stages_the_reporting_rank_introduces_the_run(tmp_path):
    material = write_material(tmp_path / "material")
    stages = [f"{role}.{key}_model_parallel_size={n}" for role, key, n in LAYOUT]
    overrides = [*overrides_of(material, tmp_path / "run", *stages), "training.steps=1", "evaluation.interval=0"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megatron_tropd"]
    command = [*launch, "train", "tiny", *overrides, "evaluation.problems=null", "training.lr_warmup_steps=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\nstudent   ") == 1
    assert "TP=1 PP=2" in done.stderr


def test_a_run_introduces_itself_and_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    material, run = write_material(tmp_path / "material"), tmp_path / "run"
    problems = [f"evaluation.problems={material / 'prompts.jsonl'}", "logging.progress_interval=0"]
    layout = [f"{role}.tensor_model_parallel_size=1" for role in ("student", "teacher")]
    overrides = [*overrides_of(material, run, *problems, *layout), "training.steps=500"]
    command = [sys.executable, "-m", "megatron_tropd", "train", "tiny", *overrides]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as training:
        shown = ""
        for line in training.stderr:
            shown += line
            if line.startswith("step 2/"):
                training.send_signal(signal.SIGINT)
        printed, status = training.stdout.read(), training.wait(PATIENCE)
    assert status == 0, shown
    for name in ("student ", "teacher ", "method ", "prompts ", "measured ", "memory ", "steps ", "output "):
        assert f"\n{name}" in shown, shown
    assert "TP=1 PP=1" in shown
    assert "GB planned for tensors per process" in shown
    assert shown.index("\noutput ") < shown.index("evaluation after 0 steps: ") < shown.index("step 1/")
    assert "Ctrl-C: saves a checkpoint after this step, and ends; Ctrl-C again ends at once" in shown
    steps = json.loads((run / "summary.json").read_text())["steps"]
    assert 2 <= steps < 500
    assert f"Ctrl-C: saved after step {steps}" in shown
    assert (run / "checkpoints" / f"step_{steps:06d}").is_dir()
    assert f"megatron-tropd train tiny {shlex.join(overrides)}  # goes on after step {steps}" in printed
