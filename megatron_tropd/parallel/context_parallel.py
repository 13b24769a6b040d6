"""Context parallelism: each rank's share of every sequence, and shares put together again.

The split is Megatron's zig-zag: a sequence is cut into 2 cp chunks, and rank r holds chunks r and 2 cp - 1 - r, so that
causal attention costs every rank alike. Transformer Engine's attention expects just this.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from megatron_tropd.parallel.groups import all_shards

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Sequences = TypeVar("Sequences", bound="DataclassInstance")


def share_of(batch: Sequences, rank: int, size: int) -> Sequences:
    """Return a context-parallel rank's share of a dataclass of tensors [b, s, ...] (TrainingBatch, TeacherScores).

    Tensors of one dimension are of whole rows and stay. s must be a multiple of 2 `size`.
    """
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    shares = {n: share(t, rank, size) for n, t in tensors.items() if isinstance(t, torch.Tensor) and t.dim() > 1}
    return replace(batch, **shares)


def share(whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return a context-parallel rank's share [b, s/`size`, ...] of a tensor [b, s, ...]."""
    if size == 1:
        return whole
    chunks = whole.chunk(2 * size, dim=1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)


def gather_shares(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Put the ranks' shares [b, s/cp, ...] together to [b, s, ...], on every rank; no gradient."""
    if group.size() == 1:
        return local
    firsts, lasts = zip(*(share.chunk(2, dim=1) for share in all_shards(local, group)), strict=True)
    return torch.cat([*firsts, *reversed(lasts)], dim=1)


def share_places(length: int, rank: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """Return the places [length / size] in a sequence of `length` tokens of what `rank` holds, in its order."""
    return share(torch.arange(length, device=device)[None], rank, size)[0]
