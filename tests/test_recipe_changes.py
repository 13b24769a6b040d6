"""Each key of the recipe has one class, and files count by what they hold, not by where they lie."""

import fnmatch
import json

import pytest

from megatron_tropd.errors import UserError
from megatron_tropd.prompts.fingerprint import files_digest, model_digest, recipe_contents, tokenizer_digest
from megatron_tropd.recipe import load_recipe, save_recipe
from megatron_tropd.recipe_changes import (
    APPLIED,
    CONTENTS,
    DOES_NOT_MATTER,
    FIXED,
    IRRELEVANT,
    MAY_CHANGE,
    MAY_NOT_CHANGE,
    PINNED,
    UNKNOWN,
    classes_of,
    compare,
    describe,
    read_settings,
    refuse,
    settings_of,
)

SETTINGS = settings_of(load_recipe())


@pytest.mark.parametrize("key", SETTINGS)
def test_every_key_of_the_recipe_has_one_class(key):
    assert len(classes_of(key)) == 1


def test_no_entry_of_a_table_is_without_a_key():
    for pattern in (*MAY_CHANGE, *MAY_NOT_CHANGE, *DOES_NOT_MATTER, *CONTENTS, *PINNED):
        assert fnmatch.filter(SETTINGS, pattern), pattern
    assert all(classes_of(key) != [IRRELEVANT] for key in PINNED)


def changes(old, new, old_contents=None, new_contents=None):
    found = compare(SETTINGS | old, SETTINGS | new, old_contents or {}, new_contents or {})
    return {change.key: (change.old, change.new, change.kind) for change in found}


def test_each_class_is_reported_and_equal_values_are_not():
    new = {"training.lr": 1e-3, "data.seed": 5, "logging.samples": 0, "rollout.stop": []}
    assert changes({}, new) == {
        "data.seed": (0, 5, FIXED),
        "training.lr": (5e-6, 1e-3, APPLIED),
        "logging.samples": (2, 0, IRRELEVANT),
    }
    assert changes({"training.steps": 200.0}, {}) == {}


def test_a_key_that_an_older_version_did_not_know_had_its_default():
    old = {key: value for key, value in SETTINGS.items() if key != "training.clip_grad"} | {"training.gone": 1}
    assert compare(old, SETTINGS, {}, {}) == []
    assert [str(c) for c in compare(old, SETTINGS | {"training.clip_grad": 0.5}, {}, {})] == [
        "training.clip_grad: 1.0 -> 0.5"
    ]


def test_files_count_by_their_contents():
    here, there = {"student.hf_path": "a"}, {"student.hf_path": "b"}
    assert changes(here, there, {"student": "1"}, {"student": "1"}) == {}
    assert changes(here, there, {"student": "1"}, {"student": "2"}) == {"student.hf_path": ("a", "b", FIXED)}
    assert changes(here, here, {"student": "1"}, {"student": "2"}) == {"student.hf_path": ("a", "a", FIXED)}
    assert changes(here, there, {}, {"student": "2"}) == {"student.hf_path": ("a", "b", UNKNOWN)}
    assert changes(here, here, {}, {"student": "2"}) == {}
    both = {"student.hf_path": "a", "student.checkpoint": "c"}
    assert changes(both, both | {"student.checkpoint": "d"}, {"student": "1"}, {"student": "2"}) == {
        "student.checkpoint": ("c", "d", FIXED)
    }
    problems = {"evaluation.problems": "p"}
    assert changes({}, problems, {}, {"evaluation.problems": "1"}) == {"evaluation.problems": (None, "p", APPLIED)}


def test_a_refusal_names_every_key_with_its_reason_and_the_remedy():
    found = compare(SETTINGS, SETTINGS | {"data.seed": 1, "training.optimizer": "sgd", "training.lr": 1.0}, {}, {})
    with pytest.raises(UserError) as error:
        refuse(found, "the run cannot continue")
    message = str(error.value)
    assert "data.seed: 0 -> 1 (the order of the prompts follows from it)" in message
    assert "training.optimizer: adam -> sgd" in message
    assert "training.lr" not in message
    assert "another logging.dir" in message
    assert "training.lr: 5e-06 -> 1.0 (applies from here on)" in describe(found)
    refuse([change for change in found if change.kind != FIXED], "nothing")


def test_a_written_recipe_is_read_back_equal(tmp_path):
    recipe = load_recipe(None, ["training.lr=3e-5", "rollout.stop=[a, b]", "objective.clip=-1e-3"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert compare(read_settings(tmp_path / "recipe.yaml"), settings_of(recipe), {}, {}) == []


@pytest.mark.parametrize("text", ["steps: 4\n", "- a\n", "a: [\n"])
def test_what_is_no_recipe_is_refused_with_its_path(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        read_settings(tmp_path / "recipe.yaml")


def test_digests_see_contents_and_not_places(tmp_path):
    for name, byte in {"a": b"x", "b": b"x", "c": b"y"}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "_name_or_path": name}))
        header = b'{"w":{"dtype":"U8","shape":[3000000],"data_offsets":[0,3000000]}}'
        weights = bytearray(3_000_000)
        weights[-1:] = byte
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)
        (folder / "tokenizer.json").write_bytes(byte)
    digests = [model_digest(tmp_path / name) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert tokenizer_digest(tmp_path / "a") == tokenizer_digest(tmp_path / "b") != tokenizer_digest(tmp_path / "c")
    (tmp_path / "t.jinja").write_text("{{ x }}")
    assert tokenizer_digest(tmp_path / "a", str(tmp_path / "t.jinja")) != tokenizer_digest(tmp_path / "a")
    (tmp_path / "b" / "config.json").write_text('{"hidden_size": 9}')
    assert model_digest(tmp_path / "b") != digests[0]
    (tmp_path / "a" / "model.safetensors").unlink()
    assert model_digest(tmp_path / "a") is None
    assert model_digest(tmp_path / "nowhere") is None
    assert files_digest(str(tmp_path / "c")) != files_digest([str(tmp_path / "b")])
    assert files_digest(str(tmp_path / "nowhere")) is None
    recipe = load_recipe(None, [f"student.hf_path={tmp_path / 'c'}", f"data.prompts={tmp_path / 't.jinja'}"])
    assert recipe_contents(recipe).keys() == {"student", "tokenizer", "data.prompts"}
