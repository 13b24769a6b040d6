"""Merges the results of all ranks into one per check, through the launcher's store, even if a group hangs.

A rank that fails within a check leaves the others waiting in a collective, for half an hour. The ranks therefore agree
without collectives: each rank writes its result to the store, and a thread on each rank watches the store. If one rank
reports a failure and others report nothing, or a check takes far too long, rank 0 reports it and every process ends.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from megatron_tropd.doctor.report import Check, from_exception, merge

LIMIT_SECONDS = 900.0  # of one check: a large job's first connections and cold compilation take minutes
_GRACE_SECONDS = 15.0  # for the ranks behind one that stumbled
_LEAVE_SECONDS = 30.0  # until which the others stay for rank 0 to print
_PATIENCE = datetime.timedelta(minutes=30)


class Agreement:
    """Runs checks on all ranks; `abandon` is called on rank 0 with the check that some ranks never ended."""

    def __init__(self, rank: int, world_size: int, abandon: Callable[[Check], None], limit: float = LIMIT_SECONDS):
        """Connect to the store of torchrun; alone, there is none."""
        self.rank, self.world_size = rank, world_size
        self._abandon, self._limit = abandon, limit
        self._number = 0
        self._running: tuple[int, str, float] | None = None
        if world_size > 1:
            self._store = self._connect()
            threading.Thread(target=self._watch, args=(self._connect(),), daemon=True).start()

    def _connect(self) -> dist.Store:
        store, _, _ = next(dist.rendezvous("env://", self.rank, self.world_size, timeout=_PATIENCE))
        return dist.PrefixStore("doctor", store)

    def run(self, name: str, body: Callable[[], Check]) -> Check:
        """Run `body` on this rank and return the check of all ranks, the same on each; collective.

        An exception becomes a wrong check. With several ranks, `body` may use collectives freely.
        """
        self._number += 1
        self._running = (self._number, name, time.monotonic())
        try:
            mine = body()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            mine = from_exception(name, error)
        if self.world_size > 1:
            mine = self._agree(mine)
        self._running = None
        return mine

    def finish(self, last_words: Callable[[], int]) -> int:
        """Let rank 0 say its last words before any rank ends, whose exit status may end the job; return theirs."""
        status = last_words()
        if self.world_size > 1:
            with contextlib.suppress(RuntimeError):  # where rank 0 holds the store it may be gone
                if self.rank == 0:
                    self._store.set("finished", "1")
                else:
                    self._read("finished")
        return status

    def _agree(self, mine: Check) -> Check:
        number = self._number
        text = json.dumps(mine.record())
        if mine.raised:
            self._store.set(f"{number}/failure", json.dumps([self.rank, text]))
        self._store.set(f"{number}/{self.rank}", text)
        if self.rank == 0:  # it alone reads all reports, so that a thousand ranks do not ask for a thousand each
            reports = [self._read(f"{number}/{rank}") for rank in range(self.world_size)]
            together = merge([Check(**json.loads(report)) for report in reports])
            self._store.set(f"{number}/verdict", json.dumps(together.record()))
        return Check(**json.loads(self._read(f"{number}/verdict")))

    def _read(self, key: str) -> str:
        self._store.wait([key], _PATIENCE)
        return self._store.get(key).decode()

    def _watch(self, store: dist.Store) -> None:
        failed_at: dict[int, float] = {}
        while True:
            time.sleep(0.5)
            running = self._running
            if running is None:
                continue
            number, name, started = running
            now = time.monotonic()
            try:
                if number not in failed_at and store.check([f"{number}/failure"]):
                    failed_at[number] = now
            except RuntimeError:  # the store is gone: the launcher ends the job
                return
            late = now - started > self._limit
            if self._running is running and (late or now - failed_at.get(number, now) > _GRACE_SECONDS):
                self._give_up(store, number, name)

    def _give_up(self, store: dist.Store, number: int, name: str) -> None:
        """End this process; on rank 0, first say why. The main thread is stuck."""
        if self.rank > 0:
            # A rank that left earlier would break the connection in which rank 0 waits, and hide what went wrong.
            with contextlib.suppress(RuntimeError):
                store.wait([f"{number}/abandoned"], datetime.timedelta(seconds=_LEAVE_SECONDS))
            os._exit(1)
        try:
            waiting = [rank for rank in range(self.world_size) if not store.check([f"{number}/{rank}"])]
            if store.check([f"{number}/failure"]):
                rank, text = json.loads(store.get(f"{number}/failure"))
                check = Check(**json.loads(text))
                detail = f"rank {rank}: {check.detail}; ranks {_listed(waiting)} still waited for it"
            else:
                detail = f"ranks {_listed(waiting)} did not end it within {self._limit:.0f} s"
            remedy = "set NCCL_DEBUG=INFO (on a CPU TORCH_DISTRIBUTED_DEBUG=DETAIL) and run again"
            self._abandon(Check(name, "wrong", detail, remedy, raised=True))
        finally:
            with contextlib.suppress(RuntimeError):
                store.set(f"{number}/abandoned", "1")
            os._exit(1)


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown} and {len(ranks) - 8} more" if len(ranks) > 8 else shown
