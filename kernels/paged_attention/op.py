"""paged_decode_attention: the newest token of each request attends to its cached tokens.

Shapes, here and in the implementations: r requests, p blocks of z tokens each, g key/value heads, a query heads, d head
width; a block table is [r, blocks per request], -1 where a request has no block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from megatron_tropd.kernels.implementations import choose

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tropd.kernels.paged_attention import chunked, reference, triton


class Passes(Protocol):
    """What every implementation provides."""

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        lengths: Tensor,
        block_table: Tensor,
        scale: float,
        window: int,
    ) -> Tensor:
        """Return softmax(q k^T scale) v, [r, a, d]."""


if TYPE_CHECKING:  # mypy compares the modules with the protocol here
    _CHUNKED: Passes = chunked
    _TRITON: Passes = triton
    _REFERENCE: Passes = reference


@torch.no_grad()
def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    *,
    scale: float | None = None,
    window: int = -1,
    implementation: str = "auto",
) -> torch.Tensor:
    """Return softmax(q k^T scale) v of each request's newest token over its cached tokens; no gradient.

    Args:
        q: [r, a, d] fp32, bf16 or fp16; the token's own key and value are in the cache already.
        k_cache: [p, z, g, d] of q's dtype, g divides a.
        v_cache: [p, z, g, d].
        lengths: [r] integer, cached tokens of each request; 0 marks a padding row.
        block_table: [r, blocks] int32.
        scale: default d ** -0.5.
        window: how many earlier tokens are seen beside the newest; -1: all.
        implementation: auto (triton on CUDA, chunked elsewhere), triton, chunked or reference (float64).

    Returns:
        [r, a, d] of q's dtype, zero on padding rows. With Triton, neither host nor device waits for the other: the call
        can be captured in a CUDA graph and replayed with other contents of the same tensors.

    Raises:
        ValueError: shapes that do not fit, an unknown implementation, or one that cannot run on the device.
    """
    requests, heads, width = q.shape
    if k_cache.shape != v_cache.shape or k_cache.size(-1) != width or heads % k_cache.size(2):
        raise ValueError(
            f"queries {tuple(q.shape)} need caches [p, z, g, {width}] of equal shape with g dividing {heads}; got keys "
            f"{tuple(k_cache.shape)} and values {tuple(v_cache.shape)}"
        )
    if lengths.shape != (requests,) or block_table.size(0) != requests:
        raise ValueError(
            f"{requests} queries need as many lengths and rows of the block table; got {tuple(lengths.shape)} and "
            f"{tuple(block_table.shape)}"
        )
    passes: Passes = choose("paged_decode_attention", "paged_attention", implementation, q.device)
    return passes.attend(q, k_cache, v_cache, lengths, block_table, width**-0.5 if scale is None else scale, window)
