"""The autograd function of gathered log-probs over any implementation's two passes. Derivation: README.md.

Forward: local statistics, one packed all-gather, exact merge. Backward: one pass, no collective. Kept for backward:
ids, log-probs, two numbers per row, and the logits themselves (no copy).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from megatron_tropd.kernels.sharding import VocabShard

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tropd.kernels.logprobs import chunked, triton

LogProbs = tuple[torch.Tensor, torch.Tensor | None]  # and entropies, where they are asked for
WithMaxProbability = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


class Passes(Protocol):
    """The passes that an implementation provides; chunked.py describes their arguments."""

    def statistics(
        self, logits: Tensor, ids: Tensor, mask: Tensor | None, shard: VocabShard, scale: float, with_entropy: bool
    ) -> Tensor:
        """Return this shard's part of every row, [n, 2 + e + j] fp32."""

    def write_gradient(
        self,
        out: Tensor,
        logits: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        top: Tensor,
        rest: Tensor,
        logprobs: Tensor,
        gradient: Tensor,
        shard: VocabShard,
        scale: float,
    ) -> None:
        """Write the gradient of the logits into `out` [n, V/tp], which may be `logits` itself."""


if TYPE_CHECKING:  # mypy compares both modules with the protocol here
    _CHUNKED: Passes = chunked
    _TRITON: Passes = triton


class GatheredLogprobs(torch.autograd.Function):
    """logits [n, V/tp], ids [n, j] -> log-probs [n, j] fp32; entropy and largest probability [n], without gradient."""

    @staticmethod
    def forward(
        ctx: Any,  # autograd's context, which takes any attribute
        logits: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        shard: VocabShard,
        scale: float,
        with_entropy: bool,
        inplace: bool,
        passes: Passes,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """`mask` [n] or None: rows to compute, the others give zeros; `passes`: the implementation's module."""
        local = passes.statistics(logits, ids, mask, shard, scale, with_entropy)
        top, rest, logprobs, entropy, largest = merge(shard.all_gather(local), mask, with_entropy)
        ctx.mark_non_differentiable(*(t for t in (entropy, largest) if t is not None))
        ctx.save_for_backward(logits, ids, mask, top, rest, logprobs)
        ctx.shard, ctx.scale, ctx.inplace, ctx.passes = shard, scale, inplace, passes
        return logprobs, entropy, largest

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor, _entropy_gradient: object, _largest_gradient: object
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the logits shard: sum_j g_j 1[v = id_j] - (sum_j g_j) softmax(v)."""
        logits, ids, mask, top, rest, logprobs = ctx.saved_tensors
        # In place every value is read before its place is written.
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        ctx.passes.write_gradient(out, logits.detach(), ids, mask, top, rest, logprobs, gradient, ctx.shard, ctx.scale)
        return out, *[None] * 7


def merge(
    gathered: torch.Tensor, mask: torch.Tensor | None, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Merge [tp, n, 2 + e + j] into maximum [n], log-sum-exp less maximum [n], log-probs [n, j], entropy [n] or None,
    and largest probability [n].

    Maximum and rest stay apart: with logits of 1e4 their sum would cost three digits. Entropy = log-sum-exp - sum p z.
    """
    tops, totals = gathered[..., 0], gathered[..., 1]
    top = tops.amax(0)
    weights = (tops - top).exp()
    total = (totals * weights).sum(0)
    rest = total.log() if mask is None else total.log().masked_fill_(~mask, 0.0)
    # One rank owns an id, the others hold 0.
    logprobs = gathered[..., 2 + with_entropy :].sum(0).sub_(top[:, None]).sub_(rest[:, None])
    largest = (-rest).exp()
    if mask is not None:
        logprobs, largest = logprobs.masked_fill_(~mask[:, None], 0.0), largest.masked_fill_(~mask, 0.0)
    if not with_entropy:
        return top, rest, logprobs, None, largest
    # Relative to the global top, so that nothing large cancels: sum p (z - top).
    relative = gathered[..., 2] + totals * (tops - top).clamp(min=-1e30)
    entropy = rest - (weights * relative).sum(0) / total
    return top, rest, logprobs, entropy if mask is None else entropy.masked_fill_(~mask, 0.0), largest


def as_outputs(
    result: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    shape: torch.Size,
    with_entropy: bool,
    with_max_probability: bool,
) -> LogProbs | WithMaxProbability:
    """Shape log-probs, entropy and largest probability of flat rows like the ids, [..., j] and [...], as asked for."""
    logprobs, entropy, largest = result  # [n, j], [n], [n]
    shaped = entropy.view(shape[:-1]) if with_entropy and entropy is not None else None
    if with_max_probability:
        return logprobs.view(shape), shaped, largest.view(shape[:-1])
    return logprobs.view(shape), shaped
