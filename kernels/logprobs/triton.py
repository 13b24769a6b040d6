"""Statistics and gradient of gathered log-probs as Triton kernels; CUDA, or the CPU in Triton's interpreter.

Forward reads the shard once (a program a row, running maximum and sums). Backward reads and writes it once (a program a
row block), then sets the few elements at the ids, each from its own sum, so that repeated ids need no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_tropd.kernels.compile_examples import Example
from megatron_tropd.kernels.sharding import VocabShard
from megatron_tropd.kernels.triton_rows import LN_2, LOG2_E, advance, as_bytes, block_size, load_row, widths

_BLOCK = 4096
_ID_BLOCK = 32
NARROW_LOADS = {"_picked_gradient_kernel": "reads the few ids of a row and what belongs to them"}


@triton.jit
def _statistics_kernel(
    logits,  # [n, >= width] any float, READ-ONLY
    mask,  # [n] int8 or None: rows to compute
    out,  # [n, >= 2 + e] fp32: max, sum of e^(z - max), with entropy sum of e^(z - max) (z - max)
    row_stride,
    column_stride,
    out_stride,
    width,
    readable,
    padded: tl.constexpr,
    scale,
    factor,  # scale * log2(e)
    with_entropy: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if mask is not None:
        if tl.load(mask + row) == 0:
            return
    top = -float("inf")
    total = tl.zeros([block], tl.float32)
    weighted = tl.zeros([block], tl.float32)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        z = load_row(logits, row, row_stride, columns, column_stride, width, readable, padded)
        top, shift, relative = advance(top, z, factor)
        decay = tl.exp2(shift)
        e = tl.exp2(relative)
        if with_entropy:
            weighted = decay * (weighted + total * shift) + e * relative
        total = decay * total + e
    tl.store(out + row * out_stride, top * scale)
    tl.store(out + row * out_stride + 1, tl.sum(total, 0))
    if with_entropy:
        tl.store(out + row * out_stride + 2, tl.sum(weighted, 0) * LN_2)


@triton.jit
def _softmax_gradient_kernel(
    logits,  # [n, columns] any float, may be `out`
    out,  # [n, columns]: -scale * sum_j g_j * p, zeros on padding and left-out rows
    mask,  # [n] int8 or None
    top,  # [n] fp32
    rest,  # [n] fp32
    gradient_sum,  # [n] fp32
    row_stride,
    column_stride,
    out_row_stride,
    out_column_stride,
    width,
    readable,
    padded: tl.constexpr,
    columns_in_all,
    scale,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    factor = -scale * tl.load(gradient_sum + row)
    if mask is not None:
        factor = tl.where(tl.load(mask + row) == 0, 0.0, factor)
    # A row without gradient is not read.
    wanted, readable = columns < tl.where(factor == 0, 0, width), tl.where(factor == 0, 0, readable)
    z = load_row(logits, row, row_stride, columns, column_stride, width, readable, padded) * scale
    p = tl.exp(z - tl.load(top + row) - tl.load(rest + row))
    value = tl.where(wanted, factor * p, 0.0)
    tl.store(
        out + row * out_row_stride + columns * out_column_stride,
        value.to(out.dtype.element_ty),
        columns < columns_in_all,
    )


@triton.jit
def _picked_gradient_kernel(
    out,  # [n, columns]: the elements at the ids are set
    mask,  # [n] int8 or None
    ids,  # [n, j] int64 columns of this shard, -1 for another's
    logprobs,  # [n, j] fp32
    gradient,  # [n, j] fp32
    gradient_sum,  # [n] fp32
    out_row_stride,
    out_column_stride,
    count,
    scale,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if mask is not None:
        if tl.load(mask + row) == 0:
            return
    places = tl.program_id(1) * block + tl.arange(0, block)
    mine = tl.load(ids + row * count + places, places < count, -1)
    value = -tl.load(gradient_sum + row) * tl.exp(tl.load(logprobs + row * count + places, places < count, 0.0))
    for start in range(0, count, block):
        others = start + tl.arange(0, block)
        their_ids = tl.load(ids + row * count + others, others < count, -2)
        g = tl.load(gradient + row * count + others, others < count, 0.0)
        value += tl.sum(tl.where(mine[:, None] == their_ids[None, :], g[None, :], 0.0), 1)
    # Repeated ids set the same value at the same place.
    address = out + row * out_row_stride + mine * out_column_stride
    tl.store(address, (scale * value).to(out.dtype.element_ty), mine >= 0)


def statistics(
    logits: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    shard: VocabShard,
    scale: float,
    with_entropy: bool,
) -> torch.Tensor:
    """See chunked.statistics."""
    n, first = logits.size(0), 2 + with_entropy
    out = logits.new_zeros((n, first + ids.size(1)), dtype=torch.float32)
    if shard.true_width == 0:
        out[:, 0] = -torch.inf
        return out
    if n == 0:
        return out
    strides = (*logits.stride(), out.stride(0))
    _statistics_kernel[(n,)](
        logits,
        as_bytes(mask),
        out,
        *strides,
        *widths(shard.true_width, logits),
        scale,
        scale * LOG2_E,
        with_entropy,
        block_size(shard.true_width, _BLOCK),
        num_warps=8,
    )
    local, owned = shard.local_ids(ids)
    out[:, first:] = (logits.gather(1, local).float() * scale).masked_fill_(~owned, 0.0)
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
    """See chunked.write_gradient."""
    n, columns = out.shape
    if n == 0:
        return
    gradient = gradient.float().contiguous()
    gradient_sum, flags = gradient.sum(1), as_bytes(mask)
    block = block_size(columns, _BLOCK)
    _softmax_gradient_kernel[(n, triton.cdiv(columns, block))](
        logits,
        out,
        flags,
        top.contiguous(),
        rest.contiguous(),
        gradient_sum,
        *logits.stride(),
        *out.stride(),
        *widths(shard.true_width, logits),
        columns,
        scale,
        block,
        num_warps=8,  # four spill on sm_100
    )
    local, owned = shard.local_ids(ids)
    local = torch.where(owned, local, -1).contiguous()
    _picked_gradient_kernel[(n, triton.cdiv(ids.size(1), _ID_BLOCK))](
        out, flags, local, logprobs.contiguous(), gradient, gradient_sum, *out.stride(), ids.size(1), scale, _ID_BLOCK
    )


def example_launches(example: Example) -> None:
    """Launch every kernel; see compile_examples.py."""
    logits, mask, shard = example.logits(), example.mask(), example.shard
    ids, at_ids, per_row = example.per_row(65, dtype=torch.int64), example.per_row(65), example.per_row()
    for with_entropy in (True, False):
        statistics(logits, ids, mask, shard, 1.0, with_entropy)
    write_gradient(logits, logits, ids, mask, per_row, per_row, at_ids, at_ids, shard, 1.0)
