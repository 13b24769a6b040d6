"""The file of responses: completed to the last one, and never a line of it that is not known to be replaceable."""

import json
import os

import pytest
from support.helpers import run_distributed
from support.tiny_models import write_model

from megatron_tropd.errors import UserError
from megatron_tropd.prompts.responses_file import Origin, finished_ids, prepare_file
from megatron_tropd.system.run_lock import RunLock
from megatron_tropd.types import Prompt, Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models and prompts, with ids and without."""
    folder = tmp_path_factory.mktemp("generation")
    write_model(folder / "model", "llama", seed=1)
    write_model(folder / "other", "llama", seed=2)
    texts = [f"add {i} and {3 * i}" for i in range(5)]
    for name, extra in {"prompts": True, "plain": False, "others": False}.items():
        lines = [({"id": f"p{i}"} if extra else {}) | {"text": name[:1] + text} for i, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def call(arguments):
    """Run the command line; return its status and what it printed to standard error."""
    import contextlib
    import io

    from megatron_tropd.cli import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main(arguments)
    return status, [line for line in errors.getvalue().splitlines() if "error: " in line]


def generate(folder, output, *options, prompts="prompts", model="model"):
    arguments = ["generate", "--hf-path", folder / model, "--prompts", folder / f"{prompts}.jsonl", "--output", output]
    arguments += ["--max-new-tokens", 6, "student.dtype=float32", *options]
    return run_distributed(call, 1, [str(argument) for argument in arguments])[0]


@pytest.fixture(scope="module")
def whole(folder):
    """The lines of a file that one run wrote."""
    output = folder / "whole.jsonl"
    assert generate(folder, output) == (0, [])
    return output.read_text()


def test_each_record_says_what_made_it(whole):
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["id"] for record in records] == [f"p{i}" for i in range(5)]
    digests = [record["digests"] for record in records]
    assert len({d["prompt"] for d in digests}) == 5
    assert len({(d["model"], d["sampling"]) for d in digests}) == 1


def test_a_complete_file_is_not_touched(folder, whole, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text(whole)
    before = output.stat().st_mtime_ns
    assert generate(folder, output) == (0, [])
    assert (output.read_text(), output.stat().st_mtime_ns) == (whole, before)


DAMAGE = {
    "cut_in_a_line": lambda lines: "".join(lines[:3]) + lines[3][:20],
    "cut_in_the_first_characters": lambda lines: "".join(lines[:3]) + lines[3][:3],
    "no_last_newline": lambda lines: "".join(lines[:3]).rstrip("\n"),
    "blank_lines_in_the_middle": lambda lines: "\n".join(lines[:3]),
    "empty": lambda lines: "",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_field_cases_a9_a_killed_run_is_completed_without_loss(name, folder, whole, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text(DAMAGE[name](whole.splitlines(keepends=True)))
    assert generate(folder, output) == (0, [])
    assert [line for line in output.read_text().splitlines() if line] == whole.splitlines()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl"]


FOREIGN = {
    "text": "my notes\nmy other notes\n",
    "one_line_without_end": "my notes",
    "json": '{\n "a": 1\n}\n',
    "other_records": '{"id": "p0", "text": "a prompt"}\n',
    "latin_1": "caf\xe9\n".encode("latin-1"),
    "numbers": "1\n2\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_field_cases_a9_a_file_of_another_kind_is_left_as_it_is(name, folder, tmp_path):
    output = tmp_path / "notes.txt"
    content = FOREIGN[name] if isinstance(FOREIGN[name], bytes) else FOREIGN[name].encode()
    output.write_bytes(content)
    status, errors = generate(folder, output)
    assert status == 2
    assert len(errors) == 1
    assert str(output) in errors[0]
    assert "left as it is" in errors[0]
    assert output.read_bytes() == content


def test_field_cases_a9_a_damaged_line_in_the_middle_is_named_and_nothing_is_lost(folder, whole, tmp_path):
    lines = whole.splitlines(keepends=True)
    output = tmp_path / "out.jsonl"
    output.write_text("".join([lines[0], lines[1][:30] + "\n", *lines[2:4]]))
    before = output.read_text()
    status, errors = generate(folder, output)
    assert status == 2
    assert "line 2" in errors[0]
    assert output.read_text() == before


def test_field_cases_a9_other_outputs_refuse_files_of_another_kind(folder, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine\n")
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"text": "1 + 1", "answer": "2"}\n')
    model = ["--hf-path", str(folder / "model"), "student.dtype=float32", "rollout.max_new_tokens=6"]
    for arguments in (
        ["evaluate", *model, "--problems", str(problems), "--output", str(notes)],
        ["generate", *model, "--prompts", str(problems), "--output", str(tmp_path)],
        ["doctor", "--json", str(notes)],
        ["doctor", "--calibrate", str(notes)],
    ):
        status, errors = run_distributed(call, 1, arguments)[0]
        assert status == 2
        assert str(arguments[-1]) in errors[0]
    assert notes.read_text() == "mine\n"


OTHERWISE = {  # options -> what the message must name
    "model": ({"model": "other"}, "another model"),
    "prompts": ({"prompts": "edited"}, "other prompts under the same ids"),
    "temperature": (["--temperature", "0"], "other sampling"),
    "length": (["--max-new-tokens", "7"], "other sampling"),
    "samples": (["--samples", "2"], "other sampling"),
    "seed": (["training.seed=9"], "other sampling"),
    "stop": (["rollout.stop=[x]"], "other sampling"),
    "top_k": (["rollout.top_k=3"], "other sampling"),
    "field": (["--field", "teacher_response"], "has no 'teacher_response'"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_field_cases_a10_responses_of_other_making_are_refused_by_what_differs(name, folder, whole, tmp_path):
    text = (folder / "prompts.jsonl").read_text()
    (folder / "edited.jsonl").write_text(text.replace("add 2", "sub 2"))
    options, named = OTHERWISE[name]
    output = tmp_path / "out.jsonl"
    output.write_text("".join(whole.splitlines(keepends=True)[:3]))
    before = output.read_bytes()
    keywords = options if isinstance(options, dict) else {}
    status, errors = generate(folder, output, *([] if keywords else options), **keywords)
    assert status == 2
    assert named in errors[0]
    assert output.read_bytes() == before


def test_field_cases_a10_two_files_without_ids_do_not_share_an_output(folder, tmp_path):
    output = tmp_path / "out.jsonl"
    assert generate(folder, output, prompts="plain") == (0, [])
    before = output.read_bytes()
    status, errors = generate(folder, output, prompts="others")
    assert (status, output.read_bytes()) == (2, before)
    assert "other prompts under the same ids" in errors[0]


def test_more_prompts_complete_the_same_file(folder, whole, tmp_path):
    output = tmp_path / "out.jsonl"
    assert generate(folder, output, "--limit", "2") == (0, [])
    assert generate(folder, output) == (0, [])
    assert output.read_text() == whole


def old_record(name, **values):
    return {"id": name, "sample": 0, "response": "r", "finish_reason": "eos", "length": 1, **values}


def test_records_of_earlier_versions_are_kept_where_their_ids_leave_no_doubt(tmp_path, caplog):
    output = tmp_path / "out.jsonl"
    origin = Origin("model", Sampling())
    output.write_text(json.dumps(old_record("p0")) + "\n")
    before = output.read_text()
    assert prepare_file(output, [Prompt("p0", text="a"), Prompt("p1", text="b")], origin, "response") == {"p0"}
    assert "without digests" in caplog.text
    assert output.read_text() == before
    with pytest.raises(UserError, match="does not|do not record their prompts"):
        prepare_file(output, [Prompt("q0", text="a")], origin, "response")
    output.write_text(json.dumps(old_record("1")) + "\n")
    with pytest.raises(UserError, match="line numbers fit any file"):
        prepare_file(output, [Prompt("1", text="a")], origin, "response")


def test_prompts_with_part_of_their_responses_are_written_again(tmp_path):
    output = tmp_path / "out.jsonl"
    origin = Origin("model", Sampling(samples_per_prompt=2))
    prompts = [Prompt("p0", text="a"), Prompt("p1", text="b")]
    first = [old_record("p0", sample=i, digests=origin.digests(prompts[0])) for i in range(2)]
    second = old_record("p1", digests=origin.digests(prompts[1]))
    lines = [json.dumps(record) + "\n" for record in [*first, second]]
    output.write_text("".join(lines))
    assert finished_ids(output, prompts, origin, "response") == {"p0"}
    assert output.read_text() == "".join(lines)
    assert prepare_file(output, prompts, origin, "response") == {"p0"}
    assert output.read_text() == "".join(lines[:2])
    assert finished_ids(output, prompts[:1], origin, "response") == {"p0"}
    output.write_text("".join(lines) + lines[0])
    with pytest.raises(UserError, match="more than 2 responses"):
        prepare_file(output, prompts, origin, "response")


def test_a_link_is_followed_and_a_device_is_left_alone(tmp_path):
    origin, prompts = Origin("model", Sampling()), [Prompt("p0", text="a")]
    target = tmp_path / "target.jsonl"
    record = json.dumps(old_record("p0", digests=origin.digests(prompts[0])))
    target.write_text(record + '\n{"id": ')
    (tmp_path / "link.jsonl").symlink_to(target)
    prepare_file(tmp_path / "link.jsonl", prompts, origin, "response")
    assert (tmp_path / "link.jsonl").is_symlink()
    assert target.read_text() == record + "\n"
    with pytest.raises(UserError, match="not a regular file"):
        prepare_file("/dev/null", prompts, origin, "response")


def test_field_cases_a9_two_commands_do_not_write_to_one_output(folder, whole, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("".join(whole.splitlines(keepends=True)[:2]))
    before = output.read_text()
    with RunLock() as lock:
        lock.take_file(output)
        status, errors = generate(folder, output)
        assert status == 2
        assert f"another command is writing to {output} (process {os.getpid()}" in errors[0]
        assert output.read_text() == before
    assert generate(folder, output) == (0, [])
    assert output.read_text() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_field_cases_a9_an_output_below_a_file_is_refused(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine\n")
    status, errors = generate(folder, tmp_path / "notes.txt" / "out.jsonl")
    assert status == 2
    assert f"{tmp_path / 'notes.txt'} is no folder" in errors[0]
