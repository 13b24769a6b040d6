"""The autograd function of divergences from hidden states: a chunk of both logits at a time, made again for backward.

Kept for backward: hidden states and weights (by reference) and five numbers per row. jsd makes the logits once more,
since its mixture needs both log-sum-exps first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_tropd.kernels.full_divergence.function import Passes, merge, merge_mixture
from megatron_tropd.kernels.linear import Logits, WeightGradient, token_chunks
from megatron_tropd.kernels.sharding import VocabShard

# (student logits, teacher logits, mask or None, rows) of a chunk -> its statistics
_Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, slice], torch.Tensor]


class FusedLinearFullDivergence(torch.autograd.Function):
    """Hidden states [n, h] and weights [V/tp, h] of student and teacher -> loss [n] fp32."""

    @staticmethod
    def forward(
        ctx: Any,  # autograd's context, which takes any attribute
        hidden: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
        mask: torch.Tensor | None,
        kind: str,
        beta: float,
        shard: VocabShard,
        scale: float,
        passes: Passes,
    ) -> torch.Tensor:
        """`mask` [n] or None: rows to compute; `passes`: the module of full_divergence's implementation."""
        student, teacher = Logits(hidden, weight), Logits(teacher_hidden, teacher_weight)

        def over_chunks(columns: int, compute: _Compute) -> torch.Tensor:
            """Gather `compute(student logits, teacher logits, mask, rows)` of every chunk: [tp, n, columns]."""
            local = hidden.new_empty((hidden.size(0), columns), dtype=torch.float32)
            for chunk in token_chunks(hidden.size(0), weight.size(0), hidden.device):
                part = None if mask is None else mask[chunk]
                local[chunk] = compute(student(chunk), teacher(chunk), part, chunk)
            return shard.all_gather(local)

        gathered = over_chunks(5, lambda s, t, m, _: passes.statistics(s, t, kind, m, shard, scale))
        stats, loss = merge(gathered, kind, mask)
        divergence = loss
        if kind == "jsd":
            parts = over_chunks(
                2, lambda s, t, m, rows: passes.mixture_statistics(s, t, beta, m, stats[rows], shard, scale)
            )
            divergence, loss = merge_mixture(parts, beta, mask)
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight, mask, stats, divergence)
        ctx.settings = (kind, beta, shard, scale, passes)
        return loss.clone()  # `divergence` may be the same tensor, and is kept

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return this shard's part of the student's hidden states' gradient, and the gradient of its weight's shard."""
        hidden, weight, teacher_hidden, teacher_weight, mask, stats, divergence = ctx.saved_tensors
        kind, beta, shard, scale, passes = ctx.settings
        student, teacher = Logits(hidden, weight), Logits(teacher_hidden, teacher_weight)
        total = WeightGradient(weight, ctx.needs_input_grad[1])
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for chunk in token_chunks(hidden.size(0), weight.size(0), hidden.device):
            z = student(chunk)
            part = None if mask is None else mask[chunk]
            saved = (stats[chunk], divergence[chunk], gradient[chunk])
            passes.write_gradient(z, z, teacher(chunk), kind, beta, part, *saved, shard, scale)
            total.add(z, hidden[chunk])
            if hidden_gradient is not None:
                torch.mm(z, weight, out=hidden_gradient[chunk])
        return hidden_gradient, total.result(), *[None] * 8
