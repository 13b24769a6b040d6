"""The definition: log-softmax in float64 over the gathered true vocabulary, differentiated by autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _Gather(torch.autograd.Function):
    """All shards side by side; backward gives a rank the gradient of its columns (the loss is replicated)."""

    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.width, ctx.rank = shard.size(-1), group.rank()
        parts = [torch.empty_like(shard) for _ in range(group.size())]
        dist.all_gather(parts, shard.contiguous(), group=group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient[..., ctx.rank * ctx.width : (ctx.rank + 1) * ctx.width].contiguous(), None


def all_logprobs(
    logits: torch.Tensor, group: dist.ProcessGroup | None, vocab_size: int, temperature: float
) -> torch.Tensor:
    """Return log-softmax [n, vocab_size] in float64 of sharded logits [n, V/tp]."""
    whole = logits.double() if group is None or group.size() == 1 else _Gather.apply(logits.double(), group)
    return torch.log_softmax(whole[..., :vocab_size] / temperature, -1)


def logprobs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probs, entropy, largest probability; logits [n, V/tp], ids [n, j], mask [n] or None."""
    everything = all_logprobs(logits, group, vocab_size, temperature)  # [n, vocab_size]
    probabilities = everything.detach().exp()
    picked = everything.gather(-1, ids)  # [n, j]
    entropy, largest = torch.special.entr(probabilities).sum(-1), probabilities.amax(-1)  # [n]
    if mask is not None:
        picked = torch.where(mask.unsqueeze(-1), picked, 0.0)
        entropy, largest = torch.where(mask, entropy, 0.0), torch.where(mask, largest, 0.0)
    return picked.float(), entropy.float(), largest.float()
