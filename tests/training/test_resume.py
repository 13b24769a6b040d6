"""A run that is started again: the new recipe applies or is refused by key, and messages are true."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from support.helpers import run_distributed
from support.single_runs import refused, run, snapshot
from support.tiny_models import write_model
from support.train_runs import assert_same, overrides_of, records, train_rank

from megatron_tropd.system.run_lock import RunLock

COSINE = ("training.lr_schedule=cosine", "training.lr_warmup_steps=1")


def read_groups(folder: Path, step: int) -> list[dict]:
    """Return the optimizer's groups of parameters of a checkpoint: the settings that its last update had."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    state = load_common_state_dict(str(folder / "checkpoints" / f"step_{step:06d}" / "optimizer"))
    return state["optimizer"].get("optimizer", state["optimizer"])["param_groups"]


OPTIMIZERS = {
    "adam_distributed": [],
    "adam_plain": ["training.use_distributed_optimizer=false"],
    "adam_plain_bfloat16": ["training.use_distributed_optimizer=false", "student.dtype=bfloat16"],
    "sgd_plain": ["training.optimizer=sgd", "training.use_distributed_optimizer=false"],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_field_cases_a7_the_schedules_extend_as_if_planned_so(name, material, tmp_path):
    options = [*COSINE, *OPTIMIZERS[name]]
    run(material, tmp_path / "planned", *options, "training.steps=8")
    run(material, tmp_path / "run", *options, "training.steps=4")
    assert run(material, tmp_path / "run", *options, "training.steps=8")["steps"] == 8
    ours, planned = records(tmp_path / "run"), records(tmp_path / "planned")
    for key in ("learning_rate", "prefix_fraction"):
        assert [r[key] for r in ours[4:]] == pytest.approx([r[key] for r in planned[4:]])
        assert [r[key] for r in ours[:4]] != pytest.approx([r[key] for r in planned[:4]])
    assert min(r["learning_rate"] for r in ours[4:7]) > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_field_cases_a7_the_new_recipe_is_in_force(name, material, tmp_path):
    options = [*OPTIMIZERS[name], "training.steps=6"]
    run(material, tmp_path / "run", *options, *COSINE, "training.exit_step=2")
    new = ["training.lr=2e-3", "training.weight_decay=0.25", "training.adam_beta1=0.5", "training.adam_eps=1e-6"]
    new += ["training.lr_schedule=linear", "training.min_lr=1e-4", "training.adam_beta2=0.9", "training.clip_grad=0.3"]
    run(material, tmp_path / "run", *options, *new)
    run(material, tmp_path / "planned", *options, *new)
    ours, planned = records(tmp_path / "run"), records(tmp_path / "planned")
    assert [r["learning_rate"] for r in ours[2:]] == pytest.approx([r["learning_rate"] for r in planned[2:]])
    ours, planned = read_groups(tmp_path / "run", 6), read_groups(tmp_path / "planned", 6)
    for mine, other in zip(ours, planned, strict=True):
        settings = mine.keys() - {"params", "step"}
        assert {key: mine[key] for key in settings} == {key: other[key] for key in settings}
    assert {group["weight_decay"] for group in ours} == {0.0, 0.25}
    if "sgd" not in name:
        assert {(tuple(group["betas"]), group["eps"]) for group in ours} == {((0.5, 0.9), 1e-6)}


def test_field_cases_a7_the_new_optimizer_settings_change_the_updates(material, tmp_path):
    """Only with the new weight decay and betas do the weights become what they become."""
    changed = {"same": [], "decay": ["training.weight_decay=5"], "beta": ["training.adam_beta1=0.1"]}
    for name, options in changed.items():
        run(material, tmp_path / name, "training.exit_step=2")
        run(material, tmp_path / name, *options)
    losses = {name: records(tmp_path / name)[-1]["loss"] for name in changed}
    assert len(set(losses.values())) == 3


def test_field_cases_a7_what_differs_is_said_once_and_kept_in_the_history(material, tmp_path):
    run(material, tmp_path, "training.exit_step=2", "checkpoint.keep=0")
    before = (tmp_path / "recipe.yaml").read_bytes()
    run(
        material,
        tmp_path,
        "checkpoint.keep=0",
        "training.exit_step=3",
        "objective.name=tropd_mask",
        "logging.samples=0",
    )
    run(material, tmp_path, "checkpoint.keep=0", "objective.name=tropd_mask", "logging.samples=0")
    history = [json.loads(line) for line in (tmp_path / "recipes.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["changes"]) for entry in history] == [
        (0, []),
        (2, ["objective.name: tropd -> tropd_mask", "training.exit_step: 2 -> 3", "logging.samples: 2 -> 0"]),
    ]
    assert [entry["recipe"]["objective.name"] for entry in history] == ["tropd", "tropd_mask"]
    assert (tmp_path / "checkpoints" / "step_000002" / "recipe.yaml").read_bytes() == before
    for path in (tmp_path / "recipe.yaml", tmp_path / "checkpoints" / "step_000004" / "recipe.yaml"):
        assert yaml.safe_load(path.read_text())["objective"]["name"] == "tropd_mask"


REFUSED = {  # options -> what the message must name
    "training.optimizer=sgd training.use_distributed_optimizer=false": "training.optimizer: adam -> sgd",
    "training.use_distributed_optimizer=false": "training.use_distributed_optimizer: true -> false",
    "student.dtype=bfloat16": "student.dtype: float32 -> bfloat16",
    "data.seed=7": "data.seed: 0 -> 7",
    "data.shuffle=false": "data.shuffle: true -> false",
    "student.hf_path={folder}/larger": "hidden_size is 64 and was 32",
    "student.hf_path={folder}/other": "student.hf_path: ",
    "tokenizer.chat_template={folder}/template.jinja": "tokenizer.chat_template: null -> ",
    "data.prompts={folder}/edited.jsonl": "data.prompts",
}


@pytest.fixture(scope="module")
def halfway(material, tmp_path_factory):
    """A run after two of four steps, and other files beside it."""
    folder = tmp_path_factory.mktemp("halfway")
    run(material, folder / "run", "training.exit_step=2")
    write_model(folder / "larger", "llama_tied", seed=1, hidden_size=64)
    write_model(folder / "other", "llama_tied", seed=7)
    (folder / "template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    lines = [json.loads(line) for line in (material / "prompts.jsonl").read_text().splitlines()]
    lines = [{**line, "id": f"q{i}"} for i, line in enumerate(lines)]
    (folder / "edited.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("options", REFUSED, ids=lambda o: o.split("=")[0])
def test_field_cases_b5_what_cannot_change_is_refused_by_key_and_nothing_is_touched(options, halfway, material):
    before = snapshot(halfway / "run")
    message = refused(material, halfway / "run", *options.replace("{folder}", str(halfway)).split())
    assert REFUSED[options] in message
    assert "logging.dir" in message or "checkpoint.dir" in message  # the remedy
    assert snapshot(halfway / "run") == before


def test_what_does_not_matter_changes_no_number(halfway, material, tmp_path):
    shutil.copytree(halfway / "run", tmp_path / "run")
    shutil.copytree(material / "student", tmp_path / "moved")
    run(material, tmp_path / "whole")
    options = ["training.micro_batch_size=4", "logging.samples=0", "checkpoint.save_interval=1", "checkpoint.keep=1"]
    options += ["training.timeout_minutes=9", "rollout.max_batch_size=4", f"student.hf_path={tmp_path / 'moved'}"]
    run(material, tmp_path / "run", *options)
    assert_same(records(tmp_path / "run"), records(tmp_path / "whole"), tolerance=2e-4)


def test_field_cases_a8_a_finished_run_has_nothing_to_do_and_builds_no_model(material, tmp_path):
    run(material, tmp_path / "run", "training.steps=1")
    before = snapshot(tmp_path / "run")
    (material / "student" / "model.safetensors").rename(tmp_path / "weights")  # cannot be read: need not be, either
    try:
        summary = run(material, tmp_path / "run", "training.steps=1", "training.micro_batch_size=4")
    finally:
        (tmp_path / "weights").rename(material / "student" / "model.safetensors")
    assert summary["nothing_to_do"]
    assert summary["finished"]
    assert snapshot(tmp_path / "run") == before


FINISHED = {
    "objective.name=opd": "objective.name: tropd -> opd",
    "training.lr=1e-3": "training.lr: 0.01 -> 0.001",
    "student.hf_path={folder}/student": "student.hf_path: ",
    "teacher.hf_path={folder}/teacher": "teacher.hf_path: ",
    "data.prompts={folder}/prompts.jsonl": "data.prompts: ",
    "evaluation.problems={folder}/prompts.jsonl": "evaluation.problems: null -> ",
    "training.seed=99": "training.seed: 1234 -> 99",
}


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """A finished run, and the same material with one thing changed in each."""
    folder = tmp_path_factory.mktemp("finished")
    run(material, folder / "run", "training.steps=1")
    write_model(folder / "student", "llama_tied", seed=7)
    write_model(folder / "teacher", "llama", seed=8, hidden_size=64)
    text = (material / "prompts.jsonl").read_text()
    (folder / "prompts.jsonl").write_text(text.replace("add 3 and", "sub 3 and"))
    return folder


@pytest.mark.parametrize("options", FINISHED, ids=lambda o: o.split("=")[0])
def test_field_cases_a8_a_finished_run_with_other_settings_is_refused(options, finished, material):
    before = snapshot(finished / "run")
    message = refused(material, finished / "run", "training.steps=1", options.replace("{folder}", str(finished)))
    assert FINISHED[options] in message
    assert "nothing was trained" in message
    assert snapshot(finished / "run") == before


def test_field_cases_a8_other_contents_under_the_same_path_are_seen(material, tmp_path):
    shutil.copytree(material, tmp_path / "material")
    run(tmp_path / "material", tmp_path / "run", "training.steps=1")
    write_model(tmp_path / "material" / "teacher", "llama", seed=9, hidden_size=64)
    message = refused(tmp_path / "material", tmp_path / "run", "training.steps=1")
    assert f"teacher.hf_path: other contents in {tmp_path / 'material' / 'teacher'}" in message


def test_a_new_start_in_the_same_folder_sets_the_old_checkpoints_aside(material, tmp_path):
    """Else those of higher steps would be taken for its own when it is killed and resumed."""
    run(material, tmp_path, "training.steps=3", "checkpoint.save_interval=1")
    run(material, tmp_path, "training.steps=2", "training.lr=1e-3", "checkpoint.resume=false")
    checkpoints = tmp_path / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["earlier_1", "step_000002"]
    assert sorted(p.name for p in (checkpoints / "earlier_1").iterdir()) == ["step_000002", "step_000003"]
    assert run(material, tmp_path, "training.steps=2", "training.lr=1e-3")["nothing_to_do"]


def test_where_no_checkpoint_is_whole_the_run_does_not_begin_anew_by_itself(material, tmp_path):
    run(material, tmp_path, "training.exit_step=2")
    (tmp_path / "checkpoints" / "step_000002" / "state.json").unlink()
    before = snapshot(tmp_path)
    assert "none of the 1 checkpoints" in refused(material, tmp_path)
    assert snapshot(tmp_path) == before


def test_keep_counts_no_later_checkpoint_that_is_damaged(material, tmp_path):
    run(material, tmp_path, "checkpoint.save_interval=1", "checkpoint.keep=0")
    for step in (3, 4):
        (tmp_path / "checkpoints" / f"step_00000{step}" / "state.json").unlink()
    run(material, tmp_path, "checkpoint.save_interval=1", "checkpoint.keep=1", "training.exit_step=3")
    assert (tmp_path / "checkpoints" / "step_000003" / "complete.json").exists()


FOREIGN = {
    "recipe.yaml": "# mine\nbase: tiny\ntraining: {steps: 4}\n",
    "summary.json": '{"my": "notes"}\n',
    "metrics.jsonl": "my metrics\n",
    "samples.jsonl": '{"text": "mine"}\n',
    "evaluations.jsonl": "[1, 2]\n",
    "answers.jsonl": '{"answer": "mine"}\n',
    "run.json": '{"run": "mine"}\n',
    "checkpoints/step_000100/pytorch_model.bin": "weights",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_field_cases_a9_a_folder_with_other_files_is_left_as_it_is(name, material, tmp_path):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text(FOREIGN[name])
    message = refused(material, tmp_path / "run", "checkpoint.keep=1", "training.steps=1")
    assert str(path if path.suffix != ".bin" else path.parent) in message
    assert snapshot(tmp_path / "run") == {name: FOREIGN[name].encode()}


def test_field_cases_a8_a_finished_run_with_a_teacher_apart_ends_on_all_ranks(material, tmp_path):
    options = overrides_of(material, tmp_path, "training.steps=1", "teacher.ranks=dedicated")
    run_distributed(train_rank, 2, options)
    before = snapshot(tmp_path)
    summaries = run_distributed(train_rank, 2, options)
    assert all(summary["nothing_to_do"] for summary in summaries)
    assert snapshot(tmp_path) == before


def test_field_cases_a8_edited_files_behind_a_pattern_or_in_a_list_are_seen(material, tmp_path):
    (tmp_path / "data").mkdir()
    text = (material / "prompts.jsonl").read_text()
    (tmp_path / "data" / "a.jsonl").write_text(text)
    named = {"pattern": f"data.prompts={tmp_path}/data/*.jsonl", "list": f"data.prompts=[{tmp_path}/data/*.jsonl]"}
    for name, prompts in named.items():
        (tmp_path / "data" / "a.jsonl").write_text(text)
        run(material, tmp_path / name, prompts, "training.steps=1")
        assert run(material, tmp_path / name, prompts, "training.steps=1")["nothing_to_do"]
        (tmp_path / "data" / "a.jsonl").write_text(text.replace("add 3 and", "sub 3 and"))
        message = refused(material, tmp_path / name, prompts, "training.steps=1")
        assert "data.prompts: other contents in" in message


def test_field_cases_a7_other_guidance_behind_a_pattern_is_said(material, tmp_path):
    (tmp_path / "data").mkdir()
    text = (material / "prompts.jsonl").read_text()
    (tmp_path / "data" / "a.jsonl").write_text(text)
    guidance = f"guidance.responses={tmp_path}/data/*.jsonl"
    run(material, tmp_path / "run", guidance, "training.exit_step=2")
    (tmp_path / "data" / "a.jsonl").write_text(text.replace("it is", "I say"))
    run(material, tmp_path / "run", guidance)
    *_, last = map(json.loads, (tmp_path / "run" / "recipes.jsonl").read_text().splitlines())
    assert f"guidance.responses: other contents in {tmp_path}/data/*.jsonl" in last["changes"]


def test_field_cases_a9_two_runs_do_not_write_to_one_folder(halfway, material, tmp_path):
    shutil.copytree(halfway / "run", tmp_path / "run")
    before = snapshot(tmp_path / "run")
    with RunLock() as lock:
        lock.take([tmp_path / "run"])
        message = refused(material, tmp_path / "run")
        assert "another command is writing to" in message
        assert f"process {os.getpid()}" in message
    with RunLock() as lock:
        lock.take([tmp_path / "run" / "checkpoints"])
        other = f"checkpoint.dir={tmp_path / 'run' / 'checkpoints'}"
        assert "another command is writing to" in refused(material, tmp_path / "other", other)
    assert snapshot(tmp_path / "run") == before
    (tmp_path / "run" / ".lock").write_text("process 1 on a node that crashed")  # a file alone holds nothing
    assert run(material, tmp_path / "run")["steps"] == 4
    assert not list(tmp_path.rglob(".lock"))


def test_field_cases_b16_a_folder_that_cannot_be_written_to_is_refused_before_a_model_is_read(material, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/run"):
        message = refused(material, tmp_path / place)
        assert message.startswith(f"logging.dir={tmp_path / place}: {tmp_path / 'file'} is no folder")
    message = refused(material, tmp_path / "run", f"checkpoint.dir={tmp_path / 'file'}")
    assert message.startswith(f"checkpoint.dir={tmp_path / 'file'}: ")
    assert not (tmp_path / "run").exists()


def test_lines_of_the_history_that_are_no_entries_are_passed_over(halfway, material, tmp_path):
    shutil.copytree(halfway / "run", tmp_path / "run")
    with open(tmp_path / "run" / "recipes.jsonl", "a") as file:
        file.write('[1]\n{}\n5\nnull\n{"step": "x"}\nbroken')
    run(material, tmp_path / "run", "objective.name=opd")
    history = [json.loads(line) for line in (tmp_path / "run" / "recipes.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history] == [0, 2]
