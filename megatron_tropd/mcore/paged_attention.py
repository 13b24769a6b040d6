"""Attention over Megatron's paged key/value cache where flash-attn is absent or refuses the dtype: CPU, CUDA, float32.

The two functions take the arguments with which Megatron-Core's dynamic inference calls flash-attn 2 and answer with the
same shapes. Decode steps go to the kernel `paged_decode_attention`; prefills to torch's variable-length attention
where it runs (CUDA, half precision, torch 2.10), else request by request to scaled_dot_product_attention. Shapes: r
requests, p blocks of z tokens each, g key/value heads, a query heads, d head width; a block table is [r, blocks per
request], -1 where a request has no block.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from megatron_tropd.kernels import paged_decode_attention
from megatron_tropd.kernels.paged_attention.chunked import attend_last, attend_plainly, gather, visible_keys
from megatron_tropd.parallel.variable_length import attends_variable_lengths, variable_length_attention


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
    starts, lengths = cu_seqlens_q.tolist(), cu_seqlens_k.diff()
    counts = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
    out = torch.zeros_like(q)
    window = window_size[0]
    decoding = [i for i, count in enumerate(counts) if count == 1]
    if decoding:  # requests that decode while others prefill: one call over the cache, without gathering
        rows = torch.tensor(decoding, device=q.device)
        places = cu_seqlens_q[rows].long()
        of_rows = (lengths[rows], block_table[rows])
        decoded = flash_attn_with_kvcache(
            q[places][:, None], k, v, *of_rows, softmax_scale=softmax_scale, window_size=window_size
        )
        out[places] = decoded[:, 0]
    cached = lengths.tolist()
    filling = [_NewTokens(i, starts[i], count, cached[i]) for i, count in enumerate(counts) if count > 1]
    if filling:
        prefill = _prefill_together if attends_variable_lengths(q) else _prefill_one_by_one
        prefill(out, q, k, v, filling, softmax_scale, window, block_table)
    return out


@dataclass(frozen=True)
class _NewTokens:
    """A request with several new tokens: its row in the block table, and its tokens in q and in the cache."""

    row: int
    start: int
    count: int
    cached: int


def _prefill_together(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompts: list[_NewTokens],
    scale: float | None,
    window: int,
    block_table: torch.Tensor,
) -> None:
    """Lay the cached tokens of all prompts out one after the other, and attend in one call; writes `out`."""
    own = _joined([p.start for p in prompts], [p.count for p in prompts]).to(q.device)  # [new tokens]
    lengths = torch.tensor([p.cached for p in prompts])
    row = torch.repeat_interleave(torch.tensor([p.row for p in prompts]), lengths)  # [cached tokens]
    place = _joined([0] * len(prompts), lengths.tolist())
    row, place = torch.stack((row, place)).to(q.device)
    block = block_table[row, place // k.size(1)].long()
    keys, values = (cache[block, place % k.size(1)] for cache in (k, v))  # [cached tokens, g, d]
    ends_q, ends_k = (
        torch.tensor([0, *itertools.accumulate(numbers)], dtype=torch.int32, device=q.device)
        for numbers in ([p.count for p in prompts], [p.cached for p in prompts])
    )
    longest_q, longest_k = max(p.count for p in prompts), max(p.cached for p in prompts)
    sizes = (ends_q, ends_k, longest_q, longest_k)
    out[own] = variable_length_attention(q[own], keys, values, *sizes, scale=scale, window=window)


def _joined(starts: list[int], counts: list[int]) -> torch.Tensor:
    """Return start, start + 1, … of `counts` numbers each, one after the other, on the host."""
    repeats = torch.tensor(counts)
    offsets = torch.tensor(starts) - (repeats.cumsum(0) - repeats)
    return torch.arange(int(repeats.sum())) + torch.repeat_interleave(offsets, repeats)


def _prefill_one_by_one(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompts: list[_NewTokens],
    scale: float | None,
    window: int,
    block_table: torch.Tensor,
) -> None:
    for p in prompts:
        keys, values = (gather(cache, block_table[p.row : p.row + 1], p.cached) for cache in (k, v))
        query_places = torch.arange(p.cached - p.count, p.cached, device=q.device)
        visible = visible_keys(query_places, torch.arange(p.cached, device=q.device), window)
        own = slice(p.start, p.start + p.count)
        out[own] = attend_plainly(q[None, own], keys, values, visible, scale)[0]
