"""Moves batches from student ranks to teacher ranks, and scores back, where their layouts differ.

Both models share the same ranks and take turns, or have dedicated ranks. Each teacher replica scores its share of
the global batch; the scores of the tokens with a loss then travel from the teacher's last stages to the student's last
stages in one exchange.

    exchange = Exchange(student_groups, teacher_groups)
    share = exchange.distribute(batch, micro_batch_size=4)      # rows of this teacher replica
    scores = exchange.collect(payload, share, 131, torch.int32)  # rows of this student replica, on its last stage
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist

from megatron_tropd.parallel.groups import ParallelGroups
from megatron_tropd.rounding import ceil_div, round_up
from megatron_tropd.types import LOSS_NONE, TrainingBatch

# A rank sends at most this at a time: the scores of a batch at once, hidden states perhaps in several parts.
_SENT_BYTES = 1 << 28


@dataclass(frozen=True)
class _Place:
    """A rank's coordinates in one model's layout."""

    is_last_stage: bool
    tp: int
    dp: int
    micro_batch_multiple: int
    token_multiple: int

    @staticmethod
    def numbers_of(groups: ParallelGroups | None, token_multiple: int = 1) -> list[int]:
        """Return a rank's place as numbers to gather; without `groups` it has none."""
        if groups is None:
            return [-1] * 5
        multiples = (groups.micro_batch_multiple, token_multiple)
        return [int(groups.is_last_stage), groups.tp_rank, groups.dp_rank, *multiples]

    @classmethod
    def of(cls, numbers: list[int]) -> _Place | None:
        """Undo `numbers_of`."""
        return None if numbers[0] < 0 else cls(bool(numbers[0]), *numbers[1:])


@dataclass(frozen=True)
class Share:
    """One teacher replica's rows of the global batch, and what every rank must know to send the scores back."""

    batch: TrainingBatch | None  # [rows, s] on the teacher's ranks; filler rows without loss at the end
    loss_kind: torch.Tensor | None  # [b, s] of this student replica's batch, on the student's ranks
    rows: int  # of each teacher replica
    own_rows: int  # of each student replica
    counts: list[int]  # loss tokens of every row of the global batch


class Exchange:
    """Carries batches to the teacher's replicas and scores to the student's; each call is collective over all ranks."""

    def __init__(
        self,
        student: ParallelGroups | None,
        teacher: ParallelGroups | None,
        world: dist.ProcessGroup | None = None,
        token_multiple: int = 8,
        wait: Callable[[dist.Work], object] = dist.Work.wait,
    ):
        """Gather every rank's coordinates in both layouts.

        Args:
            student: the student's process groups, None on ranks without a part of it.
            teacher: the same of the teacher.
            world: a group over all ranks of both, for tensors in host memory; default: torch.distributed's own, for
                tensors on the device.
            token_multiple: the teacher's sequences are rounded up to it; read on its ranks.
            wait: for a collective; a partition's own learns of the other part's end.
        """
        self.student, self.teacher = student, teacher
        own, everyone = student or teacher, world or dist.group.WORLD
        assert own is not None  # every rank has a part of one of the models
        assert everyone is not None  # torch.distributed runs
        self.device = own.device
        self._world, self._wait = everyone, wait
        self._wire = torch.device("cpu") if world else self.device
        numbers = [*_Place.numbers_of(student), *_Place.numbers_of(teacher, token_multiple)]
        places = self._gather(torch.tensor(numbers, device=self.device)).tolist()
        self._students, self._teachers = ([_Place.of(p[part]) for p in places] for part in (slice(5), slice(5, None)))
        self._holders = _ranks_by_replica(self._students, lambda place: True)
        self._last_stages = _ranks_by_replica(self._teachers, lambda place: place.is_last_stage)

    def _gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Return every rank's tensor [n] as [ranks, n]."""
        mine = mine.to(self._wire)
        gathered = mine.new_empty(self._world.size() * mine.numel())
        self._wait(dist.all_gather_into_tensor(gathered, mine, group=self._world, async_op=True))
        return gathered.view(self._world.size(), -1)

    def distribute(self, batch: TrainingBatch | None, micro_batch_size: int) -> Share:
        """Send the student replicas' batches to the teacher's; each takes a contiguous part of the global batch.

        Args:
            batch: this student replica's rows [b, s]; b is the same on every replica, s need not be. None on ranks
                without a part of the student.
            micro_batch_size: the teacher's; its rows are filled up to a multiple (of the pipeline, interleaved).

        Raises:
            ValueError: the replicas' batches have different numbers of rows.
        """
        own_rows, width = self._agree_on_shape(batch)
        counts = torch.zeros(own_rows, dtype=torch.long, device=self.device)
        packed = torch.empty(0, 3 * width, dtype=torch.int32, device=self.device)
        if batch is not None:
            counts = (batch.loss_kind != LOSS_NONE).sum(1)
            packed = torch.stack([batch.tokens, batch.labels, batch.loss_kind.long()], 1).int()  # [b, 3, s]
            packed = torch.nn.functional.pad(packed, (0, width - packed.size(2))).flatten(1)
        first_ranks = [self._holders[replica][0] for replica in range(len(self._holders))]
        of_all: list[int] = self._gather(counts)[first_ranks].flatten().tolist()
        place = next(filter(None, self._teachers))
        multiple = micro_batch_size * place.micro_batch_multiple
        rows = ceil_div(len(of_all), len(self._last_stages) * multiple) * multiple
        share = Share(None, None if batch is None else batch.loss_kind, rows, own_rows, of_all)

        def overlap(source: int, target: int) -> tuple[int, int]:
            student, teacher = self._students[source], self._teachers[target]
            if not student or not teacher or not _serves(self._holders[student.dp], source, target):
                return 0, 0
            return _common_rows(student, teacher, share)

        pieces = self._exchange(packed, self.student.dp_rank * own_rows if self.student else 0, overlap)
        if self.teacher is None:
            return share
        return replace(share, batch=self._as_batch(torch.cat(_in_order(pieces)).view(-1, 3, width), share))

    def _agree_on_shape(self, batch: TrainingBatch | None) -> tuple[int, int]:
        """Return the rows of every student replica's batch, and a width that holds and shards them all."""
        shape = (0, 0) if batch is None else tuple(batch.tokens.shape)
        shapes = self._gather(torch.tensor(shape, device=self.device)).tolist()
        shapes = [shapes[self._holders[replica][0]] for replica in range(len(self._holders))]
        rows, width = shapes[0][0], max(s for _, s in shapes)
        if any(b != rows for b, _ in shapes):
            raise ValueError(f"student replicas brought batches of {[b for b, _ in shapes]} rows; expected equal ones")
        multiple = next(filter(None, self._teachers)).token_multiple
        return rows, round_up(width, multiple)

    def _as_batch(self, packed: torch.Tensor, share: Share) -> TrainingBatch:
        """Turn this teacher replica's part of the global batch [n, 3, s] into its batch of `share.rows` rows."""
        packed = torch.nn.functional.pad(packed, (0, 0, 0, 0, 0, share.rows - packed.size(0)))
        tokens, labels, kind = packed.long().unbind(1)
        positions = torch.arange(tokens.size(1), device=self.device).expand_as(tokens).contiguous()
        assert self.teacher is not None  # only its ranks have a part
        ids = torch.arange(share.rows, device=self.device) + self.teacher.dp_rank * share.rows
        ids = torch.where(ids < len(share.counts), ids, -1)
        return TrainingBatch(
            tokens=tokens,
            labels=labels,
            position_ids=positions,
            loss_kind=kind.to(torch.int8),
            old_logprobs=torch.zeros(tokens.shape, device=self.device),
            sample_ids=ids,
        )

    def collect(
        self, payload: torch.Tensor | None, share: Share, channels: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Send the loss tokens' values from the teacher's last stages to the student's.

        One exchange for all that a teacher's replica sends within 256 MiB; hidden states of a large batch take several,
        so that not all of them lie in memory once more.

        Args:
            payload: [rows, s, channels] of `share.batch` on the teacher's last stage, None elsewhere.
            share: from `distribute`.
            channels: numbers per token.
            dtype: of the payload.

        Returns:
            [b, s, channels] of this student replica's batch on its last stage, zeros where there is no loss; None
            elsewhere.
        """
        ends = [0, *accumulate(share.counts)]  # the loss tokens of the global batch, row after row

        def first_token(replica: int) -> int:
            """Return the place of a teacher replica's first loss token."""
            return ends[min(replica * share.rows, len(share.counts))]

        def tokens_of(source: int, target: int, start: int, size: int) -> tuple[int, int]:
            """Return the tokens [a, z) that `source` sends to `target`, of the `size` from its own `start` on."""
            teacher, student = self._teachers[source], self._students[target]
            if not teacher or not teacher.is_last_stage or not student or not student.is_last_stage:
                return 0, 0
            if not _serves(self._last_stages[teacher.dp], source, target):
                return 0, 0
            rows, window = _common_rows(student, teacher, share), first_token(teacher.dp) + start
            a, z = max(ends[rows[0]], window), min(ends[rows[1]], window + size)
            return (a, z) if z > a else (0, 0)

        values, places = torch.empty(0, channels, dtype=dtype, device=self.device), None
        if payload is not None:
            assert share.batch is not None  # the payload is of it
            values, places = payload.flatten(0, 1), _places(share.batch.loss_kind)
        out = None
        if self.student is not None and self.student.is_last_stage:
            assert share.loss_kind is not None  # of the batch that this rank brought
            out = values.new_zeros((*share.loss_kind.shape, channels))
            own, own_first = _places(share.loss_kind), ends[self.student.dp_rank * share.own_rows]
        replicas = range(len(self._last_stages))
        longest = max(first_token(replica + 1) - first_token(replica) for replica in replicas)
        size = max(1, _SENT_BYTES // (channels * values.element_size()))
        for start in range(0, longest, size):
            kept = values if places is None else values[places[start : start + size]]
            first = 0 if self.teacher is None else first_token(self.teacher.dp_rank) + start
            for a, piece in self._exchange(kept, first, partial(tokens_of, start=start, size=size)):
                if out is not None and len(piece):
                    out.flatten(0, 1)[own[a - own_first : a - own_first + len(piece)]] = piece
        return out

    def reshard_output_weight(
        self, weight: torch.Tensor | None, width: int, hidden_size: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Give the student's last stages the teacher's output layer in the student's shards.

        Args:
            weight: [V_t/tp_t, h_t] on the teacher's last stages, None elsewhere.
            width: columns of the student's vocabulary shard.
            hidden_size: h_t.
            dtype: of the weight.

        Returns:
            [width, h_t] on the student's last stages, zeros beyond the teacher's vocabulary; None elsewhere.
        """
        mine = torch.tensor([0 if weight is None else weight.size(0)], device=self.device)
        shard = int(self._gather(mine).max())
        # One replica of the teacher is enough: the one with data-parallel rank 0.
        places = ((rank, self._teachers[rank]) for rank in reversed(self._last_stages[0]))
        holders = {place.tp: rank for rank, place in places if place is not None}

        def overlap(source: int, target: int) -> tuple[int, int]:
            place, wanted = self._teachers[source], self._students[target]
            if not place or holders.get(place.tp) != source or not wanted or not wanted.is_last_stage:
                return 0, 0
            start = max(place.tp * shard, wanted.tp * width)
            return start, max(start, min((place.tp + 1) * shard, (wanted.tp + 1) * width))

        if weight is None:
            weight = torch.empty(0, hidden_size, dtype=dtype, device=self.device)
        pieces = self._exchange(weight, self.teacher.tp_rank * shard if self.teacher else 0, overlap)
        if self.student is None or not self.student.is_last_stage:
            return None
        out = weight.new_zeros((width, hidden_size))
        for a, piece in pieces:
            if len(piece):
                out[a - self.student.tp_rank * width :][: len(piece)] = piece
        return out

    def _exchange(
        self, mine: torch.Tensor, first: int, overlap: Callable[[int, int], tuple[int, int]]
    ) -> list[tuple[int, torch.Tensor]]:
        """Send every rank its part of a distributed list of rows, in one exchange over all ranks.

        Args:
            mine: [m, c] rows that this rank holds.
            first: place of its first row in the whole list.
            overlap: (source, target) -> the places [a, z) that one sends the other; a = z for none.

        Returns:
            For each source the place of its first row and the rows.
        """
        me, world = self._world.rank(), range(self._world.size())
        sent, received = [overlap(me, rank) for rank in world], [overlap(rank, me) for rank in world]
        outgoing = torch.cat([mine[a - first : z - first] if z > a else mine[:0] for a, z in sent]).to(self._wire)
        lengths = [z - a for a, z in received]
        incoming = outgoing.new_empty((sum(lengths), mine.size(1)))
        sizes = [z - a for a, z in sent]
        self._wait(dist.all_to_all_single(incoming, outgoing, lengths, sizes, group=self._world, async_op=True))
        pieces = incoming.to(self.device).split(lengths)
        return [(a, piece) for (a, _), piece in zip(received, pieces, strict=True)]


def _ranks_by_replica(places: list[_Place | None], wanted: Callable[[_Place], bool]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for rank, place in enumerate(places):
        if place and wanted(place):
            found.setdefault(place.dp, []).append(rank)
    return found


def _serves(holders: list[int], source: int, target: int) -> bool:
    """Return whether `source`, of the ranks that hold the same, sends to `target`: itself, or one of them in turn."""
    return source == (target if target in holders else holders[target % len(holders)])


def _common_rows(student: _Place, teacher: _Place, share: Share) -> tuple[int, int]:
    """Return the rows [a, z) of the global batch that a student's and a teacher's replica share; a = z for none."""
    a = max(teacher.dp * share.rows, student.dp * share.own_rows)
    z = min((teacher.dp + 1) * share.rows, (student.dp + 1) * share.own_rows)
    return (a, z) if z > a else (0, 0)


def _places(loss_kind: torch.Tensor) -> torch.Tensor:
    """Return where in a flattened batch [b, s] its tokens with a loss are."""
    return (loss_kind != LOSS_NONE).flatten().nonzero().squeeze(1)


def _in_order(pieces: list[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
    """Return the pieces by the place of their first row: senders come in the order of ranks."""
    return [piece for _, piece in sorted(pieces, key=lambda placed: placed[0])]
