"""Checkpoints under a kill at any moment: what is found afterwards is whole, and the run goes on from it exactly."""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import run_distributed
from test_train import assert_same, overrides_of, records, train_rank
from test_train import material as material  # a fixture
from test_train import single as single  # a fixture

from megatron_tropd.checkpoint import newest
from megatron_tropd.manifest import MANIFEST, find_damage, write_manifest
from megatron_tropd.recipe import load_recipe, save_recipe

MOMENTS = {  # a file or folder of the second checkpoint; the kill comes with the first file operation once it is there
    "as_it_begins": ".step_000002.tmp",
    "within_the_weights": ".step_000002.tmp/model/hf/config.json",
    "within_the_optimizer": ".step_000002.tmp/optimizer/.metadata",
    "before_it_gets_its_name": f".step_000002.tmp/{MANIFEST}",
}

# Kills itself, whatever else the machine does meanwhile: the argument is the moment, the others are the command's.
VICTIM = """
import os, runpy, signal, sys
moment = sys.argv.pop(1)
def kill_at_the_moment(event, arguments):
    if event in ("open", "os.mkdir", "os.rename") and os.path.exists(moment):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill_at_the_moment)
runpy.run_module("megatron_tropd", run_name="__main__")
"""


def train_and_kill(overrides: list[str], moment, recipe_file) -> None:
    save_recipe(load_recipe(None, overrides), recipe_file)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-c", VICTIM, str(moment), "train", str(recipe_file)]
    result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()[-2000:]
    assert moment.exists()


@pytest.mark.parametrize("name", MOMENTS)
def test_after_a_kill_during_a_checkpoint_the_one_before_is_used(name, material, single, tmp_path):
    options = ["checkpoint.save_interval=1", "checkpoint.keep=0"]
    checkpoints = tmp_path / "checkpoints"
    train_and_kill(overrides_of(material, tmp_path, *options), checkpoints / MOMENTS[name], tmp_path / "killed.yaml")
    found = newest(checkpoints)
    assert found is not None
    assert find_damage(found) is None
    run_distributed(train_rank, 1, overrides_of(material, tmp_path, *options))
    assert_same(records(tmp_path), single, tolerance=1e-6)
    assert sorted(p.name for p in checkpoints.iterdir()) == [f"step_00000{i}" for i in range(1, 5)]


def test_damage_is_named(tmp_path):
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(b"12345")
    assert find_damage(tmp_path) == "complete.json is missing or unreadable"
    write_manifest(tmp_path)
    assert find_damage(tmp_path) is None
    (tmp_path / "a.bin").write_bytes(b"1234")
    assert find_damage(tmp_path) == "a.bin has 4 bytes instead of 5"
    (tmp_path / "a.bin").unlink()
    assert find_damage(tmp_path) == "a.bin is missing"


def test_no_checkpoint_where_none_is_whole(tmp_path):
    assert newest(tmp_path) is None
    (tmp_path / "step_000001").mkdir()
    assert newest(tmp_path) is None


def test_a_checkpoint_of_other_prompts_is_refused(material, tmp_path):
    run_distributed(train_rank, 1, overrides_of(material, tmp_path, "training.exit_step=1"))
    other = tmp_path / "other.jsonl"
    lines = [json.loads(line) for line in (material / "prompts.jsonl").read_text().splitlines()]
    other.write_text("".join(json.dumps({**line, "id": f"q{i}"}) + "\n" for i, line in enumerate(lines)))
    with pytest.raises(RuntimeError, match=r"data\.prompts has changed since the checkpoint"):
        run_distributed(train_rank, 1, overrides_of(material, tmp_path, f"data.prompts={other}"))
