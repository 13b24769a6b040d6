"""Context parallelism: each rank's share of every sequence, and attention over shares without Transformer Engine.

The split is Megatron's zig-zag: a sequence is cut into 2 cp chunks, and rank r holds chunks r and 2 cp - 1 - r, so that
causal attention costs every rank alike. Transformer Engine's attention expects just this.
"""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention

Sequences = TypeVar("Sequences")


def share_of(batch: Sequences, rank: int, size: int) -> Sequences:
    """Return a context-parallel rank's share of a dataclass of tensors [b, s, ...] (TrainingBatch, TeacherScores).

    Tensors of one dimension are of whole rows and stay. s must be a multiple of 2 `size`.
    """
    if size == 1:
        return batch
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    shares = {n: _share(t, rank, size) for n, t in tensors.items() if isinstance(t, torch.Tensor) and t.dim() > 1}
    return replace(batch, **shares)


def _share(whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    chunks = whole.chunk(2 * size, dim=1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=1)


def gather_shares(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Put the ranks' shares [b, s/cp, ...] together to [b, s, ...], on every rank; no gradient."""
    if group.size() == 1:
        return local
    shares = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(shares, local.contiguous(), group=group)
    firsts, lasts = zip(*(share.chunk(2, dim=1) for share in shares), strict=True)
    return torch.cat([*firsts, *reversed(lasts)], dim=1)


def whole_of(share: Sequences, group: dist.ProcessGroup) -> Sequences:
    """Undo `share_of`: put a dataclass of shares [b, s/cp, ...] together, and those that it holds; collective."""
    if group.size() == 1 or share is None:
        return share
    whole = {}
    for field in fields(share):
        value = getattr(share, field.name)
        if is_dataclass(value):
            whole[field.name] = whole_of(value, group)
        elif isinstance(value, torch.Tensor) and value.dim() > 1:
            whole[field.name] = gather_shares(value, group)
    return replace(share, **whole)


class ContextParallelAttention(DotProductAttention):
    """Causal attention of a rank's own queries over everybody's keys, gathered; plain PyTorch on any device.

    It trades memory (all keys and values of a layer on every rank, its gradient reduce-scattered) for simplicity:
    where Transformer Engine is there, its ring or all-to-all attention is used instead.
    """

    def __init__(self, config: Any, *args: Any, pg_collection: Any = None, **kwargs: Any):
        """Take what Megatron's DotProductAttention takes."""
        single = copy.copy(config)
        single.context_parallel_size = 1  # what Megatron's own class insists on
        super().__init__(single, *args, pg_collection=pg_collection, **kwargs)
        self.cp_group = pg_collection.cp
        self.whole_sequences = False  # set while generating, when every rank holds all of a sequence

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any):
        """Attend from query [s/cp, b, np, hn] to key and value [s/cp, b, ng, hn]; return [s/cp, b, np * hn]."""
        if self.whole_sequences:
            return super().forward(query, key, value, *args, **kwargs)
        key, value = (gather_from_sequence_parallel_region(t, True, group=self.cp_group) for t in (key, value))
        places = [self._places(query.size(0), rank, query.device) for rank in range(self.cp_group.size())]
        mask = places[self.cp_group.rank()][:, None] >= torch.cat(places)[None]  # [s/cp, s]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, tokens, hn]
        context = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.softmax_scale, enable_gqa=True
        )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _places(self, length: int, rank: int, device: torch.device) -> torch.Tensor:
        """Return the places [s/cp] in the whole sequence of what `rank` holds."""
        size = self.cp_group.size()
        chunk = torch.arange(length // 2, device=device)
        return torch.cat([chunk + rank * (length // 2), chunk + (2 * size - 1 - rank) * (length // 2)])
