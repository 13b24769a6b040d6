"""The list of objectives: each has its sentences, and is what the recipe accepts and the objective builds."""

import pytest

from megatron_tropd.config import Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.methods import METHODS, is_guided, method_table, trains_on_data
from megatron_tropd.objective.objectives import build_objective
from megatron_tropd.recipe import load_recipe


@pytest.mark.parametrize("name", METHODS)
def test_each_name_is_explained_read_and_built(name):
    assert METHODS[name].what
    assert METHODS[name].when
    assert name in method_table()
    recipe = load_recipe(None, [f"objective.name={name}"])
    objective = build_objective(recipe.objective, recipe.guidance, seed=1)
    assert objective.needs_teacher is not trains_on_data(name)
    assert objective.uses_guidance is is_guided(name)
    assert (recipe.guidance.schedule == "none") is not is_guided(name)


def test_a_name_that_nothing_implements_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"objective.name=tropdd .*did you mean tropd"):
        load_recipe(None, ["objective.name=tropdd"])


def test_only_the_teacher_has_what_only_a_frozen_model_can_do():
    assert not {"offload", "ranks", "replicas"} & set(vars(Recipe().student))
    assert {"offload", "ranks", "replicas"} <= set(vars(Recipe().teacher))


def test_recipes_of_earlier_versions_name_the_students_defaults_of_them(tmp_path):
    (tmp_path / "old.yaml").write_text("student: {offload: false, ranks: shared, replicas: 1, dtype: float32}\n")
    assert load_recipe(tmp_path / "old.yaml") == load_recipe(None, ["student.dtype=float32"])


@pytest.mark.parametrize("text", ["student.offload=true", "student.ranks=dedicated", "student.replicas=2"])
def test_the_teachers_keys_are_refused_for_the_student(text):
    with pytest.raises(UserError, match=r"only the teacher, whose weights are frozen, has this key.*set teacher\."):
        load_recipe(None, [text])
