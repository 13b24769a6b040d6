"""A shard's own top-k in bounded row chunks of plain torch.

Logit and id are compared as one integer, so that equal logits (common in bf16) are ordered by id and every layout picks
the same tokens.
"""

from __future__ import annotations

import torch

from megatron_tropd.kernels.sharding import ChunkReader, VocabShard, row_chunks
from megatron_tropd.kernels.topk.ordering import keys, unpack


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
    columns = torch.arange(shard.true_width, device=logits.device)
    read = ChunkReader(logits, shard, scale)
    for chunk in row_chunks(logits.size(0), 2 * shard.true_width, mask):  # twice: the keys are 64-bit
        z = read(chunk)
        values, ids = unpack(keys(z, columns).topk(width, dim=1).values)
        total = z.sub_(values[:, :1]).exp_().sum(1)
        part = out[chunk]  # a view of a slice, a copy of listed rows
        part[:, 0], part[:, 1] = values[:, 0], total
        part[:, 2 : 2 + width], part[:, 2 + k : 2 + k + width] = values, (ids + shard.start).float()
        out[chunk] = part
    return out
