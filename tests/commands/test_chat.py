"""`megatron-tropd chat`: its replies are those of `generate`, on any layout, with history, and appear while drawn."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.helpers import PATIENCE, run_distributed
from support.tiny_models import write_model
from support.train_runs import overrides_of, train_rank

from megatron_tropd.cli import main

ROOT = Path(__file__).parents[2]
GREEDY = ["--temperature", "0", "--max-new-tokens", "12", "student.dtype=float32"]
LINES = ["add 1 and 3", "and 5?", "", "/reset", "add 1 and 3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("chat") / "model", "llama", seed=3)


@pytest.fixture(scope="module")
def run(material, tmp_path_factory):
    """A run on one process with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "run"
    extra = ["training.steps=2", "checkpoint.save_interval=1", "checkpoint.keep=2"]
    run_distributed(train_rank, 1, overrides_of(material, folder, *extra))
    return folder


def talk_rank(arguments, text):
    """Run the command with piped lines; return status, standard output and standard error."""
    sys.stdin, output, errors = io.StringIO(text), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main([str(word) for word in arguments])
    return status, output.getvalue(), errors.getvalue()


def talk(arguments, lines, world_size=1):
    return run_distributed(talk_rank, world_size, ["chat", *arguments], "".join(f"{line}\n" for line in lines))


def generate_rank(arguments):
    return main([str(word) for word in arguments])


def generated(model, rows, folder, *options):
    """The texts that `generate` writes to rows of prompts."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["generate", "--hf-path", model, "--prompts", folder / "prompts.jsonl", "--output", folder / "out.jsonl"]
    assert run_distributed(generate_rank, 1, [*words, *GREEDY, *options]) == [0]
    return [json.loads(line)["response"] for line in (folder / "out.jsonl").read_text().splitlines()]


def user(text):
    return {"role": "user", "content": text}


def test_replies_are_those_of_generate_with_history_until_reset(model, tmp_path):
    ((status, output, errors),) = talk([model, *GREEDY], LINES)
    assert status == 0
    (first,) = generated(model, [{"messages": [user(LINES[0])]}], tmp_path / "first")
    assert talk([model, *GREEDY, "--system", "sums"], LINES[:1])[0][1] == "\n".join(
        [*generated(model, [{"messages": [{"role": "system", "content": "sums"}, user(LINES[0])]}], tmp_path / "s"), ""]
    )
    history = [user(LINES[0]), {"role": "assistant", "content": first}, user(LINES[1])]
    (second,) = generated(model, [{"messages": history}], tmp_path / "second")
    assert output == f"{first}\n{second}\n{first}\n"
    assert first != second
    assert errors.count(" tokens/s, ") == 3
    assert "a new conversation" in errors


def test_two_ranks_say_the_same_and_only_the_first_prints(model):
    ((_, alone, _),) = talk([model, *GREEDY], LINES[:2])
    layout = "student.tensor_model_parallel_size=2"
    (status, output, _), (other_status, silent, _) = talk([model, layout, *GREEDY], LINES[:2], world_size=2)
    assert (status, other_status) == (0, 0)
    assert output == alone
    assert silent == ""


def test_a_run_gives_its_newest_checkpoint_and_any_other_by_its_step(run):
    first, second = (talk([run, "--step", step, *GREEDY], LINES[:1])[0] for step in (1, 2))
    ((status, output, errors),) = talk(
        [run, *GREEDY], [LINES[0], "/reset", "/step 1", LINES[0], "/step 9", "/quit", "x"]
    )
    assert status == 0
    assert output == second[1] + first[1]
    assert first[1] != second[1]
    assert "step_000002/model: /reset, /step N, /quit" in errors
    assert f"/step 9: {run / 'checkpoints'} has no such checkpoint; its steps are 1, 2." in errors
    for checkpoint in ("step_000001", "step_000001/model"):
        assert talk([run / "checkpoints" / checkpoint, *GREEDY], LINES[:1])[0][:2] == (0, first[1])


def test_a_seed_decides_the_replies(model):
    def said(seed):
        return talk([model, *GREEDY[2:], "--temperature", "1", "--seed", seed], LINES[:2])[0][1]

    assert said(1) == said(1)
    assert said(1) != said(2)


def test_a_full_context_is_one_line_and_the_conversation_goes_on(model):
    lines = ["x" * 235, "y" * 30, "/reset", "z" * 400, "add 1 and 3"]
    ((status, output, errors),) = talk([model, "--temperature", "0", "student.dtype=float32"], lines)
    assert status == 0
    full = [line for line in errors.splitlines() if line.startswith("the context of 256 tokens is full")]
    assert [line.rsplit("; ")[1] for line in full] == ["/reset starts a new conversation.", "write a shorter message."]
    assert len(errors.splitlines()) - len(full) >= 4
    assert ", the context is full: /reset" in errors
    assert output.endswith("\n")


def test_without_a_template_messages_are_plain_text(tmp_path):
    folder = write_model(tmp_path / "plain", "llama", seed=3)
    for file in (tmp_path / "plain").glob("chat_template*"):
        file.unlink()
    config = tmp_path / "plain" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"}))
    ((status, output, errors),) = talk([folder, *GREEDY, "--system", "sums"], LINES[:2])
    assert status == 0
    assert errors.count("has no chat template") == 1
    (first,) = generated(folder, [{"text": f"sums\n{LINES[0]}\n"}], tmp_path / "first")
    (second,) = generated(folder, [{"text": f"sums\n{LINES[0]}\n{first}\n{LINES[1]}\n"}], tmp_path / "second")
    assert output == f"{first}\n{second}\n"


def test_a_template_that_takes_no_system_message_is_refused_before_weights_are_read(tmp_path):
    folder = write_model(tmp_path / "model", "llama", seed=3)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    refusing += "{{ messages[-1].content }}{% if add_generation_prompt %}:{% endif %}"
    (tmp_path / "chat.jinja").write_text(refusing)
    words = [folder, f"tokenizer.chat_template={tmp_path / 'chat.jinja'}", "--system", "sums", *GREEDY]
    ((status, output, errors),) = talk(words, LINES[:1])
    assert (status, output) == (2, "")
    (line,) = [line for line in errors.splitlines() if "error: " in line]
    assert "no system" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "chat needs a model: give a run's folder"),
        (["nowhere"], "chat: nowhere: no such folder"),
        (["{empty}"], "{empty} is none; give a run's folder"),
        (["{run}", "--step", "7"], "--step 7: {run}/checkpoints has no such checkpoint; its steps are 1, 2."),
        (["{model}", "--step", "7"], "--step 7 picks a checkpoint of a run, and {model} is none"),
        (["{run}", "--step", "one"], "chat: argument --step: one is not a whole number of at least 0"),
        (["{run}", "student.tensor_model_parallel_size=2"], "1 process(es) cannot hold"),
        (["{run}", "student.dtyp=float32"], "student.dtyp"),
    ],
)
def test_mistakes_are_one_line(words, message, run, model, tmp_path, capfd):
    places = {"run": run, "model": model, "empty": tmp_path}
    assert main(["chat", *(word.format(**places) for word in words)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("megatron-tropd: error: ")
    assert message.format(**places) in line


def test_ctrl_c_ends_with_status_0(model):
    command = [sys.executable, "-m", "megatron_tropd", "chat", model, *GREEDY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
    process.stdin.write("naïve 好?\n")
    process.stdin.flush()
    while " tokens/s, " not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.2)  # it waits for the next line
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert output.count("\n") >= 1
    assert "Traceback" not in errors
    assert "Stack" not in errors
