"""Process groups for the duration of a job: how they end, also if a rank fails.

with process_groups(recipe.student, seed=recipe.training.seed) as groups:
    model = build_model(hf_config, recipe.student, groups)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_tropd.config import ModelConfig
from megatron_tropd.parallel.groups import ParallelGroups, initialize, shutdown

if TYPE_CHECKING:
    from megatron_tropd.parallel.partition import Partition


@contextmanager
def process_groups(
    layout: ModelConfig,
    seed: int = 1234,
    partition: Partition | None = None,
    timeout_minutes: int = 30,
    role: str | None = None,
) -> Iterator[ParallelGroups]:
    """Start process groups as `initialize` does; at the end destroy them, unless an exception ends the context.

    Destroying NCCL's groups waits for the other ranks, which may be waiting in a collective for the rank that failed.
    The failed rank must exit its process, as the command line does at once, so that the launcher ends the others.
    Groups that existed before the call are kept.
    """
    is_first = not dist.is_initialized()
    try:
        yield initialize(layout, seed, partition=partition, timeout_minutes=timeout_minutes, role=role)
    except BaseException:
        is_alone = partition is None and dist.is_initialized() and dist.get_world_size() == 1
        if is_first and is_alone:
            shutdown()
        raise
    if is_first:
        shutdown()
