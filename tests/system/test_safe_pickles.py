"""A checkpoint that would run code is refused before it can, and what this program writes needs no such thing."""

import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from support.helpers import run_distributed
from support.single_runs import refused, run
from support.train_runs import assert_same, records

from megatron_tropd.errors import UserError
from megatron_tropd.models.manifest import write_manifest
from megatron_tropd.system.safe_pickles import check_folder, load_plain


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def halfway(material, tmp_path_factory):
    """A run after two of four steps."""
    folder = tmp_path_factory.mktemp("halfway") / "run"
    run(material, folder, "training.exit_step=2")
    return folder


def poison(checkpoint, name, bomb):
    """Put the bomb into a file of the checkpoint, whose list of files then says that it is whole."""
    path = checkpoint / name
    if path.name == ".metadata":
        metadata = pickle.loads(path.read_bytes())
        metadata.planner_data = bomb
        path.write_bytes(pickle.dumps(metadata))
    else:
        torch.save({**torch.load(path, weights_only=False), "more": bomb}, path)
    if (checkpoint / "model") in path.parents:
        write_manifest(checkpoint / "model")
    write_manifest(checkpoint)


PLACES = ["model/.metadata", "optimizer/.metadata", "rng/rank_00000.pt", "model/common.pt", "optimizer/common.pt"]


@pytest.mark.parametrize("name", PLACES)
def test_field_cases_b17_code_in_a_checkpoint_does_not_run(name, halfway, material, tmp_path):
    shutil.copytree(halfway, tmp_path / "run")
    checkpoint, made = tmp_path / "run" / "checkpoints" / "step_000002", tmp_path / "made"
    if not (checkpoint / name).exists():
        pytest.skip(f"this version of megatron-core writes no {name}")
    poison(checkpoint, name, Bomb(made))
    message = refused(material, tmp_path / "run")
    assert str(checkpoint / name.split("/")[0]) in message
    assert not made.exists()


def test_random_states_that_cannot_be_read_can_be_done_without(halfway, material, tmp_path):
    shutil.copytree(halfway, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    poison(checkpoint, "rng/rank_00000.pt", Bomb(tmp_path / "made"))
    assert "training.seed" in refused(material, tmp_path / "run")
    assert run(material, tmp_path / "run", "training.seed=5")["steps"] == 4
    assert not (tmp_path / "made").exists()


def test_field_cases_b17_random_states_of_earlier_versions_are_read(halfway, material, tmp_path):
    """They held numpy's own arrays."""
    shutil.copytree(halfway, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_000002" / "rng" / "rank_00000.pt"
    states = torch.load(path, weights_only=True)
    name, keys, *rest = states["numpy"]
    torch.save({**states, "numpy": (name, keys.numpy().astype(np.uint32), *rest)}, path)
    write_manifest(path.parents[1])
    run(material, tmp_path / "run")
    run(material, tmp_path / "whole")
    assert_same(records(tmp_path / "run"), records(tmp_path / "whole"), tolerance=0.0)


def states_rank(folder):
    from megatron_tropd.config import ModelConfig
    from megatron_tropd.machine.random_states import load_random_states, save_random_states
    from megatron_tropd.parallel.groups import initialize

    initialize(ModelConfig())

    def draw():
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    draw()
    save_random_states(folder / "states.pt")
    first = draw()
    load_random_states(folder / "states.pt")
    return first, draw()


def test_random_states_are_plain_and_go_on_to_the_bit(tmp_path):
    ((first, again),) = run_distributed(states_rank, 1, tmp_path)
    assert first == again
    assert torch.load(tmp_path / "states.pt", weights_only=True)["numpy"][0] == "MT19937"


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.distributed.checkpoint.metadata.os.system"])
def test_names_that_an_index_needs_not_are_refused(name, tmp_path):
    module, _, function = name.rpartition(".")
    if name.startswith("torch"):
        module, function = "torch.distributed.checkpoint.metadata", "os.system"
    code = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, function)) + b"\x93."
    (tmp_path / ".metadata").write_bytes(code)
    with pytest.raises(UserError, match="could run code"):
        check_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"text", b"\x80\x04N."])
def test_an_index_that_is_cut_short_is_named(content, tmp_path):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        check_folder(tmp_path)


def test_objects_of_a_checkpoint_are_looked_at_too(tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save({"w": torch.zeros(3), "plain": {"a": [1, "x"]}}, checkpoint_id=tmp_path / "plain", no_dist=True)
    check_folder(tmp_path / "plain")
    dcp.save({"w": torch.zeros(3), "bomb": Bomb(tmp_path / "made")}, checkpoint_id=tmp_path / "bomb", no_dist=True)
    with pytest.raises(UserError, match="could run code"):
        check_folder(tmp_path / "bomb")
    assert not (tmp_path / "made").exists()


def test_plain_files_are_loaded(tmp_path):
    content = {"a": torch.ones(2), "b": (1, 2.5, None, "x"), "c": np.arange(3, dtype=np.uint32)}
    torch.save(content, tmp_path / "file.pt")
    loaded = load_plain(tmp_path / "file.pt")
    assert loaded["b"] == content["b"]
    assert loaded["c"].tolist() == [0, 1, 2]
    json.dumps(loaded["b"])
