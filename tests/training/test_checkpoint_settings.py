"""What `evaluate` and `generate` take from the recipe beside a checkpoint that they are given."""

import pytest

from megatron_tropd.recipe import load_recipe, to_yaml
from megatron_tropd.training.checkpoint_settings import take_settings


@pytest.fixture
def checkpoint(tmp_path):
    keys = ("rollout.stop=['</answer>']", "tokenizer.chat_template_kwargs.enable_thinking=false")
    run = load_recipe(None, [*keys, "tokenizer.date=2025-03-04", "rollout.max_new_tokens=99"])
    (tmp_path / "model").mkdir()
    (tmp_path / "recipe.yaml").write_text(to_yaml(run))
    return tmp_path / "model"


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_field_cases_a1_a18_a19_a_checkpoint_brings_its_stops_variables_and_date(checkpoint, role):
    recipe = load_recipe(None, [f"{role}.checkpoint={checkpoint}"])
    length = recipe.rollout.max_new_tokens
    take_settings(recipe, role)
    assert recipe.rollout.stop == ["</answer>"]
    assert recipe.tokenizer.chat_template_kwargs == {"enable_thinking": False}
    assert recipe.tokenizer.date == "2025-03-04"
    assert recipe.rollout.max_new_tokens == length
    to_yaml(recipe)


def test_what_the_command_gives_takes_precedence(checkpoint):
    keys = ("rollout.stop=['x']", "tokenizer.chat_template_kwargs.enable_thinking=true", "tokenizer.date=2026-01-01")
    recipe = load_recipe(None, [f"student.checkpoint={checkpoint}", *keys])
    before = to_yaml(recipe)
    take_settings(recipe, "student")
    assert to_yaml(recipe) == before


@pytest.mark.parametrize("keys", [[], ["student.hf_path={0}"], ["student.checkpoint={0}/model/hf"]])
def test_models_without_a_recipe_bring_nothing(checkpoint, keys):
    recipe = load_recipe(None, [key.format(checkpoint.parent) for key in keys])
    before = to_yaml(recipe)
    take_settings(recipe, "student")
    assert to_yaml(recipe) == before
