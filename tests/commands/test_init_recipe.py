"""init and plan --write: recipes that read back as chosen and pass the checks of train, questions, and refusals."""

import dataclasses
import io
import sys
from pathlib import Path

import pytest

from megatron_tropd.cli import main
from megatron_tropd.commands.questions import complete
from megatron_tropd.planning.recipe_file import write_recipe
from megatron_tropd.recipe import load_recipe
from megatron_tropd.validation import validate

TINY = Path("examples/tiny")
OPTIONS = ["--teacher", str(TINY / "teacher"), "--student", str(TINY / "student"), "--gpus", "2"]


@pytest.fixture(autouse=True)
def _beside_the_examples(monkeypatch, tmp_path_factory):
    """Work in a folder that has the checkout's examples, and no runs."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "examples").symlink_to(Path(__file__).parents[2] / "examples")
    (folder / "README.md").write_text("")
    monkeypatch.chdir(folder)


def _init(*options):
    return main(["init", *OPTIONS, *map(str, options)])


def test_init_writes_a_recipe_that_train_accepts(tmp_path, capfd):
    output = tmp_path / "mine.yaml"
    options = ["--prompts", TINY / "prompts.jsonl", "--problems", TINY / "problems.jsonl", "--output", output]
    options += ["--dtype", "float32"]
    assert _init(*options) == 0
    shown = capfd.readouterr().out
    assert "2,000 prompts of up to 32 tokens" in shown
    assert f"torchrun --nproc-per-node 2 -m megatron_tropd train {output}" in shown
    recipe = load_recipe(output)
    validate(recipe)
    assert recipe.rollout.max_new_tokens == 128 - 32  # the whole context
    assert recipe.training.micro_batch_size == 128  # of 128 tokens
    assert (recipe.student.dtype, recipe.teacher.dtype) == ("float32", "float32")
    assert recipe.evaluation.problems == str(TINY / "problems.jsonl")
    assert recipe.guidance.responses is None  # the prompts carry the teacher's
    assert main(["train", str(output), "--dry-run"]) == 0
    assert "79: fits" in capfd.readouterr().out


def test_init_has_the_teacher_write_responses_that_the_prompts_lack(tmp_path, capfd):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"text": "{i} + {i} = "}}\n' for i in range(40)))
    assert _init("--prompts", prompts, "--output", tmp_path / "mine.yaml") == 0
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.guidance.responses == "runs/mine/responses.jsonl"
    assert recipe.training.prompts_per_step == 32  # no more than there are
    shown = capfd.readouterr().out
    assert shown.index("generate") < shown.index(" train ")
    assert "--model teacher --temperature 0 --output runs/mine/responses.jsonl" in shown
    unguided = ["--prompts", prompts, "--method", "fkl_outlier", "--output", tmp_path / "other.yaml"]
    assert _init(*unguided) == 0
    assert " generate " not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("not json", [], "line 1: not valid JSON"),
        ('{"text": "a"}', ["--gpu-memory", "2"], "no layout of these models fits 2 GPU(s) of 2 GB"),
        ('{"text": "a"}', ["--problems", "prompts.jsonl"], "prompts.jsonl"),
        (f'{{"text": "{"1 + " * 100}"}}', [], "leaves no room for a response"),
    ],
)
def test_init_refuses_what_train_would_refuse_and_writes_nothing(content, options, message, tmp_path, capfd):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "mine.yaml"
    prompts.write_text(content + "\n")
    options = [str(prompts) if word == "prompts.jsonl" else word for word in options]
    assert _init("--prompts", prompts, "--output", output, *options) == 2
    error = capfd.readouterr().err
    assert message in error
    assert not output.exists()


def test_init_gives_a_new_run_a_folder_of_its_name_that_no_run_has(tmp_path, capfd):
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine_2").mkdir()
    assert _init("--prompts", TINY / "prompts.jsonl", "--output", tmp_path / "mine.yaml") == 0
    assert load_recipe(tmp_path / "mine.yaml").logging.dir == "runs/mine_3/train"


def test_init_never_writes_over_a_file(tmp_path, capfd):
    output = tmp_path / "mine.yaml"
    output.write_text("mine")
    assert _init("--prompts", TINY / "prompts.jsonl", "--output", output) == 2
    assert "exists and is not overwritten" in capfd.readouterr().err
    assert output.read_text() == "mine"


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_questions_are_asked_again_until_the_answer_can_be_used(monkeypatch, capfd):
    answers = ["nowhere", str(TINY), str(TINY / "teacher"), "", str(TINY / "prompts.jsonl"), "two", "2", ""]
    monkeypatch.setattr(sys, "stdin", _Terminal("\n".join(answers) + "\n"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    names = ("teacher", "student", "prompts", "gpus", "problems", "output")
    arguments = type("Arguments", (), dict.fromkeys(names))()
    arguments.student = str(TINY / "student")
    complete(arguments)
    assert arguments.teacher == str(TINY / "teacher")
    assert (arguments.gpus, arguments.problems, arguments.output) == (2, None, "recipe.yaml")
    shown = capfd.readouterr().out
    for text in (
        "there is no such folder",
        "holds no config.json",
        "an answer is needed",
        "'two' is not a whole number",
    ):
        assert text in shown


def test_a_recipe_written_for_people_reads_back_equal(tmp_path):
    values = {
        "student.hf_path": "models/a b: c#d",
        "data.prompts": ["x.jsonl", "y z.jsonl"],
        "data.columns.prompt": "yes",
        "rollout.stop": ["\n\n", "# end"],
        "training.lr": 1e-6,
        "training.deterministic": True,
        "logging.dir": "1.5",
    }
    write_recipe(tmp_path / "r.yaml", values, heading=["a heading"], notes={"training.lr": "x " * 100})
    recipe = dataclasses.asdict(load_recipe(tmp_path / "r.yaml"))
    for key, value in values.items():
        place = recipe
        for part in key.split("."):
            place = place[part]
        assert place == value
    assert max(map(len, (tmp_path / "r.yaml").read_text().splitlines())) <= 118


def test_plan_writes_a_recipe_that_starts_from_the_given_one(tmp_path, capfd):
    own = tmp_path / "own.yaml"
    own.write_text("base: tiny\ntraining: {steps: 7}\n")
    (tmp_path / "new").mkdir()
    written = tmp_path / "new" / "planned.yaml"
    command = ["plan", str(own), "training.lr=2e-4", "--gpus", "4", "--write", str(written)]
    assert main(command) == 0
    assert f"{written} written" in capfd.readouterr().out
    recipe = load_recipe(written)
    assert (recipe.training.steps, recipe.training.lr) == (7, 2e-4)
    assert recipe.data.prompts == "examples/tiny/prompts.jsonl"
    assert main(["plan", str(written), "--gpus", "4"]) == 0  # its layout fits


def test_auto_stays_auto_in_what_is_written(tmp_path, capfd):
    mine, planned = tmp_path / "mine.yaml", tmp_path / "planned.yaml"
    assert _init("--prompts", TINY / "prompts.jsonl", "--dtype", "auto", "--output", mine) == 0
    assert (
        main(["plan", "tiny", "student.dtype=auto", "teacher.dtype=auto", "--gpus", "2", "--write", str(planned)]) == 0
    )
    for path in (mine, planned):
        recipe = load_recipe(path)
        assert (recipe.student.dtype, recipe.teacher.dtype) == ("auto", "auto")
    capfd.readouterr()
    assert main(["train", str(mine), "--dry-run"]) == 0
    assert "# student.dtype and teacher.dtype: auto is bfloat16 on CUDA;" in capfd.readouterr().out
