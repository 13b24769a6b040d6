"""Distributed top-k in bounded row chunks: each shard's own k, one packed all-gather, merge. No gradient.

Logit and id are compared as one integer, so that equal logits (common in bf16) are ordered by id and every layout picks
the same tokens.
"""

from __future__ import annotations

import torch

from megatron_tropd.kernels.sharding import VocabShard, row_chunks

_LOW = (1 << 32) - 1


def _keys(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Pack fp32 values and ids into int64 that sort by value, then by lower id."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0 and 0 equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return (ordered << 32) | (_LOW - ids)


def _unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ordered = (keys >> 32).to(torch.int32)
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), _LOW - (keys & _LOW)


def topk(logits, rows, k: int, shard: VocabShard, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See op.vocab_parallel_topk; logits [n, V/tp], rows [m] to compute, the others give zeros."""
    n, m = logits.size(0), rows.numel()
    # Columns of the packed exchange: max, sum of exponentials, k values, k ids (exact in fp32 below 2^24).
    local = torch.zeros((m, 2 + 2 * k), dtype=torch.float32, device=logits.device)
    local[:, 0] = -torch.inf
    local[:, 2 : 2 + k] = -torch.inf
    width = min(k, shard.true_width)
    start = 0
    for chunk in row_chunks(rows, 2 * shard.true_width) if width else ():  # twice: the keys are 64-bit
        stop = start + chunk.numel()
        z = logits[:, : shard.true_width].index_select(0, chunk).float()
        z = z.div_(temperature) if temperature != 1.0 else z
        columns = torch.arange(shard.true_width, device=z.device)
        best = _keys(z, columns).topk(width, dim=1).values
        values, ids = _unpack(best)
        local[start:stop, 2 : 2 + width] = values
        local[start:stop, 2 + k : 2 + k + width] = (ids + shard.start).float()
        local[start:stop, 0] = values[:, 0]
        local[start:stop, 1] = z.sub_(values[:, :1]).exp_().sum(1)
        start = stop
    values, ids = _merge(shard.all_gather(local), k)
    out_values = values.new_zeros((n, k)).index_copy_(0, rows, values)
    return out_values, ids.new_zeros((n, k)).index_copy_(0, rows, ids)


def _merge(gathered: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge [tp, m, 2 + 2k] into log-probs [m, k] and ids [m, k]."""
    tops, totals = gathered[..., 0], gathered[..., 1]
    top = tops.amax(0)
    rest = (totals * (tops - top).exp()).sum(0).log()
    values = gathered[..., 2 : 2 + k].transpose(0, 1).flatten(1)
    ids = gathered[..., 2 + k :].transpose(0, 1).flatten(1).to(torch.int64)
    best = _keys(values, ids).topk(k, dim=1).values
    values, ids = _unpack(best)
    return values.sub_(top[:, None]).sub_(rest[:, None]), ids
