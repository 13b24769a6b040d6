"""A job in two parts: who belongs where, what a part's process group spans, how one learns of the other's end."""

import os

import pytest
import torch
from support.helpers import run_distributed

from megatron_tropd.errors import UserError
from megatron_tropd.parallel.partition import has_dedicated_teacher, student_size, teacher_size
from megatron_tropd.recipe import load_recipe

APART = ["teacher.ranks=dedicated", "teacher.tensor_model_parallel_size=2"]


def open_partition(students: int):
    from megatron_tropd.config import ModelConfig
    from megatron_tropd.parallel import groups as parallel
    from megatron_tropd.parallel.partition import Partition

    partition = Partition(int(os.environ["RANK"]), students, int(os.environ["WORLD_SIZE"]))
    groups = parallel.initialize(ModelConfig(), partition=partition)
    return partition, groups


def test_the_teacher_takes_what_its_layout_and_replicas_need():
    recipe = load_recipe(None, [*APART, "teacher.pipeline_model_parallel_size=3", "teacher.replicas=2"])
    assert teacher_size(recipe.teacher) == 12
    assert student_size(recipe, 16) == 4
    for processes in (12, 5):
        with pytest.raises(UserError, match=f"takes the last 12 .* leaves the student none of {processes}; start more"):
            student_size(recipe, processes)


def test_an_objective_without_a_teacher_leaves_all_ranks_to_the_student():
    assert has_dedicated_teacher(load_recipe(None, APART))
    assert not has_dedicated_teacher(load_recipe(None, [*APART, "objective.name=sft"]))
    assert not has_dedicated_teacher(load_recipe(None, []))


def parts_rank(students):
    partition, groups = open_partition(students)
    partition.meet()
    place = torch.tensor([partition.rank], dtype=torch.long)
    gathered = torch.empty(partition.size + partition.other_size, dtype=torch.long)
    torch.distributed.all_gather_into_tensor(gathered, place, group=partition.bridge)
    partition.finish()
    partition.close()
    partition.close()
    return partition.role, groups.rank, groups.world_size, groups.dp_size, gathered.tolist()


def test_each_part_has_a_default_process_group_to_itself_and_the_bridge_spans_both():
    found = run_distributed(parts_rank, 5, 3)
    assert [role for role, *_ in found] == ["student"] * 3 + ["teacher"] * 2
    assert [rank for _, rank, *_ in found] == [0, 1, 2, 0, 1]
    assert [sizes for _, _, *sizes, _ in found] == [[3, 3]] * 3 + [[2, 2]] * 2
    assert all(gathered == [0, 1, 2, 0, 1] for *_, gathered in found)


def orders_rank():
    partition, _ = open_partition(2)
    partition.meet()
    if partition.is_teacher:
        return [partition.next_order() for _ in range(3)]
    for step in range(2):
        partition.order("score", step=step)
    partition.order("stop")
    return []


def test_every_rank_of_the_teacher_gets_every_order_once_and_in_turn():
    found = run_distributed(orders_rank, 4)
    assert found[2] == found[3] == [("score", {"step": 0}), ("score", {"step": 1}), ("stop", {})]


def fails_early(role, error):
    """One part fails before the two meet: what the other one is told."""
    partition, _ = open_partition(1)
    if partition.role == role:
        partition.fail(error)
        return None
    with pytest.raises((UserError, RuntimeError)) as raised:
        partition.meet()
    return raised.type.__name__, str(raised.value)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_part_that_fails_before_it_is_ready_ends_the_other(role):
    found = run_distributed(fails_early, 2, role, UserError("teacher.hf_path: no such folder"))
    assert ("UserError", "teacher.hf_path: no such folder") in found
    found = run_distributed(fails_early, 2, role, KeyError("weight"))
    assert ("RuntimeError", "another process failed: KeyError: 'weight'") in found


def fails_late(failing, where):
    """The process of rank `failing` fails after all have met, and lives on: the others are told where they wait."""
    partition, _ = open_partition(2)
    partition.meet()
    if int(os.environ["RANK"]) == failing:
        partition.fail(ValueError("no tokens"))
        return None  # the process stays until all have returned
    with pytest.raises(RuntimeError, match="another process failed: ValueError: no tokens"):
        partition.next_order() if where == "order" else partition.finish()
    return True


@pytest.mark.parametrize(
    ("failing", "where"), [(1, "order"), (0, "bridge"), (3, "bridge")], ids=lambda value: str(value)
)
def test_a_process_that_fails_in_training_ends_those_that_wait_for_it(failing, where):
    found = run_distributed(fails_late, 4, failing, where)
    assert found == [None if rank == failing else True for rank in range(4)]
