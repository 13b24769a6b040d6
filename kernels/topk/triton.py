"""A shard's own top-k as one Triton kernel: radix selection of the k-th key, then a compaction in order of ids.

A program a row reads the row once from memory and four times more from cache: four passes find the k-th largest key
eight bits at a time, one collects. Of equal logits those with the lower ids are taken, so every layout picks the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_tropd.kernels.compile_examples import Example
from megatron_tropd.kernels.sharding import VocabShard
from megatron_tropd.kernels.triton_rows import as_bytes, block_size, load_row, widths

_BLOCK = 2048


@triton.jit
def _load_keys(logits, row, row_stride, columns, column_stride, width, readable, padded: tl.constexpr, scale):
    """Logits of a block, times scale, and uint32 keys that sort like them."""
    z = load_row(logits, row, row_stride, columns, column_stride, width, readable, padded) * scale
    z = tl.where(z == 0, 0.0, z)  # -0 and 0 are equal
    bits = z.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) | -2147483648)  # negative ones flip all bits, the others the sign
    return z, key.to(tl.uint32, bitcast=True)


@triton.jit
def _select_kernel(
    logits,  # [n, >= width] any float, READ-ONLY
    mask,  # [n] int8 or None
    out,  # [n, 2 + 2k] fp32: max, sum of e^(z - max), k values in order of ids, their global ids
    row_stride,
    column_stride,
    width,
    readable,
    padded: tl.constexpr,
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
    prefix = tl.zeros([], tl.uint32)  # the bits found so far of the k-th largest key
    remaining = wanted + tl.zeros([], tl.int32)  # how many of the keys with this prefix belong to the top k
    largest = tl.full([block], -float("inf"), tl.float32)
    for level in tl.static_range(4):
        counts = tl.zeros([512], tl.int32)
        for start in range(0, width, block):
            columns = start + tl.arange(0, block)
            z, key = _load_keys(logits, row, row_stride, columns, column_stride, width, readable, padded, scale)
            if level == 0:
                largest = tl.maximum(largest, z)
            digits = key >> (24 - 8 * level)
            candidate = (columns < width) & ((digits >> 8) == prefix)
            counts += tl.histogram(tl.where(candidate, digits & 255, 256).to(tl.int32), 512)
        bins = tl.arange(0, 512)
        counts = tl.where(bins < 256, counts, 0)  # bin 256 held the others
        at_least = tl.cumsum(counts, 0, reverse=True)
        digit = tl.sum(((at_least >= remaining) & (bins < 256)).to(tl.int32), 0) - 1
        remaining -= tl.sum(tl.where(bins == digit + 1, at_least, 0), 0)
        prefix = prefix * 256 + digit.to(tl.uint32)
    top = tl.max(largest, 0)
    finite_top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([block], tl.float32)
    taken = tl.zeros([], tl.int32)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        z, key = _load_keys(logits, row, row_stride, columns, column_stride, width, readable, padded, scale)
        larger = (columns < width) & (key > prefix)
        tie = (columns < width) & (key == prefix)
        both = larger.to(tl.int32) + 65536 * tie.to(tl.int32)  # two counts in one sum
        in_block = tl.sum(both, 0)
        if in_block > 0:
            before = tl.cumsum(both, 0)
            ties = before >> 16
            place = taken + (before & 65535) + tl.minimum(ties, remaining) - 1
            address = out + row * (2 + 2 * k) + 2 + place
            chosen = larger | (tie & (ties <= remaining))
            tl.store(address, z, chosen)
            tl.store(address + k, (columns + first_id).to(tl.float32), chosen)
        total += tl.exp(z - finite_top)  # here, since sm_80 runs out of registers where it comes first
        of_ties = tl.minimum(in_block >> 16, remaining)
        taken += (in_block & 65535) + of_ties
        remaining -= of_ties
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
            logits,
            as_bytes(mask),
            out,
            *logits.stride(),
            *widths(shard.true_width, logits),
            shard.start,
            k,
            wanted,
            scale,
            block,
            num_warps=8,
        )
    return out


def example_launches(example: Example) -> None:
    """Launch every kernel; see compile_examples.py."""
    statistics(example.logits(), 64, example.mask(), example.shard, 1.0)
