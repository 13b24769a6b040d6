"""Attention over Megatron's paged key/value cache where flash-attn is absent or refuses the dtype: CPU, CUDA, float32.

The two functions take the arguments with which Megatron-Core's dynamic inference calls flash-attn 2 and answer with the
same shapes. Decode steps go to the kernel `paged_decode_attention`; prefills to torch's variable-length attention
where it runs (CUDA, half precision, torch 2.10), else request by request to scaled_dot_product_attention. Shapes: r
requests, p blocks of z tokens each, g key/value heads, a query heads, d head width; a block table is [r, blocks per
request], -1 where a request has no block.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_tropd.kernels import paged_decode_attention
from megatron_tropd.kernels.paged_attention.chunked import attend_last, attend_plainly, gather, visible_keys
from megatron_tropd.variable_length import attends_variable_lengths, variable_length_attention


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
    if q.size(1) > 1:
        return attend_last(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale, window_size[0])
    out = paged_decode_attention(
        q.squeeze(1), k_cache, v_cache, cache_seqlens, block_table, scale=softmax_scale, window=window_size[0]
    )
    return out.unsqueeze(1)


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
    if attends_variable_lengths(q):
        return _prefill_together(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0], block_table)
    return _prefill_one_by_one(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0], block_table)


def _prefill_together(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, window, block_table) -> torch.Tensor:
    """Lay the cached tokens of all requests out one after the other, and attend in one call."""
    ends_q, lengths = cu_seqlens_q.tolist(), cu_seqlens_k.diff()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)  # [cached tokens]
    place = torch.arange(len(row), device=q.device) - cu_seqlens_k[row]
    block = block_table[row, place // k.size(1)]
    keys, values = (cache[block, place % k.size(1)] for cache in (k, v))  # [cached tokens, g, d]
    tokens = ends_q[-1]
    attended = variable_length_attention(
        q[:tokens],
        keys,
        values,
        cu_seqlens_q,
        cu_seqlens_k,
        max(stop - start for start, stop in zip(ends_q, ends_q[1:], strict=False)),
        int(lengths.max()),
        scale=scale,
        window=window,
    )
    if tokens == q.size(0):
        return attended
    out = torch.zeros_like(q)
    out[:tokens] = attended
    return out


def _prefill_one_by_one(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, window, block_table) -> torch.Tensor:
    starts = cu_seqlens_q.tolist()
    lengths_k = cu_seqlens_k.diff()
    out = torch.zeros_like(q)
    single = [i for i in range(len(starts) - 1) if starts[i + 1] - starts[i] == 1]
    if single:  # requests that decode while others prefill: one batched call
        rows = torch.tensor(single, device=q.device)
        places = cu_seqlens_q[rows].long()
        options = {"softmax_scale": scale, "window_size": (window, -1)}
        decoded = flash_attn_with_kvcache(q[places][:, None], k, v, lengths_k[rows], block_table[rows], **options)
        out[places] = decoded[:, 0]
    cached = lengths_k.tolist()
    for i, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        if stop - start <= 1:
            continue
        keys, values = (gather(cache, block_table[i : i + 1], cached[i]) for cache in (k, v))
        query_places = torch.arange(cached[i] - (stop - start), cached[i], device=q.device)
        visible = visible_keys(query_places, torch.arange(cached[i], device=q.device), window)
        out[start:stop] = attend_plainly(q[None, start:stop], keys, values, visible, scale)[0]
    return out
