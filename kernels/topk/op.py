"""vocab_parallel_topk: a frozen teacher's most probable tokens with their log-probs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from megatron_tropd.kernels.implementations import choose
from megatron_tropd.kernels.sharding import VocabShard, as_rows
from megatron_tropd.kernels.topk import reference
from megatron_tropd.kernels.topk.ordering import merge

if TYPE_CHECKING:
    from megatron_tropd.kernels.topk import chunked, triton

_LARGEST_EXACT_ID = 1 << 24  # ids travel as fp32


class Passes(Protocol):
    """The pass that an implementation provides; chunked.py describes its arguments."""

    def statistics(
        self, logits: torch.Tensor, k: int, mask: torch.Tensor | None, shard: VocabShard, scale: float
    ) -> torch.Tensor:
        """Return this shard's part of every row, [n, 2 + 2k] fp32."""


if TYPE_CHECKING:  # mypy compares both modules with the protocol here
    _CHUNKED: Passes = chunked
    _TRITON: Passes = triton


@torch.no_grad()
def vocab_parallel_topk(
    logits: torch.Tensor,
    k: int,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k most probable tokens of softmax(logits / temperature); one packed all-gather, no gradient.

    Args:
        logits: [..., V/tp] fp32, bf16 or fp16, this rank's shard.
        k: how many; at most vocab_size, and may exceed V/tp.
        group: the ranks that share the vocabulary; None for a single one.
        vocab_size: true vocabulary size (below 2^24); padding columns are never picked.
        temperature: divides the logits.
        mask: [...] bool; rows where it is False give zeros.
        implementation: auto (triton on CUDA, chunked elsewhere), triton, chunked or reference (float64).

    Returns:
        log-probs [..., k] fp32, normalised over the whole vocabulary, most probable first, equal ones by lower id; and
        global ids [..., k] int64. The same on every rank and under every sharding.

    Raises:
        ValueError: k or vocab_size out of range, logits that would have to be copied, an unknown implementation.
    """
    if not 1 <= k <= vocab_size or vocab_size > _LARGEST_EXACT_ID:
        raise ValueError(f"k={k} must lie in [1, vocab_size={vocab_size}], and vocab_size in [1, {_LARGEST_EXACT_ID}]")
    rows = as_rows(logits)
    shard = VocabShard.of(logits.size(-1), group, vocab_size)
    flat_mask = None if mask is None else mask.reshape(-1)
    passes = choose("vocab_parallel_topk", "topk", implementation, logits.device)
    if passes is reference:
        values, ids = reference.topk(rows, k, group, vocab_size, temperature, flat_mask)
    else:
        local = passes.statistics(rows, k, flat_mask, shard, 1.0 / temperature)
        values, ids = merge(shard.all_gather(local), k, flat_mask)
    shape = (*logits.shape[:-1], k)
    return values.view(shape), ids.view(shape)
