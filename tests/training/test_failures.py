"""An exception on one rank ends the whole job, although NCCL's groups cannot be destroyed while others wait in them."""

import importlib
import os
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
from support.helpers import run_distributed
from support.train_runs import overrides_of

from megatron_tropd.recipe import load_recipe, save_recipe

TP2 = [f"{role}.tensor_model_parallel_size=2" for role in ("student", "teacher")]


def plant(target: str, marker: Path) -> None:
    """Make `module:function` fail on rank 1, and the destruction of groups wait forever, as NCCL's does then."""

    def fail(*_, **__):
        raise RuntimeError("planted")

    def block(*_):
        marker.touch()
        threading.Event().wait()

    dist.destroy_process_group = block
    if os.environ["RANK"] == "1":
        module, _, path = target.partition(":")
        *owners, name = path.split(".")
        owner = importlib.import_module(f"megatron_tropd.{module}")
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, fail)


def command_rank(arguments: list[str], target: str, marker: Path) -> int:
    from megatron_tropd import cli

    plant(target, marker)
    cli._GRACE_SECONDS = 0.0
    return cli.main(arguments)


def library_rank(overrides: list[str], target: str, marker: Path) -> None:
    from megatron_tropd import train

    plant(target, marker)
    train(load_recipe(None, overrides))


COMMANDS = {  # name -> (arguments, what fails on rank 1 while rank 0 waits for it)
    "train": (["train", "{run}/recipe.yaml"], "training.loop:train_step"),
    "generate": (
        ["generate", "{run}/recipe.yaml", "--output", "{run}/responses.jsonl", "--max-new-tokens", "4"],
        "rollout.engine:RolloutEngine.generate",
    ),
    "convert": (
        ["convert", "hf-to-mcore", "--hf-path", "{material}/student", "--output", "{run}/student"],
        "models.convert:load_hf_weights",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_fails_on_one_rank_leaves_at_once(command, material, tmp_path):
    arguments, target = COMMANDS[command]
    save_recipe(load_recipe(None, overrides_of(material, tmp_path / "run", *TP2)), tmp_path / "recipe.yaml")
    words = [word.replace("{material}", str(material)).replace("{run}", str(tmp_path)) for word in arguments]
    with pytest.raises(RuntimeError, match="rank 1 died with exit code 1"):
        run_distributed(command_rank, 2, words, target, tmp_path / "marker")
    assert not (tmp_path / "marker").exists()


def test_a_caller_of_train_gets_the_exception(material, tmp_path):
    overrides = overrides_of(material, tmp_path, *TP2)
    with pytest.raises(RuntimeError, match="rank 1 failed:(.|\n)*RuntimeError: planted"):
        run_distributed(library_rank, 2, overrides, "training.loop:train_step", tmp_path / "marker")
    assert not (tmp_path / "marker").exists()


def apart_rank(overrides: list[str], target: str, marker: Path) -> None:
    """The teacher's process lives on after its failure: only its message can tell the student."""
    try:
        library_rank(overrides, target, marker)
    except RuntimeError:
        if os.environ["RANK"] == "1":
            threading.Event().wait()
        raise


def test_a_dedicated_teacher_that_fails_in_training_tells_the_student_why(material, tmp_path):
    overrides = overrides_of(material, tmp_path, "teacher.ranks=dedicated")
    with pytest.raises(RuntimeError, match="rank 0 failed:(.|\n)*another process failed: RuntimeError: planted"):
        run_distributed(apart_rank, 2, overrides, "teacher.hook:TeacherHook._run", tmp_path / "marker")
