"""The user's own line, rehearsed: every way to start it, killed and continued, and started once more when whole."""

import json
import os
import py_compile
import re
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from support.helpers import PATIENCE
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_tropd.recipe import load_recipe
from megatron_tropd.validation import validate

ROOT = Path(__file__).parents[2]
SCRIPT = "examples/distill_70b_to_8b.sh"
STAGES = 6
BIN = Path(sys.executable).parent
STARTS = {
    "bash": ["bash", SCRIPT],
    "torchrun": ["torchrun", "--nproc-per-node", "2", SCRIPT],
    "torchrun --no-python": ["torchrun", "--nproc-per-node", "2", "--no-python", SCRIPT],
}


def _environment(run, **variables):
    """This test's own Python environment, active, and a free port for torchrun."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mine = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if name not in mine}
    return inherited | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        "PET_MASTER_PORT": str(port),
        "RUN": str(run),
        **variables,
    }


def _start(form, run):
    log = open(f"{run}.log", "a+")  # noqa: SIM115
    command, environment = STARTS[form], _environment(run, REHEARSAL="1")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    return process, log


def _finish(form, run):
    """Start it, wait for its end, and return what it printed."""
    process, log = _start(form, run)
    place = log.tell()
    try:
        status = process.wait(timeout=PATIENCE)
    finally:
        _kill(process)
    log.seek(place)
    text = log.read()
    assert status == 0, text[-6000:]
    return text


def _kill(process):
    """SIGKILL to a process and to all that it started, which no handler sees."""
    try:
        family = [psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    family += family[0].children(recursive=True)
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def _wait_for(file, process, seconds=PATIENCE):
    start = time.monotonic()
    while not file.exists():
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() - start < seconds, f"{file} was not written"
        time.sleep(0.05)


def _check_outputs(run):
    """Every stage's output is whole, and the student is another than before."""
    for model in ("teacher", "student"):
        assert (run / model / "complete.json").exists()
    answered = [json.loads(line)["id"] for line in (run / "responses.jsonl").read_text().split("\n") if line]
    prompts = [json.loads(line)["id"] for line in (run / "inputs/prompts.jsonl").read_text().splitlines()]
    assert sorted(answered) == sorted(prompts)
    summary = json.loads((run / "train/summary.json").read_text())
    assert summary["finished"]
    assert summary["steps"] == 2
    assert len((run / "train/metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((run / "evaluation_step_2.json").read_text())["total"] == 4
    assert (run / "train/report.html").exists()

    export = run / "student_hf_step_2"
    trained, before = (AutoModelForCausalLM.from_pretrained(p, dtype="auto") for p in (export, run / "inputs/student"))
    assert trained.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.eos_token == "<|eot_id|>"  # the teacher's: it writes turns of a chat now
    ends = json.loads((export / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(ends) == sorted(tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"]))  # both models'
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 2?"}], tokenize=False)
    ids = tokenizer(ids, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        assert trained(ids).logits.isfinite().all()
    changed = [not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2


def test_one_file_for_bash_and_python(tmp_path):
    subprocess.run(["bash", "-n", SCRIPT], cwd=ROOT, check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        py_compile.compile(str(ROOT / SCRIPT), cfile=str(tmp_path / "compiled"), doraise=True)


def test_recipe_is_the_papers_in_another_layout():
    models = ["student.checkpoint=s", "teacher.checkpoint=t", "data.prompts=p"]
    recipe, paper = load_recipe("llama_70b_to_8b", models), load_recipe("tropd_paper", models)
    validate(recipe)
    assert (recipe.objective, recipe.guidance, recipe.training) == (paper.objective, paper.guidance, paper.training)
    assert recipe.student.tensor_model_parallel_size == recipe.teacher.tensor_model_parallel_size == 8


@pytest.mark.parametrize("interpreter", ["bash", sys.executable])
def test_missing_inputs_are_named_before_anything_runs(tmp_path, interpreter):
    (tmp_path / "prompts.jsonl").write_text('{"text": "Hello"}\n')
    given = {"TEACHER": str(tmp_path / "nowhere"), "PROMPTS": str(tmp_path / "prompts.jsonl"), "REHEARSAL": "0"}
    environment = _environment(tmp_path / "run", **given)
    for name in ("STUDENT", "PROBLEMS"):
        environment.pop(name, None)
    done = subprocess.run(
        [interpreter, SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2, done.stderr
    assert re.search(r"TEACHER=\S*nowhere is no .* download meta-llama/Llama-3.1-70B-Instruct", done.stderr)
    assert "STUDENT= " in done.stderr
    assert "PROBLEMS= " in done.stderr
    assert "PROMPTS=" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_from_bash_and_once_more(tmp_path):
    run = tmp_path / "run"
    assert "skipped" not in _finish("bash", run)
    _check_outputs(run)
    files = [f for f in run.rglob("*") if f.is_file() and "inputs" not in f.parts]
    kept = [f for f in files if f.name != "report.html" and f.parent.name != "student_hf_step_2"]
    before = {f: f.stat().st_mtime_ns for f in kept}
    assert _finish("bash", run).count("complete, skipped") == STAGES
    assert {f: f.stat().st_mtime_ns for f in kept} == before


@pytest.mark.full
def test_from_torchrun_killed_and_continued(tmp_path):
    """torchrun hands the file to Python; what it leaves when killed is completed under torchrun --no-python."""
    run = tmp_path / "run"
    process, _ = _start("torchrun", run)
    try:
        _wait_for(run / "responses.jsonl", process)
    finally:
        _kill(process)
    assert not (run / "train/summary.json").exists()
    skipped = _finish("torchrun --no-python", run).count("complete, skipped")
    assert skipped in (2, 3)  # the kill may have come between the responses' lines
    _check_outputs(run)
