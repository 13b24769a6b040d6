"""Gathered log-probs in bounded row chunks of plain torch; CPU, and fallback elsewhere. Derivation: README.md.

Forward: each row's local statistics and gathered logits, one packed all-gather, exact merge. Backward: one pass, no
collective. Kept for backward: ids, two numbers a row, and the logits themselves (no copy). The log-sum-exp is kept as
maximum and rest: with logits of 1e4 their sum would cost three digits.
"""

from __future__ import annotations

import torch

from megatron_tropd.kernels.sharding import VocabShard, row_chunks


class GatheredLogprobs(torch.autograd.Function):
    """logits [n, V/tp], ids [n, j] -> log-probs [n, j] fp32 and entropy [n] fp32 (no gradient)."""

    @staticmethod
    def forward(ctx, logits, ids, rows, shard: VocabShard, scale: float, with_entropy: bool, inplace_backward: bool):
        """`rows` [m]: indices of the rows to compute; the others give zeros. scale = 1 / temperature."""
        local = _local_statistics(logits, ids, rows, shard, scale, with_entropy)
        top, rest, entropy, picked = _merge(shard.all_gather(local), with_entropy)
        logprobs = picked.new_zeros(ids.shape).index_copy_(0, rows, picked.sub_(top[:, None]).sub_(rest[:, None]))
        all_entropy = None
        if with_entropy:
            all_entropy = entropy.new_zeros(ids.size(0)).index_copy_(0, rows, entropy)
            ctx.mark_non_differentiable(all_entropy)
        ctx.save_for_backward(logits, ids, rows, top, rest)
        ctx.shard, ctx.scale, ctx.inplace = shard, scale, inplace_backward
        return logprobs, all_entropy

    @staticmethod
    def backward(ctx, gradient, _entropy_gradient):
        """Return the gradient of the logits shard: sum_j g_j 1[v = id_j] - (sum_j g_j) softmax(v)."""
        logits, ids, rows, top, rest = ctx.saved_tensors
        # In place every value is read before its place is written, a chunk at a time.
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        _zero_other_rows(out, rows)
        _write_gradient(out, logits.detach(), ids, rows, top, rest, gradient, ctx.shard, ctx.scale)
        return out, None, None, None, None, None, None


def _local_ids(ids: torch.Tensor, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (column in this shard, whether this shard owns it)."""
    local = ids - shard.start
    owned = (local >= 0) & (local < shard.true_width)
    return torch.where(owned, local, 0), owned


def _local_statistics(logits, ids, rows, shard: VocabShard, scale: float, with_entropy: bool) -> torch.Tensor:
    """Return [m, 2 + e + j]: max, sum of e^(z - max), with entropy sum of e^(z - max) (z - max), and gathered z."""
    statistics = 2 + with_entropy
    out = torch.zeros((rows.numel(), statistics + ids.size(1)), dtype=torch.float32, device=logits.device)
    out[:, 0] = -torch.inf
    if shard.true_width == 0:  # a shard of nothing but padding
        return out
    start = 0
    for chunk in row_chunks(rows, shard.true_width):
        stop = start + chunk.numel()
        z = _load(logits, chunk, shard, scale)
        local, owned = _local_ids(ids.index_select(0, chunk), shard)
        out[start:stop, statistics:] = z.gather(1, local).masked_fill_(~owned, 0.0)
        top = z.amax(1, keepdim=True)
        z -= torch.where(top == -torch.inf, 0.0, top)
        if with_entropy:
            e = z.exp()
            out[start:stop, 1] = e.sum(1)
            out[start:stop, 2] = torch.linalg.vecdot(e, z.clamp_(min=-1e30))  # e^-inf * -inf is 0, not NaN
        else:
            out[start:stop, 1] = z.exp_().sum(1)
        out[start:stop, 0] = top.squeeze(1)
        start = stop
    return out


def _load(logits, chunk: torch.Tensor, shard: VocabShard, scale: float) -> torch.Tensor:
    """Copy a chunk's true columns to fp32, temperature applied; the caller may overwrite it."""
    z = logits[:, : shard.true_width].index_select(0, chunk).float()
    return z.mul_(scale) if scale != 1.0 else z


def _merge(
    gathered: torch.Tensor, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Merge [tp, m, 2 + e + j] into maximum [m], log-sum-exp less maximum [m], entropy [m], gathered logits [m, j].

    Entropy = log-sum-exp - sum p z; a shard's part of sum p z is e^(top - log-sum-exp) (weighted + top * total).
    """
    tops, totals = gathered[..., 0], gathered[..., 1]
    top = tops.amax(0)
    total = (totals * (tops - top).exp()).sum(0)
    rest = total.log()
    picked = gathered[..., 2 + with_entropy :].sum(0)  # one rank owns an id, the others hold 0
    if not with_entropy:
        return top, rest, None, picked
    # Relative to the global top, so that nothing large cancels: sum p (z - top).
    relative = gathered[..., 2] + totals * (tops - top).clamp(min=-1e30)
    mean = ((tops - top).exp() * relative).sum(0) / total
    return top, rest, rest - mean, picked


def _zero_other_rows(out: torch.Tensor, rows: torch.Tensor) -> None:
    if rows.numel() == out.size(0):
        return
    others = torch.ones(out.size(0), dtype=torch.bool, device=out.device)
    others[rows] = False
    out.masked_fill_(others.unsqueeze(1), 0.0)


def _write_gradient(out, logits, ids, rows, top, rest, gradient, shard: VocabShard, scale: float) -> None:
    """Write d/dz_v = (sum_j g_j 1[v = id_j] - (sum_j g_j) p(v)) / temperature into the true columns of `out`."""
    if shard.true_width < out.size(1):
        out[:, shard.true_width :].zero_()
    if shard.true_width == 0:
        return
    start = 0
    for chunk in row_chunks(rows, shard.true_width):
        stop = start + chunk.numel()
        g = gradient.index_select(0, chunk).float() * scale
        p = _load(logits, chunk, shard, scale).sub_(top[start:stop, None]).sub_(rest[start:stop, None]).exp_()
        p.mul_(-g.sum(1, keepdim=True))
        local, owned = _local_ids(ids.index_select(0, chunk), shard)
        p.scatter_add_(1, local, g.masked_fill(~owned, 0.0))
        out[:, : shard.true_width].index_copy_(0, chunk, p.to(out.dtype))
        start = stop


def logprobs(logits, ids, rows, shard: VocabShard, temperature: float, with_entropy: bool, inplace_backward: bool):
    """See op.vocab_parallel_logprobs; logits [n, V/tp], ids [n, j], rows [m]."""
    return GatheredLogprobs.apply(logits, ids, rows, shard, 1.0 / temperature, with_entropy, inplace_backward)
