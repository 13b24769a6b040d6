"""The definition: gathered log-probs of float64 logits."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_tropd.kernels.logprobs import reference


def logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    temperature: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probs, entropy, largest probability; hidden [n, h], weight [V/tp, h], ids [n, j], mask [n] or None."""
    logits = hidden.double() @ weight.double().t()
    return reference.logprobs(logits, ids, group, vocab_size, temperature, mask)
