"""Checkpoints under a kill at any moment: what is found afterwards is whole, and the run goes on from it exactly."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from support.helpers import run_distributed
from support.train_runs import assert_same, overrides_of, records, refused_rank, train_rank
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tropd.config import ModelConfig, TrainingConfig
from megatron_tropd.mcore.compat import allocate_optimizer_state
from megatron_tropd.models.build import build_model, load_hf_config
from megatron_tropd.models.convert import load_model_weights
from megatron_tropd.models.manifest import MANIFEST, find_damage, write_manifest
from megatron_tropd.parallel.groups import initialize
from megatron_tropd.training.checkpoint import TrainingState, layout_of, load, newest, save
from megatron_tropd.training.student import build_student

MOMENTS = {  # a file or folder of the second checkpoint; the kill comes with the first file operation once it is there
    "as_it_begins": ".step_000002.tmp",
    "within_the_weights": ".step_000002.tmp/model/hf/config.json",
    "within_the_optimizer": ".step_000002.tmp/optimizer/.metadata",
    "before_it_gets_its_name": f".step_000002.tmp/{MANIFEST}",
}


def train_until_killed(overrides: list[str], moment: Path) -> None:
    """Train on a rank that kills itself at the moment, whatever else the machine does meanwhile."""

    def kill_at_the_moment(event: str, arguments: tuple) -> None:
        if event in ("open", "os.mkdir", "os.rename") and os.path.exists(moment):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill_at_the_moment)
    train_rank(overrides)


@pytest.mark.parametrize("name", MOMENTS)
def test_after_a_kill_during_a_checkpoint_the_one_before_is_used(name, material, single, tmp_path):
    options = ["checkpoint.save_interval=1", "checkpoint.keep=0"]
    checkpoints = tmp_path / "checkpoints"
    moment = checkpoints / MOMENTS[name]
    with pytest.raises(RuntimeError, match=f"rank 0 died with exit code -{signal.SIGKILL:d}"):
        run_distributed(train_until_killed, 1, overrides_of(material, tmp_path, *options), moment)
    assert moment.exists()
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


def train_and_write_as_before(overrides: list[str]) -> dict:
    """Train with checkpoints in the format of earlier versions: every data-parallel rank has the whole state."""
    from megatron_tropd.training import checkpoint

    checkpoint._OPTIMIZER_FORMAT.pop("distrib_optim_fully_reshardable_mem_efficient")
    return train_rank(overrides)


def test_a_checkpoint_that_every_rank_wrote_is_resumed_to_the_bit(material, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_distributed(train_rank, 2, overrides_of(material, whole))
    run_distributed(train_and_write_as_before, 2, overrides_of(material, halves, "training.exit_step=2"))
    run_distributed(train_rank, 2, overrides_of(material, halves))
    assert_same(records(halves), records(whole), tolerance=0.0)


class Allocations(TorchDispatchMode):
    """Remembers the elements of the largest floating-point tensor that an operation made, views of arguments left out.

    Megatron's metadata goes round as bytes.
    """

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        arguments = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                continue
            if tensor.untyped_storage().data_ptr() not in arguments:
                self.largest = max(self.largest, tensor.numel())
        return result


def save_and_load_counting(model_path: str, directory: str, options: dict) -> tuple[list, list[int], bool]:
    """Return buffers as (data-parallel rank, elements), the largest tensors made in saving and loading, and success."""
    model = ModelConfig(hf_path=model_path, dtype="float32", **options)
    groups = initialize(model)
    modules = build_model(load_hf_config(model_path), model, groups)
    load_model_weights(modules, model, groups)
    student = build_student(modules, TrainingConfig(steps=4), groups, modules[0].true_vocab_size)
    allocate_optimizer_state(student.optimizer)
    states = [s for o in student.optimizer.chained_optimizers for s in o.optimizer.state.values()]
    moments = [s[name] for s in states for name in ("exp_avg", "exp_avg_sq")]
    for i, moment in enumerate(moments):
        moment.copy_(torch.randn(moment.shape, generator=torch.Generator().manual_seed(i)) ** 2)
    before = [moment.clone() for moment in moments]
    recipe = Path(directory, f"recipe{groups.rank}.yaml")
    recipe.write_text("")
    with Allocations() as saved:
        path = save(directory, student, TrainingState(1, {}, layout_of(groups)), model_path, recipe, keep=0)
    for moment in moments:
        moment.zero_()
    with Allocations() as loaded:
        load(path, student)
    buffers = [b for chunk in student.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
    sizes = [(b.data_parallel_group.rank(), b.numel_unpadded) for b in buffers]
    return sizes, [saved.largest, loaded.largest], all(map(torch.equal, before, moments))


@pytest.mark.parametrize(
    ("name", "processes", "options"),
    [("student", 2, {}), ("experts", 4, {"expert_model_parallel_size": 2})],
    ids=["dp2", "experts_ep2"],
)
def test_one_data_parallel_rank_alone_holds_the_whole_optimizer_state(name, processes, options, material, tmp_path):
    ranks = run_distributed(save_and_load_counting, processes, str(material / name), str(tmp_path), options)
    assert all(same for *_, same in ranks)
    for buffers, largest, _ in ranks:
        whole = max((size for rank, size in buffers if rank == 0), default=0)
        # Others make no more than their own share in saving, and one parameter in loading.
        bound = max(1.01 * whole, 0.6 * max(size for _, size in buffers))  # padding comes on top of the whole
        assert all(whole <= size <= bound for size in largest), (buffers, largest)
    assert any(rank > 0 for buffers, *_ in ranks for rank, _ in buffers)


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_field_cases_b5_files_with_other_bytes_are_named_by_their_folder(part, material, tmp_path):
    """Their sizes are right, so that only reading them finds it out."""
    run_distributed(train_rank, 1, overrides_of(material, tmp_path, "training.exit_step=1"))
    folder = tmp_path / "checkpoints" / "step_000001" / part
    for path in folder.glob("*.distcp"):
        path.write_bytes(b"\x00" * path.stat().st_size)
    (message,) = run_distributed(refused_rank, 1, overrides_of(material, tmp_path))
    if f"{folder} is not a checkpoint of plain data alone" not in message:  # newer versions keep objects in these files
        assert f"checkpoint {folder} cannot be read" in message
        assert "move it away" in message
