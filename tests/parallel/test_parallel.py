"""Process groups: one timeout for all of them, and who destroys them when."""

import datetime

import pytest
import torch.distributed as dist
from support.helpers import run_distributed

from megatron_tropd.config import ModelConfig


def timeouts_rank() -> list[datetime.timedelta]:
    import torch

    from megatron_tropd.parallel.groups import build_groups, initialize

    groups = initialize(ModelConfig(tensor_model_parallel_size=2), timeout_minutes=7)
    build_groups(ModelConfig(pipeline_model_parallel_size=2), groups)
    device, made = torch.device("cpu"), dist.distributed_c10d._world.pg_map
    used = [group for group in made if group.group_desc != "EXPERT_DATA_PARALLEL_GROUP_GLOO"]  # Megatron's, for nothing
    return [group._get_backend(device).options._timeout for group in used]


def test_every_group_of_both_models_has_the_recipes_timeout():
    for timeouts in run_distributed(timeouts_rank, 2):
        assert len(timeouts) > 10
        assert set(timeouts) == {datetime.timedelta(minutes=7)}


def lives_rank(error: Exception | None, has_groups: bool) -> bool:
    """Whether torch's default group is there after the context."""
    from megatron_tropd.parallel.groups import initialize
    from megatron_tropd.parallel.process_groups import process_groups

    if has_groups:
        initialize(ModelConfig())
    try:
        with process_groups(ModelConfig()) as groups:
            dist.barrier(group=groups.dp)
            if error:
                raise error
    except type(error or ()):
        pass
    return dist.is_initialized()


@pytest.mark.parametrize(
    ("processes", "error", "has_groups", "lives"),
    [
        (2, None, False, False),
        (2, ValueError("one rank's"), False, True),
        (1, ValueError("the only rank's"), False, False),
        (1, None, True, True),
        (1, ValueError("the only rank's"), True, True),
    ],
)
def test_groups_are_destroyed_where_no_other_rank_may_be_waiting_in_them(processes, error, has_groups, lives):
    assert run_distributed(lives_rank, processes, error, has_groups) == [lives] * processes


def _rank_zero_fails(kind):
    """Return what a rank sees of rank 0's failure; an exception that is no Exception must not leave others waiting."""
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_tropd.config import ModelConfig
    from megatron_tropd.parallel.groups import initialize, on_rank_zero

    initialize(ModelConfig())

    def fail():
        raise CheckpointException("no", {}) if kind == "checkpoint" else KeyboardInterrupt

    try:
        on_rank_zero(fail)
    except BaseException as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("kind", ["checkpoint", "interrupt"])
def test_field_cases_b5_every_failure_of_rank_zero_reaches_all_ranks(kind):
    first, second = run_distributed(_rank_zero_fails, 2, kind)
    assert second[0] == "RuntimeError"
    assert {"checkpoint": "CheckpointException", "interrupt": "KeyboardInterrupt"}[kind] in second[1]
    assert first[0] == {"checkpoint": "RuntimeError", "interrupt": "KeyboardInterrupt"}[kind]
