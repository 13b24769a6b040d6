"""Attention over Megatron's paged key/value cache in plain PyTorch, for devices without flash-attn.

The two functions take the arguments with which Megatron-Core's dynamic inference calls flash-attn 2 and answer with the
same shapes. Shapes, beyond those of `types`: r requests, p blocks of z tokens each, g key/value heads, a query heads, d
head width; a block table is [r, blocks a request], -1 where a request has no block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    **unused: Any,
) -> torch.Tensor:
    """Attend from the last tokens of each request to its cached tokens.

    Args:
        q: [r, s, a, d], the last s tokens of each request (their keys are in the cache already).
        k_cache: [p, z, g, d].
        v_cache: [p, z, g, d].
        cache_seqlens: [r] int32, cached tokens of each request, 0 on padding rows (whose output means nothing).
        block_table: [r, blocks] int32.
        softmax_scale: default d ** -0.5.
        causal: always true in Megatron's calls.
        window_size: how many tokens to the left (and right) are seen; -1: all.
        unused: arguments without effect on the result (`num_splits`).

    Returns:
        [r, s, a, d] of q's dtype.
    """
    lengths = cache_seqlens.long().clamp(min=1)
    longest = int(lengths.max())
    keys, values = _gather(k_cache, block_table, longest), _gather(v_cache, block_table, longest)
    queries = q.size(1)
    query_places = lengths[:, None] - queries + torch.arange(queries, device=q.device)  # [r, s]
    visible = _visible(query_places, torch.arange(longest, device=q.device), window_size)
    return _attend(q, keys, values, visible[:, None], softmax_scale)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    block_table: torch.Tensor | None = None,
    **unused: Any,
) -> torch.Tensor:
    """Attend from each request's newest tokens, any number of them, to its cached tokens.

    Args:
        q: [n, a, d], the requests' new tokens one after the other, then padding.
        k: [p, z, g, d].
        v: [p, z, g, d].
        cu_seqlens_q: [r + 1] int32, where each request's tokens start in q.
        cu_seqlens_k: [r + 1] int32, the same for all its cached tokens.
        max_seqlen_q: longest request in q.
        max_seqlen_k: longest request in the cache.
        softmax_scale: default d ** -0.5.
        causal: always true in Megatron's calls.
        window_size: how many tokens to the left (and right) are seen; -1: all.
        block_table: [r, blocks] int32.
        unused: arguments without effect on the result.

    Returns:
        [n, a, d] of q's dtype, zero on padding.
    """
    assert block_table is not None, "Megatron's dynamic inference always passes a block table"
    starts = cu_seqlens_q.tolist()
    lengths_k = cu_seqlens_k.diff()
    out = torch.zeros_like(q)
    single = [i for i in range(len(starts) - 1) if starts[i + 1] - starts[i] == 1]
    if single:  # requests that decode while others prefill: one batched call
        rows = torch.tensor(single, device=q.device)
        places = cu_seqlens_q[rows].long()
        options = {"softmax_scale": softmax_scale, "window_size": window_size}
        decoded = flash_attn_with_kvcache(q[places][:, None], k, v, lengths_k[rows], block_table[rows], **options)
        out[places] = decoded[:, 0]
    cached = lengths_k.tolist()
    for i, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        if stop - start <= 1:
            continue
        keys, values = (_gather(cache, block_table[i : i + 1], cached[i]) for cache in (k, v))
        query_places = torch.arange(cached[i] - (stop - start), cached[i], device=q.device)
        visible = _visible(query_places, torch.arange(cached[i], device=q.device), window_size)
        out[start:stop] = _attend(q[None, start:stop], keys, values, visible, softmax_scale)[0]
    return out


def _gather(cache: torch.Tensor, block_table: torch.Tensor, longest: int) -> torch.Tensor:
    """Lay the cached tokens of each request out in order: [r, longest, g, d]."""
    size = cache.size(1)
    blocks = math.ceil(longest / size)
    table = block_table[:, :blocks].long().clamp(min=0)
    if blocks == 1:
        return cache[:, :longest].index_select(0, table[:, 0])
    return cache.index_select(0, table.flatten()).view(table.size(0), blocks * size, *cache.shape[2:])[:, :longest]


def _visible(query_places: torch.Tensor, key_places: torch.Tensor, window_size: tuple[int, int]) -> torch.Tensor:
    """Return [..., s, keys] bool: which keys each query sees, given their places in the sequence."""
    distance = query_places[..., None] - key_places
    visible = distance >= 0
    return visible if window_size[0] < 0 else visible & (distance <= window_size[0])


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float | None
) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
