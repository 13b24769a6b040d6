"""Paged attention in plain PyTorch: requests' tokens are gathered from the cache, then scaled_dot_product_attention.

The gathered keys and values of a call are a copy of what the cache holds of these requests. On CUDA the longest length
is read by the host, so this cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """See op.paged_decode_attention."""
    out = attend_last(q.unsqueeze(1), k_cache, v_cache, lengths, block_table, scale, window)
    return out.squeeze(1).masked_fill_((lengths == 0)[:, None, None], 0.0)


def attend_last(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    scale: float | None,
    window: int,
) -> torch.Tensor:
    """Attend from the last s tokens of each request, q [r, s, a, d]; rows of length 0 give meaningless numbers."""
    lengths = lengths.long().clamp(min=1)
    longest = int(lengths.max())
    keys, values = gather(k_cache, block_table, longest), gather(v_cache, block_table, longest)
    queries = q.size(1)
    query_places = lengths[:, None] - queries + torch.arange(queries, device=q.device)  # [r, s]
    visible = visible_keys(query_places, torch.arange(longest, device=q.device), window)  # [r, s, longest]
    return attend_plainly(q, keys, values, visible[:, None], scale)


def gather(cache: torch.Tensor, block_table: torch.Tensor, longest: int) -> torch.Tensor:
    """Lay the cached tokens of each request out in order: [r, longest, g, d]."""
    size = cache.size(1)
    blocks = math.ceil(longest / size)
    table = block_table[:, :blocks].long().clamp(min=0)
    if blocks == 1:
        return cache[:, :longest].index_select(0, table[:, 0])
    return cache.index_select(0, table.flatten()).view(table.size(0), blocks * size, *cache.shape[2:])[:, :longest]


def visible_keys(query_places: torch.Tensor, key_places: torch.Tensor, window: int) -> torch.Tensor:
    """Return [..., s, keys] bool: which keys each query sees, given their places in the sequence."""
    distance = query_places[..., None] - key_places
    visible = distance >= 0
    return visible if window < 0 else visible & (distance <= window)


def attend_plainly(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Attend from q [r, s, a, d] to k and v [r, keys, g, d] where `visible` [r or 1, 1, s, keys]; [r, s, a, d]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    if grouped and q.is_cuda:  # with a mask groups are for the backend alone that keeps all scores
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
