"""The definition: sort the float64 log-softmax of the gathered true vocabulary, ties by lower id."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_tropd.kernels.logprobs.reference import all_logprobs


def topk(
    logits: torch.Tensor,
    k: int,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See op.vocab_parallel_topk; logits [n, V/tp], mask [n] or None."""
    everything = all_logprobs(logits, group, vocab_size, temperature)
    values, ids = torch.sort(everything, dim=-1, descending=True, stable=True)
    values, ids = values[:, :k].float(), ids[:, :k]
    if mask is not None:
        values, ids = torch.where(mask[:, None], values, 0.0), torch.where(mask[:, None], ids, 0)
    return values.contiguous(), ids.contiguous()
