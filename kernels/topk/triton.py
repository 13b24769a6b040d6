"""A shard's own top-k as one Triton kernel: radix selection of the k-th key, then a compaction in order of ids.

A program a row reads the row once from memory and four times more from cache: four passes find the k-th largest key
eight bits at a time, one collects. Of equal logits those with the lower ids are taken, so every layout picks the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_tropd.kernels.sharding import VocabShard
from megatron_tropd.kernels.triton_rows import advance, as_bytes, block_size

_BLOCK = 2048


@triton.jit
def _load_keys(logits, row, row_stride, columns, column_stride, width, scale):
    """Logits of a block, times scale, and int64 keys in [0, 2^32) that sort like them."""
    z = tl.load(logits + row * row_stride + columns * column_stride, columns < width, -float("inf"))
    z = z.to(tl.float32) * scale
    z = tl.where(z == 0, 0.0, z)  # -0 and 0 are equal
    bits = z.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return z, ordered + 2147483648


@triton.jit
def _select_kernel(
    logits,  # [n, >= width] any float, READ-ONLY
    mask,  # [n] int8 or None
    out,  # [n, 2 + 2k] fp32: max, sum of e^(z - max), k values in order of ids, their global ids
    row_stride,
    column_stride,
    width,
    first_id,
    k,
    wanted,  # min(k, width)
    scale,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if mask is not None:
        if tl.load(mask + row) == 0:
            return
    prefix = tl.zeros([], tl.int64)  # the bits found so far of the k-th largest key
    remaining = wanted + tl.zeros([], tl.int32)  # how many of the keys with this prefix belong to the top k
    for level in tl.static_range(4):
        # No constexpr: the unrolled loop assigns it again. A name of its own: `shift` below is a float.
        low = 24 - 8 * level
        counts = tl.zeros([512], tl.int32)
        for start in range(0, width, block):
            columns = start + tl.arange(0, block)
            _, key = _load_keys(logits, row, row_stride, columns, column_stride, width, scale)
            candidate = (columns < width) & ((key >> (low + 8)) == prefix)
            counts += tl.histogram(tl.where(candidate, (key >> low) & 255, 256).to(tl.int32), 512)
        bins = tl.arange(0, 512)
        counts = tl.where(bins < 256, counts, 0)  # bin 256 held the others
        at_least = tl.cumsum(counts, 0, reverse=True)
        digit = tl.sum(((at_least >= remaining) & (bins < 256)).to(tl.int32), 0) - 1
        remaining -= tl.sum(tl.where(bins == digit + 1, at_least, 0), 0)
        prefix = prefix * 256 + digit
    top = -float("inf")
    total = tl.zeros([block], tl.float32)
    taken = tl.zeros([], tl.int32)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        z, key = _load_keys(logits, row, row_stride, columns, column_stride, width, scale)
        top, shift, relative = advance(top, z)
        total = tl.exp(shift) * total + tl.exp(relative)
        inside = columns < width
        tie = inside & (key == prefix)
        tie_rank = tl.cumsum(tie.to(tl.int32), 0)
        chosen = (inside & (key > prefix)) | (tie & (tie_rank <= remaining))
        place = taken + tl.cumsum(chosen.to(tl.int32), 0) - 1
        address = out + row * (2 + 2 * k) + 2 + place
        tl.store(address, z, chosen)
        tl.store(address + k, (columns + first_id).to(tl.float32), chosen)
        taken += tl.sum(chosen.to(tl.int32), 0)
        remaining -= tl.minimum(tl.sum(tie.to(tl.int32), 0), remaining)
    tl.store(out + row * (2 + 2 * k), top)
    tl.store(out + row * (2 + 2 * k) + 1, tl.sum(total, 0))


def statistics(
    logits: torch.Tensor, k: int, mask: torch.Tensor | None, shard: VocabShard, scale: float
) -> torch.Tensor:
    """See chunked.statistics; the k pairs come in order of ids."""
    n, wanted = logits.size(0), min(k, shard.true_width)
    out = logits.new_zeros((n, 2 + 2 * k), dtype=torch.float32)
    out[:, 0] = -torch.inf
    out[:, 2 : 2 + k] = -torch.inf
    if wanted and n:
        block = block_size(shard.true_width, _BLOCK)
        _select_kernel[(n,)](
            logits, as_bytes(mask), out, *logits.stride(), shard.true_width, shard.start, k, wanted, scale, block
        )
    return out
