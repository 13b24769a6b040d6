"""Paged decode attention in float64, request by request: the definition with which the others are compared."""

from __future__ import annotations

import torch


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """See op.paged_decode_attention; q [r, a, d], caches [p, z, g, d]."""
    out = torch.zeros_like(q)
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        places = torch.arange(0 if window < 0 else max(0, length - 1 - window), length, device=q.device)
        blocks = block_table[row, places // k_cache.size(1)].long()  # [tokens]
        group = q.size(1) // k_cache.size(2)
        keys, values = (
            cache[blocks, places % cache.size(1)].double().repeat_interleave(group, dim=1)  # [tokens, a, d]
            for cache in (k_cache, v_cache)
        )
        weights = (torch.einsum("ad,nad->an", q[row].double(), keys) * scale).softmax(-1)  # [a, tokens]
        out[row] = torch.einsum("an,nad->ad", weights, values).to(q.dtype)
    return out
