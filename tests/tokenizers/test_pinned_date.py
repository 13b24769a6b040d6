"""A chat template's today: one for all ranks, all restarts and the recipe that a run writes."""

import datetime
import json
from types import SimpleNamespace

import pytest
from support.helpers import run_distributed
from support.tiny_models import write_model
from support.train_runs import overrides_of, train_rank

from megatron_tropd.recipe import load_recipe

DATED = "{{ strftime_now('%Y-%m-%d') }} {% for m in messages %}{{ m.content }}{% endfor %}:"


@pytest.fixture
def material(tmp_path):
    write_model(tmp_path / "student", "llama_tied", seed=1)
    write_model(tmp_path / "teacher", "llama", seed=2, hidden_size=64)
    with open(tmp_path / "prompts.jsonl", "w") as file:
        for i in range(4):
            prompt = {"id": f"p{i}", "messages": [{"role": "user", "content": f"add {i}"}]}
            file.write(json.dumps({**prompt, "answer": "1", "teacher_response": "it is"}) + "\n")
    (tmp_path / "dated.jinja").write_text(DATED)
    return tmp_path


def on_days(days, fn, *args):
    """Call `fn` on a rank whose clock shows its own of `days`."""
    import os

    from megatron_tropd.tokenizers import pinned_date

    day = datetime.date.fromisoformat(days[int(os.environ["RANK"])])
    pinned_date.datetime = SimpleNamespace(date=SimpleNamespace(today=lambda: day))
    return fn(*args)


def generate_rank(overrides, output):
    from megatron_tropd.cli import main

    prompts = next(o.split("=")[1] for o in overrides if o.startswith("data.prompts"))
    status = main(["generate", "--prompts", prompts, "--output", output, "--max-new-tokens", "4", *overrides])
    assert status == 0


def prompts_of(run):
    return [json.loads(line)["prompt"] for line in (run / "samples.jsonl").read_text().splitlines()]


def test_field_cases_a19_a_run_resumed_after_midnight_trains_on_the_same_prompts(material):
    run = material / "run"
    overrides = overrides_of(material, run, f"tokenizer.chat_template={material / 'dated.jinja'}")
    # The two ranks see other days.
    days = ["2020-02-29", "2020-03-01"]
    run_distributed(on_days, 2, days, train_rank, [*overrides, "training.exit_step=2"])
    assert load_recipe(run / "recipe.yaml").tokenizer.date == "2020-02-29"
    saved = run / "checkpoints" / "step_000002" / "recipe.yaml"
    assert load_recipe(saved).tokenizer.date == "2020-02-29"
    assert all(prompt.startswith("2020-02-29 add") for prompt in prompts_of(run))
    run_distributed(on_days, 1, ["2020-03-02"], train_rank, overrides)
    assert load_recipe(run / "recipe.yaml").tokenizer.date == "2020-02-29"
    prompts = prompts_of(run)
    assert len(prompts) >= 4
    assert all(prompt.startswith("2020-02-29 add") for prompt in prompts)


def test_field_cases_a19_a_template_without_a_date_pins_none(material):
    run = material / "run"
    run_distributed(on_days, 1, ["2020-02-29"], train_rank, overrides_of(material, run, "training.steps=1"))
    assert load_recipe(run / "recipe.yaml").tokenizer.date is None


def test_field_cases_a19_all_ranks_that_generate_use_one_date(material):
    """Ranks of one replica with prompts of other lengths would hang or write nonsense."""
    (material / "dated.jinja").write_text(DATED.replace("%Y-%m-%d", "%A"))
    overrides = [
        f"tokenizer.chat_template={material / 'dated.jinja'}",
        "student.dtype=float32",
        "rollout.temperature=0",
    ]
    overrides += [f"student.hf_path={material / 'student'}", f"data.prompts={material / 'prompts.jsonl'}"]
    written = {}
    for name, days, extra in (
        ("two", ["2020-03-01", "2020-03-04"], ["student.tensor_model_parallel_size=2"]),
        ("one", ["2020-03-01"], []),
        ("given", ["2020-03-04"], ["tokenizer.date=2020-03-01"]),
        ("other", ["2020-03-04"], []),
    ):
        output = material / f"{name}.jsonl"
        run_distributed(on_days, len(days), days, generate_rank, [*overrides, *extra], str(output))
        written[name] = [json.loads(line)["response"] for line in output.read_text().splitlines()]
    assert written["two"] == written["one"] == written["given"]
    assert written["other"] != written["one"]
