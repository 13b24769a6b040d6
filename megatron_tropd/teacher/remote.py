"""A teacher on dedicated ranks: the proxy on the student's ranks, and the serving loop on the teacher's.

teacher = RemoteTeacher(partition, Exchange(groups, None, partition.bridge), ...)   # on the student's ranks
summary = serve(hook, partition)                                                    # on the teacher's
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from megatron_tropd.parallel.partition import Partition
from megatron_tropd.parallel.termination import TerminationFlag
from megatron_tropd.teacher.exchange import Exchange
from megatron_tropd.teacher.hook import TeacherHook
from megatron_tropd.teacher.score_format import ScoreFormat
from megatron_tropd.types import TeacherScores, TrainingBatch


class RemoteTeacher:
    """On the student's ranks, `TeacherHook` as far as training and measuring go; each call is collective over both."""

    def __init__(
        self,
        partition: Partition,
        exchange: Exchange,
        topk: int,
        hidden_size: int,
        dtype: torch.dtype,
        with_entropy: bool = True,
        with_hidden: bool = False,
    ):
        """Describe what comes back.

        Args:
            partition: whose other part serves.
            exchange: over its bridge.
            topk: number of most probable tokens of the teacher's hook.
            hidden_size: the teacher's.
            dtype: of the teacher's parameters.
            with_entropy: whether the teacher's hook returns the entropy.
            with_hidden: whether it returns the hidden states.
        """
        self.exchange = exchange
        self._partition = partition
        self._hidden = (hidden_size, dtype)
        self._format = ScoreFormat(topk, with_entropy, *(self._hidden if with_hidden else ()))

    def score(self, batch: TrainingBatch, micro_batch_size: int, max_tokens: int | None = None) -> TeacherScores | None:
        """Return what `TeacherHook.score` returns."""
        self._partition.order("score", micro_batch_size=micro_batch_size, max_tokens=max_tokens)
        share = self.exchange.distribute(batch, micro_batch_size)
        packed = self.exchange.collect(None, share, self._format.channels, torch.int32)
        return None if packed is None else self._format.unpack(packed)

    def hidden_states(self, batch: TrainingBatch, micro_batch_size: int) -> torch.Tensor | None:
        """Return what `TeacherHook.hidden_states` returns."""
        self._partition.order("hidden_states", micro_batch_size=micro_batch_size)
        share = self.exchange.distribute(batch, micro_batch_size)
        return self.exchange.collect(None, share, *self._hidden)

    def output_weight(self, width: int) -> torch.Tensor | None:
        """Return what `TeacherHook.output_weight` returns."""
        self._partition.order("output_weight", width=width)
        return self.exchange.reshard_output_weight(None, width, *self._hidden)

    def weights(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: the weights never leave their device."""
        return contextlib.nullcontext()


def serve(hook: TeacherHook, partition: Partition) -> dict[str, Any]:
    """Follow the student's orders until it is done; on the teacher's ranks.

    SIGTERM and Ctrl-C are left to the student, which saves a checkpoint first and needs scores until then.

    Returns:
        The summary of the run.

    Raises:
        UserError, RuntimeError: the student's part failed with it.
    """
    with TerminationFlag():
        while True:
            name, arguments = partition.next_order()
            if name == "stop":
                return arguments["summary"]
            if name == "output_weight":
                hook.output_weight(**arguments)
            elif name == "score":
                hook.score(None, **arguments)
            else:
                assert name == "hidden_states"
                hook.hidden_states(None, **arguments)
