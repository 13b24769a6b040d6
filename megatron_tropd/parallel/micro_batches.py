"""Splits a batch into micro-batches, by rows or packed by a token budget, and joins their results.

Packed, several sequences lie one after the other in the one row of a micro-batch (Megatron's `thd` format), without a
batch's padding: what lies behind a sequence's last token with a loss is left out. The loss is that of the padded batch.

    split = split_batch(batch, groups, micro_batch_size=4)                      # or max_tokens=16384
    parts = split.take(scores)                                                  # one per micro-batch
    whole = split.join(results)                                                 # [b, s, ...] of [1, t/cp, ...] each
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_tropd.parallel.batching import microbatches
from megatron_tropd.parallel.context_parallel import gather_shares, share, share_of, share_places
from megatron_tropd.parallel.groups import ParallelGroups, all_shards
from megatron_tropd.rounding import round_up
from megatron_tropd.types import LOSS_NONE, TrainingBatch


class RowSplit:
    """Micro-batches of `micro_batch_size` rows each, as wide as the batch."""

    def __init__(self, batch: TrainingBatch, groups: ParallelGroups, micro_batch_size: int):
        """Cut this context-parallel rank's share of `batch` [b, s]; micro_batch_size must divide b."""
        self._groups = groups
        self.seq_length, self.micro_batch_size = batch.tokens.size(1), micro_batch_size
        self.batches = microbatches(share_of(batch, groups.cp_rank, groups.cp_size), micro_batch_size)

    def take(self, scores: Any) -> Sequence[Any]:
        """Return a dataclass's tensors [rows, s/cp, ...] of every micro-batch, made when asked for; None of None."""
        rows, place = self.micro_batch_size, (self._groups.cp_rank, self._groups.cp_size)

        def part(i: int) -> Any:
            return _map(lambda tensor: share(tensor[i * rows : (i + 1) * rows], *place), [scores])

        return _Parts(len(self.batches), part)

    def join(self, parts: list[Any]) -> Any:
        """Put the micro-batches' tensors [rows, s/cp, ...], or dataclasses of them, together; collective over cp."""
        return _map(lambda *tensors: gather_shares(torch.cat(tensors), self._groups.cp), parts)


class PackedSplit:
    """Micro-batches of one row with several sequences each, all of the same number of tokens."""

    micro_batch_size = 1

    def __init__(self, batch: TrainingBatch, groups: ParallelGroups, max_tokens: int, pad_multiple: int):
        """Pack the rows of `batch` [b, s]; collective over the data-parallel ranks, on which as many are made.

        Args:
            batch: rows without a loss are left out.
            groups: of the model that will run.
            max_tokens: budget of a micro-batch, raised to the longest sequence.
            pad_multiple: the number of tokens of a micro-batch is rounded up to it.
        """
        self._groups, self._shape = groups, batch.tokens.shape
        lengths = _lengths(batch, groups.context_multiple)
        bins = self._agree(lengths, max(max_tokens, *lengths))
        fullest = max(sum(lengths[row] for row in rows) for rows in bins)
        self.seq_length = max(pad_multiple, round_up(fullest, pad_multiple))
        # Where in the flattened batch every token of a micro-batch comes from, by context-parallel rank; -1: nowhere.
        self._places: list[list[torch.Tensor]] = []
        self.batches = []
        for rows in bins:
            pieces = [(row, lengths[row]) for row in rows] or [(0, 0)]
            starts = accumulate((length for _, length in pieces[:-1]), initial=0)
            ends = [*starts, self.seq_length]  # the last sequence bears the padding
            places = [self._rank_places(pieces, ends, rank).to(batch.tokens.device) for rank in range(groups.cp_size)]
            self._places.append(places)
            self.batches.append(self._micro_batch(batch, ends, places[groups.cp_rank]))

    def _agree(self, lengths: list[int], max_tokens: int) -> list[list[int]]:
        """Return the rows of every micro-batch; all data-parallel ranks make the same number of them."""
        wanted = torch.tensor([len(first_fit(lengths, max_tokens))], device=self._groups.device)
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=self._groups.dp)
        multiple = self._groups.micro_batch_multiple
        count = round_up(max(int(wanted), 1), multiple)
        return spread(lengths, max_tokens, count)

    def _rank_places(self, pieces: list[tuple[int, int]], ends: list[int], rank: int) -> torch.Tensor:
        """Return the places [t/cp] in the flattened batch of a context-parallel rank's tokens."""
        found = []
        for (row, length), start, stop in zip(pieces, ends, ends[1:], strict=False):
            own = share_places(stop - start, rank, self._groups.cp_size)
            found.append(torch.where(own < length, own + row * self._shape[1], -1))
        return torch.cat(found)

    def _micro_batch(self, batch: TrainingBatch, ends: list[int], places: torch.Tensor) -> TrainingBatch:
        device = batch.tokens.device
        cu_seqlens = torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True)
        longest = max(b - a for a, b in zip(ends, ends[1:], strict=False))
        taken = _map(lambda tensor: _take(tensor, places), [replace(batch, sample_ids=batch.token_sample_ids)])
        return replace(
            taken,
            loss_kind=torch.where(places >= 0, taken.loss_kind, LOSS_NONE),
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            ),
        )

    def take(self, scores: Any) -> Sequence[Any]:
        """Return a dataclass's tensors [1, t/cp, ...] of every micro-batch, made when asked for; None of None."""
        mine = [places[self._groups.cp_rank] for places in self._places]
        return _Parts(len(self.batches), lambda i: _map(lambda tensor: _take(tensor, mine[i]), [scores]))

    def join(self, parts: list[Any]) -> Any:
        """Put the micro-batches' tensors [1, t/cp, ...], or dataclasses of them, back into [b, s, ...].

        Zeros stand where no token came from. Collective over the context-parallel ranks.
        """
        sources = torch.cat([places[rank] for rank in range(self._groups.cp_size) for places in self._places])
        kept = sources >= 0

        def put(*tensors: torch.Tensor) -> torch.Tensor:
            mine = torch.cat(tensors, dim=1)[0]
            shares = all_shards(mine, self._groups.cp)
            out = mine.new_zeros((self._shape.numel(), *mine.shape[1:]))
            out[sources[kept]] = torch.cat(shares)[kept]
            return out.unflatten(0, tuple(self._shape))

        return _map(put, parts)


class _Parts(Sequence[Any]):
    """What belongs to each micro-batch, made when it is asked for: a batch's hidden states are not there twice."""

    def __init__(self, count: int, make: Callable[[int], Any]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]  # no slices
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._make(index)


class Pairs(_Parts):
    """Micro-batches with what belongs to them, as Megatron's schedule takes them."""

    def __init__(self, batches: Sequence[TrainingBatch], parts: Sequence[Any]):
        """`parts`: one for each of `batches`."""
        super().__init__(len(batches), lambda i: (batches[i], parts[i]))


def split_batch(
    batch: TrainingBatch,
    groups: ParallelGroups,
    micro_batch_size: int,
    max_tokens: int | None = None,
    pad_multiple: int = 8,
) -> RowSplit | PackedSplit:
    """Split a replica's batch [b, s] into micro-batches of rows, or packed where there is a token budget.

    Args:
        batch: the same on all model-parallel ranks of a replica.
        groups: of the model that will run.
        micro_batch_size: rows of a micro-batch without packing.
        max_tokens: tokens of a micro-batch with packing; None: no packing.
        pad_multiple: the number of tokens of a packed micro-batch is rounded up to it (groups.token_multiple).
    """
    if max_tokens is None:
        return RowSplit(batch, groups, micro_batch_size)
    return PackedSplit(batch, groups, max_tokens, pad_multiple)


def first_fit(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Return bins of places in `lengths` whose sums keep to `max_tokens`: longest first, into the first with room.

    A length of 0 is in none; none may be beyond `max_tokens`.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i]):
        chosen = next((b for b, left in enumerate(room) if left >= lengths[place]), None)
        if chosen is None:
            chosen = len(bins)
            bins.append([])
            room.append(max_tokens)
        bins[chosen].append(place)
        room[chosen] -= lengths[place]
    return bins


def spread(lengths: list[int], max_tokens: int, count: int) -> list[list[int]]:
    """Return `count` bins of about equal sums; where one would overflow, those of `first_fit` and empty ones."""
    bins: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for place in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i]):
        emptiest = min(range(count), key=sums.__getitem__)
        bins[emptiest].append(place)
        sums[emptiest] += lengths[place]
    if max(sums) <= max_tokens:
        return [sorted(places) for places in bins]
    fitting = first_fit(lengths, max_tokens)
    return [sorted(places) for places in fitting] + [[]] * (count - len(fitting))


def _lengths(batch: TrainingBatch, multiple: int) -> list[int]:
    """Return how many of each row's tokens a forward pass needs, rounded up: those up to the last one with a loss."""
    width = batch.tokens.size(1)
    places = torch.arange(1, width + 1, device=batch.tokens.device)
    needed = torch.where(batch.loss_kind != LOSS_NONE, places, 0).amax(1)
    return (-(-needed // multiple) * multiple).tolist()


def _take(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return [1, t, ...] of a [b, s, ...]; anything where a place is negative."""
    return tensor.flatten(0, 1)[places.clamp(min=0)].unsqueeze(0)


def _map(function: Callable[..., torch.Tensor], parts: list[Any]) -> Any:
    """Apply a function to the corresponding tensors of several dataclasses, nested ones too, or to tensors."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return function(*parts)
    if not is_dataclass(first) or isinstance(first, type | PackedSeqParams):
        return first
    return replace(first, **{f.name: _map(function, [getattr(p, f.name) for p in parts]) for f in fields(first)})
