"""run.json tells what a run was started with, once per start."""

import json
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from megatron_tropd.recipe import load_recipe
from megatron_tropd.reporting.provenance import FILE, commit, record_start

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    return load_recipe("tiny")


def starts(folder):
    return json.loads((folder / FILE).read_text())["starts"]


def test_a_start_names_models_hardware_and_versions(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    record_start(tmp_path, recipe, 0)
    (start,) = starts(tmp_path)
    assert (start["processes"], start["nodes"], start["first_step"]) == (16, 2, 0)
    assert {"megatron-core", "torch"} <= start["versions"].keys()
    assert datetime.fromisoformat(start["started"]).tzinfo is not None
    assert start["device"]
    for role in ("student", "teacher"):
        weights = sum(tensor_sizes(ROOT / "examples" / "tiny" / role / "model.safetensors"))
        assert start["models"][role] == {"path": f"examples/tiny/{role}", "type": "llama", "parameters": weights}


def tensor_sizes(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (no mapping)
            yield file.get_tensor(name).numel()


def test_a_resumed_run_has_several_starts_and_a_new_one_drops_them(recipe, tmp_path):
    for first_step in (0, 7):
        record_start(tmp_path, recipe, first_step)
    assert [start["first_step"] for start in starts(tmp_path)] == [0, 7]
    (tmp_path / FILE).write_text("{ damaged")
    record_start(tmp_path, recipe, 9)
    assert [start["first_step"] for start in starts(tmp_path)] == [9]
    record_start(tmp_path, recipe, 0)
    assert [start["first_step"] for start in starts(tmp_path)] == [0]


def test_an_objective_without_a_teacher(recipe, tmp_path):
    recipe.teacher.hf_path = None
    record_start(tmp_path, recipe, 0)
    assert starts(tmp_path)[0]["models"]["teacher"] is None


def test_the_commit_is_that_of_the_package_only(tmp_path, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if not head:
        pytest.skip("not a checkout: there is no commit to compare with")
    assert commit().rstrip("+") == head
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "provenance.py").write_text("")
    monkeypatch.setattr("megatron_tropd.reporting.provenance.__file__", str(tmp_path / "provenance.py"))
    assert commit() is None  # installed into an unrelated repository
