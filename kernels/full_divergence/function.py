"""The autograd function of the full divergences over any implementation's passes. Derivation: README.md.

Forward: one packed all-gather (two for jsd). Backward: one pass, no collective. Kept for backward: five numbers per row
and the two logits themselves (no copy). The teacher receives no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from megatron_tropd.kernels.sharding import VocabShard

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tropd.kernels.full_divergence import chunked, triton


class Passes(Protocol):
    """The passes that an implementation provides; chunked.py describes their arguments."""

    def statistics(
        self, student: Tensor, teacher: Tensor, kind: str, mask: Tensor | None, shard: VocabShard, scale: float
    ) -> Tensor:
        """Return this shard's part of every row, [n, 5] fp32."""

    def mixture_statistics(
        self,
        student: Tensor,
        teacher: Tensor,
        beta: float,
        mask: Tensor | None,
        stats: Tensor,
        shard: VocabShard,
        scale: float,
    ) -> Tensor:
        """Return this shard's part of jsd's second look, [n, 2] fp32."""

    def write_gradient(
        self,
        out: Tensor,
        student: Tensor,
        teacher: Tensor,
        kind: str,
        beta: float,
        mask: Tensor | None,
        stats: Tensor,
        divergence: Tensor,
        gradient: Tensor,
        shard: VocabShard,
        scale: float,
    ) -> None:
        """Write the gradient of the student's logits into `out` [n, V/tp], which may be `student` itself."""


if TYPE_CHECKING:  # mypy compares both modules with the protocol here
    _CHUNKED: Passes = chunked
    _TRITON: Passes = triton


class FullDivergence(torch.autograd.Function):
    """student and teacher logits [n, V/tp] -> loss [n] fp32."""

    @staticmethod
    def forward(
        ctx: Any,  # autograd's context, which takes any attribute
        student: torch.Tensor,
        teacher: torch.Tensor,
        mask: torch.Tensor | None,
        kind: str,
        beta: float,
        shard: VocabShard,
        scale: float,
        inplace: bool,
        passes: Passes,
    ) -> torch.Tensor:
        """`mask` [n] or None: rows to compute, the others give zeros; `passes`: the implementation's module."""
        gathered = shard.all_gather(passes.statistics(student, teacher, kind, mask, shard, scale))
        stats, loss = merge(gathered, kind, mask)
        divergence = loss
        if kind == "jsd":
            parts = passes.mixture_statistics(student, teacher, beta, mask, stats, shard, scale)
            divergence, loss = merge_mixture(shard.all_gather(parts), beta, mask)
        ctx.save_for_backward(student, teacher, mask, stats, divergence)
        ctx.settings = (kind, beta, shard, scale, inplace, passes)
        return loss.clone()  # `divergence` may be the same tensor, and is kept

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the student's logits shard."""
        student, teacher, mask, stats, divergence = ctx.saved_tensors
        kind, beta, shard, scale, inplace, passes = ctx.settings
        out = student.detach() if inplace else torch.empty_like(student)
        passes.write_gradient(
            out, student.detach(), teacher.detach(), kind, beta, mask, stats, divergence, gradient, shard, scale
        )
        return out, *[None] * 8


def merge_mixture(gathered: torch.Tensor, beta: float, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge jsd's second look [tp, n, 2] into KL(student || m) [n] and the loss [n], 0 on rows left out."""
    divergence, from_teacher = gathered.sum(0).unbind(1)
    loss = beta * from_teacher + (1 - beta) * divergence
    return divergence, loss if mask is None else torch.where(mask, loss, 0.0)


def merge(gathered: torch.Tensor, kind: str, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge [tp, n, 5] into [n, 4] (maximum and log-sum-exp less it, of student and teacher) and the KL [n].

    The cross terms are relative to the shards' maxima; moving them to the row's adds sum * (difference of the shifts).
    Rows that the mask leaves out give zeros.
    """
    tops_s, totals_s, tops_t, totals_t, cross = gathered.unbind(-1)
    top_s, top_t = tops_s.amax(0), tops_t.amax(0)
    shift_s, shift_t = (tops_s - top_s).clamp(min=-1e30), (tops_t - top_t).clamp(min=-1e30)
    weights_s, weights_t = shift_s.exp(), shift_t.exp()
    total_s, total_t = (totals_s * weights_s).sum(0), (totals_t * weights_t).sum(0)
    rest_s, rest_t = total_s.log(), total_t.log()
    stats = torch.stack([top_s, rest_s, top_t, rest_t], 1)
    if kind == "forward_kl":
        moved = cross + totals_t * (shift_t - shift_s)
        divergence = (weights_t * moved).sum(0) / total_t + (rest_s - rest_t)
    else:
        moved = cross + totals_s * (shift_s - shift_t)
        divergence = (weights_s * moved).sum(0) / total_s + (rest_t - rest_s)
    if mask is not None:
        stats, divergence = torch.where(mask[:, None], stats, 0.0), torch.where(mask, divergence, 0.0)
    return stats, divergence
