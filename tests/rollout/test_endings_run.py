"""Models that end differently: training, evaluation, the exported folder and transformers all stop at one place."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.helpers import run_distributed

from megatron_tropd.cli import main

TINY = Path(__file__).parents[2] / "examples/tiny"
PROBLEMS, LENGTH = 64, 64
TEACHERS_END, STUDENTS_END = 2, 3


def _patch(file, **values):
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """The shipped teacher, the shipped student as a base model (its only EOS is id 3), prompts and problems."""
    folder = tmp_path_factory.mktemp("pair")
    for role in ("student", "teacher"):
        shutil.copytree(TINY / role, folder / role)
    for name in ("config.json", "generation_config.json"):
        _patch(folder / "student" / name, eos_token_id=STUDENTS_END)
    _patch(folder / "student/tokenizer_config.json", eos_token="<pad>")
    shutil.copytree(folder / "student", folder / "base")
    (folder / "base/chat_template.jinja").unlink()
    shutil.copytree(folder / "teacher", folder / "alike")
    for name in ("config.json", "generation_config.json"):
        _patch(folder / "alike" / name, eos_token_id=STUDENTS_END)
    _patch(folder / "alike/tokenizer_config.json", eos_token="<pad>")
    for name in ("prompts", "problems"):
        lines = (TINY / f"{name}.jsonl").read_text().splitlines()[:PROBLEMS]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _call(arguments):
    assert main([str(argument) for argument in arguments]) == 0


def _command(*arguments):
    run_distributed(_call, 1, arguments)


def _evaluate(output, *arguments):
    limits = ("student.dtype=float32", f"rollout.max_new_tokens={LENGTH}")
    _command("evaluate", *arguments, "--output", output, *limits)
    return json.loads(output.read_text())


def _generate_with_transformers(folder, problems):
    """Return the greedy tokens that transformers' generate writes after each problem, and their texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for line in problems.read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            written = model.generate(**tokens, do_sample=False, max_new_tokens=LENGTH)[0, tokens.input_ids.size(1) :]
        found.append((len(written), int(written[-1]), tokenizer.decode(written, skip_special_tokens=True)))
    return found


def _train(material, run, student, teacher, *keys):
    """Train for a few steps with an evaluation after each; return the summary and the metrics of the last step."""
    _command(
        *("train", "tiny", "teacher.tensor_model_parallel_size=1", "student.tensor_model_parallel_size=1"),
        *(f"student.hf_path={material / student}", f"teacher.hf_path={material / teacher}"),
        *(f"data.prompts={material / 'prompts.jsonl'}", f"evaluation.problems={material / 'problems.jsonl'}"),
        *("guidance.schedule=none", "training.prompts_per_step=4", "training.lr_warmup_steps=0"),
        *("training.lr_schedule=constant", "evaluation.interval=1", f"logging.dir={run}", *keys),
    )
    summary = json.loads((run / "summary.json").read_text())
    return summary, json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize(
    ("student", "teacher", "keys"),
    [
        ("student", "teacher", ["training.lr=0", "training.steps=1"]),
        pytest.param(
            *("student", "teacher", ["training.lr=0", "training.steps=1", "tokenizer.check_compatibility=false"]),
            marks=pytest.mark.full,
        ),
        ("base", "teacher", ["training.lr=1e-3", "training.steps=2", "tokenizer.path={folder}/teacher"]),
        pytest.param(
            *("student", "alike", ["training.lr=0", "training.steps=1", "rollout.stop=['</s>']"]),
            marks=pytest.mark.full,
        ),
    ],
    ids=["own_tokenizer", "unchecked", "teachers_template", "special_stop"],
)
def test_field_cases_a1_a3_a4_evaluation_export_and_transformers_stop_where_training_did(
    material, tmp_path, student, teacher, keys
):
    keys = [key.format(folder=material) for key in keys]
    summary, metrics = _train(material, tmp_path / "run", student, teacher, *keys)
    checkpoint = Path(summary["checkpoint"]) / "model"
    _command("convert", "mcore-to-hf", "--checkpoint", checkpoint, "--output", tmp_path / "export")
    problems = ("--problems", material / "problems.jsonl")
    ours = _evaluate(tmp_path / "checkpoint.json", "--checkpoint", checkpoint, *problems)
    exported = _evaluate(tmp_path / "export.json", "--hf-path", tmp_path / "export", *problems)
    theirs = _generate_with_transformers(tmp_path / "export", material / "problems.jsonl")

    alike = [(s["length"], s["response"]) == (n, text) for s, (n, _, text) in zip(ours["samples"], theirs, strict=True)]
    print([record["accuracy"] for record in summary["evaluations"]], ours["accuracy"], exported["accuracy"])
    print(f"{sum(alike)} of {len(alike)} as transformers; {ours['finish_reasons']}; {metrics['finish_eos']}")
    assert ours["accuracy"] == summary["evaluations"][-1]["accuracy"]
    assert exported["samples"] == ours["samples"]
    assert ours["finish_reasons"].get("eos", 0) > PROBLEMS / 2
    assert metrics["finish_eos"] > 0.5
    assert all(alike)
    for sample, (_, last, _) in zip(ours["samples"], theirs, strict=True):
        assert (last in (TEACHERS_END, STUDENTS_END)) == (sample["finish_reason"] == "eos")
    config = json.loads((tmp_path / "export/generation_config.json").read_text())
    assert sorted(config["eos_token_id"]) == [TEACHERS_END, STUDENTS_END]
    assert (config["bos_token_id"], config["pad_token_id"], config["do_sample"]) == (1, 3, False)
    assert "stop_strings" not in config


def test_field_cases_a5_a_run_and_the_command_line_evaluate_with_the_recipes_stop_strings(material, tmp_path):
    keys = ("training.lr=0", "training.steps=1", r'rollout.stop=["\n####"]')  # before the answer is written again
    summary, _ = _train(material, tmp_path / "run", "student", "teacher", *keys)
    problems = ("--problems", material / "problems.jsonl")
    model = ("--hf-path", material / "student", f"teacher.hf_path={material / 'teacher'}")
    ours = _evaluate(tmp_path / "stopped.json", *model, *problems, keys[-1])
    print([record["accuracy"] for record in summary["evaluations"]], ours["accuracy"], ours["finish_reasons"])
    assert ours["accuracy"] == summary["evaluations"][0]["accuracy"] == summary["evaluations"][1]["accuracy"] > 0.2
    assert ours["finish_reasons"].get("stop", 0) > PROBLEMS / 2
    assert all("####" not in sample["response"] for sample in ours["samples"])
    checkpoint = ("--checkpoint", Path(summary["checkpoint"]) / "model")  # its recipe names the stop string
    assert _evaluate(tmp_path / "saved.json", *checkpoint, *problems)["samples"] == ours["samples"]
    whole = _evaluate(tmp_path / "whole.json", *model, *problems, keys[-1], "evaluation.stop=[]")
    assert whole["finish_reasons"] == {"eos": PROBLEMS}
    assert any("####" in sample["response"] for sample in whole["samples"])
