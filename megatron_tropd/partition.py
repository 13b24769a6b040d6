"""A job in two parts: the student's processes and, behind them, the teacher's own (`teacher.ranks=dedicated`).

Each part has a default process group to itself, so that what spans "all" ranks in Megatron (its parallel_state,
checkpoints, inference engines) spans one model's. Orders to the teacher's ranks go through the launcher's store,
tensors over a gloo group of both parts, the bridge: what crosses is small beside a step, and no GPU spins in NCCL, nor
runs into its watchdog, while the other part works for minutes.

    partition = split_processes(recipe)         # None where both models share all processes
    groups = initialize(recipe.student, partition=partition)
"""

from __future__ import annotations

import datetime
import json
import os
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.config import DATA_OBJECTIVES, ModelConfig, Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.layout import model_ranks

# The other part may take hours to load its weights, to score a batch or to write responses. Where a process died the
# launcher ends the wait, with all others.
_PATIENCE = datetime.timedelta(days=7)


def split_processes(recipe: Recipe) -> Partition | None:
    """Divide torchrun's processes as the recipe says; collective, touches no device.

    Raises:
        UserError: the teacher's ranks leave none to the student.
    """
    if not has_dedicated_teacher(recipe):
        return None
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    return Partition(rank, student_size(recipe, world_size), world_size)


def has_dedicated_teacher(recipe: Recipe) -> bool:
    """Whether the recipe has a teacher at all, on ranks of its own."""
    return recipe.teacher.ranks == "dedicated" and recipe.objective.name not in DATA_OBJECTIVES


def teacher_size(teacher: ModelConfig) -> int:
    """Return how many ranks a dedicated teacher has."""
    return model_ranks(teacher) * teacher.replicas


def student_size(recipe: Recipe, world_size: int) -> int:
    """Return how many of `world_size` processes a dedicated teacher leaves to the student; UserError if none."""
    own = teacher_size(recipe.teacher)
    if own >= world_size:
        raise UserError(
            f"teacher.ranks=dedicated takes the last {own} processes for teacher.replicas={recipe.teacher.replicas} of "
            f"the teacher's layout and leaves the student none of {world_size}; start more than {own} "
            "(torchrun --nproc-per-node), or set teacher.ranks=shared"
        )
    return world_size - own


class Partition:
    """This process's part, and its ways to the other one."""

    def __init__(self, rank: int, student_size: int, world_size: int):
        """Meet the other processes at torchrun's store.

        Args:
            rank: of all processes.
            student_size: the first so many are the student's.
            world_size: of all.
        """
        self.is_teacher = rank >= student_size
        self.role = "teacher" if self.is_teacher else "student"
        self.rank = rank - student_size if self.is_teacher else rank
        self.size = world_size - student_size if self.is_teacher else student_size
        self.other_size = world_size - self.size
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=datetime.timedelta(minutes=30)))
        self._store = dist.PrefixStore("partition", store)
        self.store = dist.PrefixStore(self.role, self._store)  # of this part's default process group
        self.bridge: dist.ProcessGroup | None = None
        self._place = (rank, world_size)  # of all processes
        self._has_met = False
        self._orders = 0  # given or taken so far

    def connect(self) -> None:
        """Open `bridge`, for tensors in host memory; collective over both parts."""
        store = dist.PrefixStore("bridge", self._store)
        # init_process_group makes the one default group of a process; another over other ranks is put together by hand.
        backend = dist.ProcessGroupGloo(store, *self._place, _PATIENCE)
        backend._set_sequence_number_for_group()
        self.bridge = dist.ProcessGroup(store, *self._place)
        self.bridge._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self.bridge._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)

    def meet(self) -> None:
        """Wait until every process of both parts is ready, and open `bridge`.

        Raises:
            UserError, RuntimeError: what kept another process from it (see `fail`).
        """
        if self._store.add("ready", 1) == self._place[1]:
            self._store.set("verdict", json.dumps(None))
        self._has_met = True
        _raise_failure(self._take("verdict"))
        self.connect()

    def fail(self, error: Exception) -> None:
        """Tell the other part what ends this one, so that it does not wait for ever."""
        is_user_error = isinstance(error, UserError)
        failure = [is_user_error, str(error) if is_user_error else f"{type(error).__name__}: {error}"]
        if not self._has_met:
            self._store.set("verdict", json.dumps(failure))
        elif not self.is_teacher:
            self.order("fail", failure=failure)

    def order(self, name: str, **arguments: Any) -> None:
        """Tell the teacher's ranks what to do next; on the student's first rank, silent on its others."""
        self._orders += 1
        if self.rank == 0:
            self._store.set(f"order/{self._orders}", json.dumps([name, arguments]))

    def next_order(self) -> tuple[str, dict[str, Any]]:
        """Wait for the student's next order; on the teacher's ranks.

        Raises:
            UserError, RuntimeError: the student's part failed with it.
        """
        self._orders += 1
        name, arguments = self._take(f"order/{self._orders}")
        if name == "fail":
            _raise_failure(arguments["failure"])
        return name, arguments

    def finish(self) -> None:
        """Wait for the other part to come here too: the store may live in a process that is about to leave."""
        dist.barrier(group=self.bridge)

    def close(self) -> None:
        """Give up the bridge; safe to call twice."""
        if self.bridge is not None:
            self.bridge.shutdown()
            self.bridge = None

    def _take(self, key: str) -> Any:
        self._store.wait([key], _PATIENCE)
        return json.loads(self._store.get(key))


def _raise_failure(failure: tuple[bool, str] | None) -> None:
    if failure is not None:
        is_user_error, message = failure
        raise UserError(message) if is_user_error else RuntimeError(f"another process failed: {message}")
