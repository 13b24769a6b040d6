"""A job in two parts: the student's processes and, behind them, the teacher's own (`teacher.ranks=dedicated`).

Each part has a default process group to itself, so that what spans "all" ranks in Megatron (its parallel_state,
checkpoints, inference engines) spans one model's. Orders to the teacher's ranks go through the launcher's store,
tensors over a gloo group of both parts, the bridge: what crosses is small beside a step, and no GPU spins in NCCL, nor
runs into its watchdog, while the other part works for minutes.

    partition = split_processes(recipe)         # None where both models share all processes
    with process_groups(recipe.student, partition=partition) as groups: ...
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.config import Recipe, TeacherConfig
from megatron_tropd.errors import UserError
from megatron_tropd.methods import trains_on_data
from megatron_tropd.parallel.layout import model_ranks

# The other part may take hours to load its weights, to score a batch or to write responses. If it fails, it reports
# that; if a process dies, the launcher ends all others.
_PATIENCE = datetime.timedelta(days=7)
_GLANCE = datetime.timedelta(seconds=2)  # a wait is interrupted so often, to look whether another process failed


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
    """Whether the recipe has a teacher on dedicated ranks."""
    return recipe.teacher.ranks == "dedicated" and not trains_on_data(recipe.objective.name)


def teacher_size(teacher: TeacherConfig) -> int:
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
            student_size: the number of the student's processes, which come first.
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
            self._store.set("all_ready", json.dumps(True))
        self._take("all_ready")
        self.connect()

    def from_first_rank(self, make: Callable[[], Any]) -> Any:
        """Return, on every process of both parts, what `make` returns on the student's rank 0: a value of JSON.

        To be called once.

        Raises:
            UserError, RuntimeError: another process failed before (see `fail`).
        """
        if self.rank == 0 and not self.is_teacher:
            self._store.set("made", json.dumps(make()))
        return self._take("made")

    def fail(self, error: BaseException) -> None:
        """Tell all other processes what ends this one, so that they do not wait forever; the first failure counts."""
        is_user_error = isinstance(error, UserError)
        failure = [is_user_error, str(error) if is_user_error else f"{type(error).__name__}: {error}"]
        with contextlib.suppress(RuntimeError):  # the store's own process may have died: the launcher ends all
            self._store.compare_set("failure", "", json.dumps(failure))

    def order(self, name: str, **arguments: Any) -> None:
        """Tell the teacher's ranks what to do next; on the student's first rank, silent on its others."""
        self._orders += 1
        if self.rank == 0:
            self._store.set(f"order/{self._orders}", json.dumps([name, arguments]))

    def next_order(self) -> tuple[str, dict[str, Any]]:
        """Wait for the student's next order; on the teacher's ranks.

        Raises:
            UserError, RuntimeError: another process failed with it.
        """
        self._orders += 1
        name, arguments = self._take(f"order/{self._orders}")
        return name, arguments

    def wait(self, work: dist.Work) -> None:
        """Wait for a collective over `bridge`.

        Raises:
            UserError, RuntimeError: another process failed with it.
        """
        while True:
            try:
                work.wait(_GLANCE)
                return
            except RuntimeError as error:  # it takes longer, or a process that takes part has died
                self._raise_failure(error)
                if work.is_completed():
                    raise

    def finish(self) -> None:
        """Wait for the other part to come here too: the store may live in a process that is about to leave."""
        self.wait(dist.barrier(group=self.bridge, async_op=True))

    def close(self) -> None:
        """Give up the bridge; safe to call twice."""
        if self.bridge is not None:
            self.bridge.shutdown()
            self.bridge = None

    def _take(self, key: str) -> Any:
        """Wait for a value of the store, or raise another process's failure."""
        pause = 0.001
        while not self._store.check([key]):
            self._raise_failure()
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        return json.loads(self._store.get(key))

    def _raise_failure(self, cause: Exception | None = None) -> None:
        if self._store.check(["failure"]):
            is_user_error, message = json.loads(self._store.get("failure"))
            error = UserError(message) if is_user_error else RuntimeError(f"another process failed: {message}")
            raise error from cause
