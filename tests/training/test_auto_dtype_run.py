"""A run with `dtype: auto`: its records name the resolved dtype, and a resumed run keeps it on another CPU."""

import json
import os
import platform
from pathlib import Path

import pytest
import yaml
from support.helpers import run_distributed
from support.single_runs import refused, run, snapshot
from support.train_runs import APART, overrides_of, records, train_rank, weights_of

from megatron_tropd.commands.dry_run import show
from megatron_tropd.recipe import load_recipe
from megatron_tropd.training.checkpoint_settings import take_settings

AUTO = ("student.dtype=auto", "teacher.dtype=auto", "checkpoint.keep=0")
IS_X86 = platform.machine() in ("x86_64", "AMD64")


def train_without_bf16_rank(overrides):
    """Train where the library may not use the CPU's bf16 units; return the summary."""
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    return train_rank(overrides)


def generate_rank(material, checkpoint, output):
    """Generate with the student of a checkpoint; return the command's status."""
    from megatron_tropd.cli import main

    options = [f"--checkpoint={checkpoint}/model", f"--prompts={material / 'prompts.jsonl'}", f"--output={output}"]
    return main(["generate", *options, "--max-new-tokens=4", "--limit=2", "student.dtype=auto"])


def convert_rank(checkpoint, output):
    from megatron_tropd.cli import main

    return main(["convert", "mcore-to-hf", f"--checkpoint={checkpoint}", f"--output={output}"])


def dtypes(path: Path) -> list[str]:
    recipe = yaml.safe_load(path.read_text())
    return [recipe[role]["dtype"] for role in ("student", "teacher")]


@pytest.fixture(scope="module")
def halfway(material, tmp_path_factory):
    """A run with auto after two of four steps, started where products in bf16 are slow."""
    folder = tmp_path_factory.mktemp("auto") / "run"
    overrides = overrides_of(material, folder, *AUTO, "training.exit_step=2")
    run_distributed(train_without_bf16_rank, 1, overrides)
    return folder


@pytest.fixture(scope="module")
def resumed(halfway, material):
    """The same run, continued with all of the CPU."""
    run(material, halfway, *AUTO)
    return halfway


def test_the_records_name_the_resolved_dtype(resumed):
    first = resumed / "checkpoints" / "step_000002"
    student, teacher = dtypes(first / "recipe.yaml")
    assert student == teacher == ("float32" if IS_X86 else student)
    assert student in ("float32", "bfloat16")
    history = [json.loads(line) for line in (resumed / "recipes.jsonl").read_text().splitlines()]
    assert [entry["recipe"]["student.dtype"] for entry in history] == [student]
    assert {str(tensor.dtype) for tensor in weights_of(first / "model").values()} == {f"torch.{student}"}


def test_a_resumed_run_keeps_the_dtype_of_the_first_start(resumed):
    step_2, step_4 = (resumed / "checkpoints" / f"step_00000{step}" / "recipe.yaml" for step in (2, 4))
    assert dtypes(step_4) == dtypes(resumed / "recipe.yaml") == dtypes(step_2)
    assert [record["step"] for record in records(resumed)] == [0, 1, 2, 3]
    assert len((resumed / "recipes.jsonl").read_text().splitlines()) == 1  # nothing changed


def test_a_finished_run_and_another_dtype(resumed, material):
    before = snapshot(resumed)
    assert run(material, resumed, *AUTO)["nothing_to_do"]
    (student, _), other = dtypes(resumed / "recipe.yaml"), "float16"
    message = refused(material, resumed, *AUTO, "training.steps=6", f"student.dtype={other}")
    assert f"student.dtype: {student} -> {other}" in message
    assert snapshot(resumed) == before


def test_dry_run_shows_what_the_run_would_keep(resumed, material):
    printed = show(load_recipe(None, overrides_of(material, resumed, *AUTO)))
    assert "auto is" not in printed
    assert yaml.safe_load(printed)["student"]["dtype"] == dtypes(resumed / "recipe.yaml")[0]
    printed = show(load_recipe(None, overrides_of(material, resumed.with_name("new"), *AUTO)))
    assert "# student.dtype and teacher.dtype: auto is bfloat16 on CUDA; on a CPU the faster of" in printed
    assert yaml.safe_load(printed)["teacher"]["dtype"] == "auto"


def test_generate_and_convert_take_the_runs_dtype(resumed, material, tmp_path):
    checkpoint = resumed / "checkpoints" / "step_000004"
    recipe = load_recipe(None, ["teacher.dtype=auto", f"teacher.checkpoint={checkpoint}/model"])
    take_settings(recipe, "teacher")
    assert (recipe.student.dtype, recipe.teacher.dtype) == ("bfloat16", dtypes(checkpoint / "recipe.yaml")[0])
    assert run_distributed(generate_rank, 1, material, checkpoint, tmp_path / "answers.jsonl") == [0]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
    assert run_distributed(convert_rank, 1, checkpoint, tmp_path / "hf") == [0]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtypes(checkpoint / "recipe.yaml")[0]


def test_a_teacher_on_dedicated_ranks_has_the_students_dtype(material, tmp_path):
    overrides = overrides_of(material, tmp_path, *AUTO, *APART, "training.steps=1")
    one, two = run_distributed(train_without_bf16_rank, 2, overrides)
    assert one == two
    student, teacher = dtypes(tmp_path / "recipe.yaml")
    assert student == teacher == ("float32" if IS_X86 else student)
    assert student != "auto"
