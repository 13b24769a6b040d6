"""Between a student and a teacher of different layouts: a batch's way to the teacher's ranks, and what comes back.

Both models live on the same ranks and take turns. Each teacher replica scores its share of the global batch; the scores
of the tokens with a loss then travel from the teacher's last stages to the student's last stages in one exchange.

    exchange = Exchange(student_groups, teacher_groups)
    share = exchange.distribute(batch, micro_batch_size=4)      # rows of this teacher replica
    scores = exchange.collect(payload, share)                   # rows of this student replica, on its last stage
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

from megatron_tropd.parallel import ParallelGroups
from megatron_tropd.types import LOSS_NONE, TrainingBatch


@dataclass(frozen=True)
class _Place:
    """Where a rank stands in one model's layout."""

    is_last_stage: bool
    tp: int
    dp: int


@dataclass(frozen=True)
class Share:
    """One teacher replica's rows of the global batch, and what every rank must know to send the scores back."""

    batch: TrainingBatch  # [rows, s]; filler rows without loss at the end
    rows: int  # of each teacher replica
    own_rows: int  # of each student replica
    own_width: int  # s of this student replica's batch
    loss_kind: torch.Tensor  # [global rows, s] of the global batch
    counts: list[int]  # loss tokens of every global row


class Exchange:
    """Carries batches to the teacher's replicas and scores to the student's; each call is collective over all ranks."""

    def __init__(self, student: ParallelGroups, teacher: ParallelGroups):
        """Learn where every rank stands in both layouts."""
        self.student, self.teacher = student, teacher
        mine = [x for g in (student, teacher) for x in (int(g.is_last_stage), g.tp_rank, g.dp_rank)]
        mine = torch.tensor(mine, device=student.device)
        gathered = mine.new_empty(student.world_size * mine.numel())
        dist.all_gather_into_tensor(gathered, mine)
        places = gathered.view(student.world_size, -1).tolist()
        self._students = [_Place(bool(p[0]), p[1], p[2]) for p in places]
        self._teachers = [_Place(bool(p[3]), p[4], p[5]) for p in places]
        self._last_stages: dict[int, list[int]] = {}  # of each teacher replica
        for rank, place in enumerate(self._teachers):
            if place.is_last_stage:
                self._last_stages.setdefault(place.dp, []).append(rank)

    def distribute(self, batch: TrainingBatch, micro_batch_size: int) -> Share:
        """Gather the student replicas' batches and take this teacher replica's contiguous rows.

        Args:
            batch: this student replica's rows [b, s]; b is the same on every replica, s need not be.
            micro_batch_size: the teacher's; its rows are filled up to a multiple (of the pipeline, interleaved).

        Raises:
            ValueError: the replicas' batches have different numbers of rows.
        """
        multiple = micro_batch_size * self.teacher.micro_batch_multiple
        tokens, labels, loss_kind = self._gather(batch)
        total, width = tokens.shape
        rows = -(-total // (self.teacher.dp_size * multiple)) * multiple
        start = self.teacher.dp_rank * rows

        def mine(values: torch.Tensor) -> torch.Tensor:
            part = values[start : start + rows]
            return torch.nn.functional.pad(part, (0, 0, 0, rows - part.size(0)))

        positions = torch.arange(width, device=tokens.device).expand(rows, width).contiguous()
        ids = torch.arange(start, start + rows, device=tokens.device)
        kind = mine(loss_kind)
        old = torch.zeros(rows, width, device=tokens.device)
        share = TrainingBatch(mine(tokens), mine(labels), positions, kind, old, torch.where(ids < total, ids, -1))
        counts = (loss_kind != LOSS_NONE).sum(1).tolist()
        return Share(share, rows, batch.tokens.size(0), batch.tokens.size(1), loss_kind, counts)

    def _gather(self, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tokens, labels [rows, s] int64 and loss kinds int8 of all student replicas, in their order."""
        group, size = self.student.dp, self.student.dp_size
        shape = torch.tensor(batch.tokens.shape, device=batch.tokens.device)
        shapes = shape.new_empty(size * 2)
        dist.all_gather_into_tensor(shapes, shape, group=group)
        shapes = shapes.view(size, 2).tolist()
        rows, width = shapes[0][0], max(s for _, s in shapes)
        if any(b != rows for b, _ in shapes):
            raise ValueError(f"student replicas brought batches of {[b for b, _ in shapes]} rows; expected equal ones")
        multiple = 8 * self.teacher.tp_size * 2 * self.teacher.cp_size  # whatever the teacher shards sequences over
        width = -(-width // multiple) * multiple
        packed = torch.stack([batch.tokens, batch.labels, batch.loss_kind.long()], 1).int()  # [b, 3, s]
        packed = torch.nn.functional.pad(packed, (0, width - packed.size(2)))
        gathered = packed.new_empty((size * rows, 3, width))
        dist.all_gather_into_tensor(gathered, packed, group=group)
        tokens, labels, loss_kind = gathered.unbind(1)
        return tokens.long(), labels.long(), loss_kind.to(torch.int8)

    def collect(self, payload: torch.Tensor | None, share: Share, channels: int, dtype: torch.dtype) -> torch.Tensor:
        """Send the loss tokens' values from the teacher's last stages to the student's; one exchange.

        Args:
            payload: [rows, s, channels] of `share.batch` on the teacher's last stage, None elsewhere.
            share: from `distribute`.
            channels: numbers a token.
            dtype: of the payload.

        Returns:
            [b, s, channels] of this student replica's batch on its last stage, zeros where there is no loss; [0] on
            other stages.
        """
        ends = [0, *accumulate(share.counts)]

        def tokens_of(source: int, target: int) -> tuple[int, int]:
            """Return the loss tokens [a, z) of the global batch that `source` sends to `target`."""
            a, z = self._rows(source, target, share)
            return ends[a], ends[z]

        kept = torch.empty(0, channels, dtype=dtype, device=self.student.device)
        if payload is not None:
            kept = payload[share.batch.loss_kind != LOSS_NONE]
        first = ends[min(self.teacher.dp_rank * share.rows, len(share.counts))]
        return self._unpack(_exchange(kept, first, tokens_of), share)

    def _rows(self, source: int, target: int, share: Share) -> tuple[int, int]:
        """Return the global rows [a, z) that `source` sends to `target`; a = z for none."""
        teacher, student = self._teachers[source], self._students[target]
        if not (teacher.is_last_stage and student.is_last_stage and self._sender(teacher.dp, target) == source):
            return 0, 0
        total = len(share.counts)
        a = min(max(teacher.dp * share.rows, student.dp * share.own_rows), total)
        z = min((teacher.dp + 1) * share.rows, (student.dp + 1) * share.own_rows, total)
        return (a, z) if z > a else (0, 0)

    def _sender(self, replica: int, target: int) -> int:
        """Return which last-stage rank of a teacher replica serves `target`: itself, or one by tensor-parallel rank."""
        ranks = self._last_stages[replica]
        return target if target in ranks else ranks[self._students[target].tp % len(ranks)]

    def _unpack(self, pieces: list[tuple[int, torch.Tensor]], share: Share) -> torch.Tensor:
        # Senders come in the order of ranks, rows in that of the batch.
        tokens = torch.cat([piece for _, piece in sorted(pieces, key=lambda placed: placed[0])])
        if not self.student.is_last_stage:
            return tokens
        start = self.student.dp_rank * share.own_rows
        mask = share.loss_kind[start : start + share.own_rows] != LOSS_NONE
        out = tokens.new_zeros((*mask.shape, tokens.size(1)))
        out[mask] = tokens
        return out[:, : share.own_width]

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
        shard = torch.tensor([0 if weight is None else weight.size(0)], device=self.student.device)
        dist.all_reduce(shard, op=dist.ReduceOp.MAX)
        shard = int(shard)
        # One replica of the teacher is enough: the one with data-parallel rank 0.
        holders = {self._teachers[rank].tp: rank for rank in reversed(self._last_stages[0])}

        def overlap(source: int, target: int) -> tuple[int, int]:
            place, wanted = self._teachers[source], self._students[target]
            if holders.get(place.tp) != source or not wanted.is_last_stage:
                return 0, 0
            start = max(place.tp * shard, wanted.tp * width)
            return start, max(start, min((place.tp + 1) * shard, (wanted.tp + 1) * width))

        if weight is None:
            weight = torch.empty(0, hidden_size, dtype=dtype, device=self.student.device)
        pieces = _exchange(weight, self.teacher.tp_rank * shard, overlap)
        if not self.student.is_last_stage:
            return None
        out = weight.new_zeros((width, hidden_size))
        for a, piece in pieces:
            if len(piece):
                out[a - self.student.tp_rank * width :][: len(piece)] = piece
        return out


def _exchange(
    mine: torch.Tensor, first: int, overlap: Callable[[int, int], tuple[int, int]]
) -> list[tuple[int, torch.Tensor]]:
    """Send every rank its part of a distributed list of rows, in one exchange over all ranks.

    Args:
        mine: [m, c] rows that this rank holds.
        first: place of its first row in the whole list.
        overlap: (source, target) -> the places [a, z) that one sends the other; a = z for none.

    Returns:
        For each source the place of its first row and the rows.
    """
    me, world = dist.get_rank(), range(dist.get_world_size())
    sent, received = [overlap(me, rank) for rank in world], [overlap(rank, me) for rank in world]
    outgoing = torch.cat([mine[a - first : z - first] if z > a else mine[:0] for a, z in sent])
    lengths = [z - a for a, z in received]
    incoming = outgoing.new_empty((sum(lengths), mine.size(1)))
    dist.all_to_all_single(incoming, outgoing, lengths, [z - a for a, z in sent])
    return [(a, piece) for (a, _), piece in zip(received, incoming.split(lengths), strict=True)]
