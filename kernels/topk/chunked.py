"""A shard's own top-k in bounded row chunks of plain torch.

Equal logits (common in bf16) are ordered by id, so that every layout picks the same tokens: some more candidates than k
are selected by value, and ordered with their ids as one integer. Rows with still more ties are ordered so as a whole.
"""

from __future__ import annotations

import torch

from megatron_tropd.kernels.sharding import ChunkReader, VocabShard, exp_, row_chunks
from megatron_tropd.kernels.topk.ordering import keys, unpack

_SPARE = 32  # candidates beyond k


def _select(z: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest of each row of `z` [c, w] and their columns, in order, the lower column first at a tie."""
    values, columns = z.topk(min(k + _SPARE, z.size(1)), dim=1)
    best = keys(values, columns).topk(k, dim=1).values
    if values.size(1) < z.size(1):
        # The candidates hold every tie of the k-th value only if they end below it.
        tied = (values[:, -1] >= values[:, k - 1]).nonzero().squeeze(1)
        if tied.numel():
            every = torch.arange(z.size(1), device=z.device)
            best[tied] = keys(z[tied], every).topk(k, dim=1).values
    return unpack(best)


def statistics(
    logits: torch.Tensor, k: int, mask: torch.Tensor | None, shard: VocabShard, scale: float
) -> torch.Tensor:
    """Return [n, 2 + 2k] fp32: maximum, sum of e^(z - max), the k largest z = logits * scale and their global ids.

    Args:
        logits: [n, V/tp].
        k: may exceed the shard's columns; the places left over hold -inf.
        mask: [n] bool rows to compute, or None for all; the others give an arbitrary part.
        shard: this rank's columns.
        scale: 1 / temperature.
    """
    out = logits.new_zeros((logits.size(0), 2 + 2 * k), dtype=torch.float32)
    out[:, 0] = -torch.inf
    out[:, 2 : 2 + k] = -torch.inf
    width = min(k, shard.true_width)
    if width == 0:
        return out
    read = ChunkReader(logits, shard, scale)
    for chunk in row_chunks(logits.size(0), 2 * shard.true_width, mask):  # twice: keys are 64-bit
        z = read(chunk)
        values, ids = _select(z, width)
        total = exp_(z.sub_(values[:, :1])).sum(1)
        part = out[chunk]  # a view of a slice, a copy of listed rows
        part[:, 0], part[:, 1] = values[:, 0], total
        part[:, 2 : 2 + width], part[:, 2 + k : 2 + k + width] = values, (ids + shard.start).float()
        out[chunk] = part
    return out
