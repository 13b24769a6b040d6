"""`dtype: auto`: the decision of rank 0 counts on every rank and in both parts of a job; other values stay."""

import os

import pytest
import torch
from support.helpers import run_distributed

from megatron_tropd import UserError, load_recipe
from megatron_tropd.config import ModelConfig
from megatron_tropd.machine.product_speed import product_speeds
from megatron_tropd.models.auto_dtype import auto_keys, resolve_dtypes
from megatron_tropd.models.build import transformer_config

BOTH = ["student.dtype=auto", "teacher.dtype=auto"]


def resolve_rank(overrides, without_bf16):
    """Resolve a recipe on this rank; `without_bf16`: the ranks whose library may not use bf16 units.

    Returns what this rank would take, then both dtypes, and what resolve_dtypes said.
    """
    from megatron_tropd.parallel.groups import initialize, shutdown
    from megatron_tropd.parallel.partition import split_processes

    if int(os.environ["RANK"]) in without_bf16:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    speeds = product_speeds()
    recipe = load_recipe(None, overrides)
    partition = split_processes(recipe)
    if partition is None:
        initialize(ModelConfig())
    text = resolve_dtypes(recipe, partition)
    if partition is None:
        shutdown()
    return max(speeds, key=speeds.get), recipe.student.dtype, recipe.teacher.dtype, text


@pytest.mark.parametrize("apart", [False, True], ids=["shared", "dedicated"])
@pytest.mark.parametrize("without_bf16", [[0], [1]])
def test_all_ranks_take_what_rank_0_measures(without_bf16, apart):
    overrides = [*BOTH, *(["teacher.ranks=dedicated"] if apart else [])]
    (mine, *first), (others, *second) = run_distributed(resolve_rank, 2, overrides, without_bf16)
    if torch.cpu.get_capabilities().get("avx512_bf16"):
        assert mine != others
    assert first == second
    assert first[0] == first[1] == mine
    assert f"student.dtype and teacher.dtype: auto is {mine} on this CPU" in first[2]


def test_a_key_that_is_not_auto_stays():
    ((mine, *found),) = run_distributed(resolve_rank, 1, ["student.dtype=float16", "teacher.dtype=auto"], [])
    assert found[:2] == ["float16", mine]
    assert "teacher.dtype: auto is" in found[2]
    assert "student" not in found[2]
    recipe = load_recipe(None, ["student.dtype=float16"])
    assert auto_keys(recipe) == []
    assert resolve_dtypes(recipe) is None  # and asks no other rank


def test_a_model_is_not_built_while_its_dtype_is_open():
    from megatron_tropd.models.build import load_hf_config

    config = load_hf_config("examples/tiny/student")
    with pytest.raises(UserError, match=r"student\.dtype=auto is open: call megatron_tropd\.resolve_dtypes"):
        transformer_config(config, ModelConfig(dtype="auto"), "student")


def test_a_wrong_value_is_refused_with_the_choices():
    with pytest.raises(UserError, match="expected one of auto, float32, bfloat16, float16"):
        load_recipe(None, ["student.dtype=bf16"])
