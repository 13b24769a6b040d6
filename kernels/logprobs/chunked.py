"""Statistics and gradient of gathered log-probs in bounded row chunks of plain torch; CPU, and fallback elsewhere."""

from __future__ import annotations

import torch

from megatron_tropd.kernels.sharding import (
    ChunkReader,
    VocabShard,
    exp_,
    row_chunks,
    rows_with_gradient,
    write_rows,
    zero_other_rows,
)


def statistics(
    logits: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    shard: VocabShard,
    scale: float,
    with_entropy: bool,
) -> torch.Tensor:
    """Return this shard's part of every row, fp32, packed for one all-gather; z = logits * scale.

    Args:
        logits: [n, V/tp].
        ids: [n, j] global ids.
        mask: [n] bool rows to compute, or None for all; the others give an arbitrary finite part.
        shard: this rank's columns.
        scale: 1 / temperature.
        with_entropy: whether the third column is there.

    Returns:
        [n, 2 + e + j]: max z, sum of e^(z - max), with entropy sum of e^(z - max) (z - max), then z at the ids that
        this shard owns and 0 at the others. A shard without true columns has -inf and zeros.
    """
    first = 2 + with_entropy
    out = logits.new_zeros((logits.size(0), first + ids.size(1)), dtype=torch.float32)
    if shard.true_width == 0:
        out[:, 0] = -torch.inf
        return out
    read = ChunkReader(logits, shard, scale)
    for chunk in row_chunks(logits.size(0), shard.true_width, mask):
        z = read(chunk)
        local, owned = shard.local_ids(ids[chunk])
        picked = z.gather(1, local).masked_fill_(~owned, 0.0)
        top = z.amax(1, keepdim=True)
        z -= torch.where(top == -torch.inf, 0.0, top)
        parts = [top]
        if with_entropy:
            e = exp_(z.clone())
            # e^-inf * -inf is 0, not NaN
            parts += [e.sum(1, keepdim=True), torch.linalg.vecdot(e, z.clamp_(min=-1e30)).unsqueeze(1)]
        else:
            parts.append(exp_(z).sum(1, keepdim=True))
        out[chunk] = torch.cat([*parts, picked], 1)
    return out


def write_gradient(
    out: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    top: torch.Tensor,
    rest: torch.Tensor,
    logprobs: torch.Tensor,
    gradient: torch.Tensor,
    shard: VocabShard,
    scale: float,
) -> None:
    """Write (sum_j g_j 1[v = id_j] - (sum_j g_j) p(v)) * scale into `out` [n, V/tp], which may be `logits` itself.

    Args:
        out: where to; every element is written.
        logits: [n, V/tp].
        ids: [n, j].
        mask: [n] bool or None; rows left out, like padding columns, receive zeros.
        top: [n] the row's maximum over all shards.
        rest: [n] log-sum-exp less maximum, over all shards.
        logprobs: [n, j] the result of the forward pass (unused here).
        gradient: [n, j] g.
        shard: this rank's columns.
        scale: 1 / temperature.
    """
    mask = rows_with_gradient(gradient, mask)
    zero_other_rows(out, mask, shard)
    if shard.true_width == 0:
        return
    read = ChunkReader(logits, shard, scale)
    for chunk in row_chunks(logits.size(0), shard.true_width, mask):
        g = gradient[chunk].float() * scale
        p = exp_(read(chunk).sub_(top[chunk, None])).mul_(-g.sum(1, keepdim=True) * (-rest[chunk, None]).exp())
        local, owned = shard.local_ids(ids[chunk])
        p.scatter_add_(1, local, g.masked_fill(~owned, 0.0))
        write_rows(out, chunk, p)
