"""The autograd function of log-probs from hidden states: a chunk of logits at a time, made again for backward.

Kept for backward: hidden states, weight (both by reference), ids, log-probs and two numbers per row.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_tropd.kernels.linear import Logits, WeightGradient, token_chunks
from megatron_tropd.kernels.logprobs.function import Passes, merge
from megatron_tropd.kernels.sharding import VocabShard


class FusedLinearLogprobs(torch.autograd.Function):
    """hidden [n, h], weight [V/tp, h], ids [n, j] -> log-probs [n, j] fp32; entropy, largest probability [n]."""

    @staticmethod
    def forward(
        ctx: Any,  # autograd's context, which takes any attribute
        hidden: torch.Tensor,
        weight: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        shard: VocabShard,
        scale: float,
        with_entropy: bool,
        passes: Passes,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """`mask` [n] or None: rows to compute; `passes`: the module of vocab_parallel_logprobs' implementation."""
        logits = Logits(hidden, weight)
        local = hidden.new_empty((hidden.size(0), 2 + with_entropy + ids.size(1)), dtype=torch.float32)
        for chunk in token_chunks(hidden.size(0), weight.size(0), hidden.device):
            part = None if mask is None else mask[chunk]
            local[chunk] = passes.statistics(logits(chunk), ids[chunk], part, shard, scale, with_entropy)
        top, rest, logprobs, entropy, largest = merge(shard.all_gather(local), mask, with_entropy)
        ctx.mark_non_differentiable(*(t for t in (entropy, largest) if t is not None))
        ctx.save_for_backward(hidden, weight, ids, mask, top, rest, logprobs)
        ctx.settings = (shard, scale, passes)
        return logprobs, entropy, largest

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor, _entropy_gradient: object, _largest_gradient: object
    ) -> tuple[torch.Tensor | None, ...]:
        """Return this shard's part of the hidden states' gradient, and the gradient of the weight's shard."""
        hidden, weight, ids, mask, top, rest, logprobs = ctx.saved_tensors
        shard, scale, passes = ctx.settings
        logits, total = Logits(hidden, weight), WeightGradient(weight, ctx.needs_input_grad[1])
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for chunk in token_chunks(hidden.size(0), weight.size(0), hidden.device):
            z = logits(chunk)
            part = None if mask is None else mask[chunk]
            saved = (top[chunk], rest[chunk], logprobs[chunk], gradient[chunk])
            passes.write_gradient(z, z, ids[chunk], part, *saved, shard, scale)
            total.add(z, hidden[chunk])
            if hidden_gradient is not None:
                torch.mm(z, weight, out=hidden_gradient[chunk])
        return hidden_gradient, total.result(), *[None] * 6
