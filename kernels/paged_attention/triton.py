"""Paged decode attention as Triton kernels; CUDA, or the CPU in Triton's interpreter.

A program per request, key/value head and part of the request's tokens reads keys and values once, straight from the
cache, for all query heads of the group (flash decoding, Dao et al. 2023). With several parts per request, a second
kernel merges them. Neither grid nor addresses depend on the lengths: a captured CUDA graph stays valid as they grow.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from megatron_tropd.kernels.compile_examples import Example

_TOKENS = {2: 64, 4: 32}  # per iteration, by bytes per number: more fp32 ones spill registers on sm_80
_LEAST_ROWS = 16  # of a tensor-core product
_LEAST_PART = 256  # tokens: below that, more parts only add to the merging
_LOG2_E = 1.4426950408889634


@triton.jit
def _decode_kernel(
    q,  # [r, a, d] any float, READ-ONLY
    k_cache,  # [p, z, g, d], READ-ONLY
    v_cache,  # [p, z, g, d], READ-ONLY
    lengths,  # [r] int32
    table,  # [r, blocks] int32
    out,  # [r, a, d]: the result where parts == 1, else unused
    part_out,  # [r, a, parts, d] fp32: weighted values of a part, not divided by their sum
    part_stats,  # [r, a, parts, 2] fp32: maximum (in powers of two) and sum of a part's weights
    q_stride,
    q_head_stride,
    k_block_stride,
    k_token_stride,
    k_head_stride,
    v_block_stride,
    v_token_stride,
    v_head_stride,
    table_stride,
    scale,  # times log2(e)
    window,  # earlier tokens seen; -1: all
    parts,
    group: tl.constexpr,  # query heads per key/value head
    rows: tl.constexpr,  # group, at least 16, a power of two
    width: tl.constexpr,  # d
    width_block: tl.constexpr,  # the power of two that covers d
    page: tl.constexpr,  # z
    tokens: tl.constexpr,  # per iteration, divides z
    single: tl.constexpr,  # parts == 1
    upcast: tl.constexpr,  # multiply in fp32
):
    request, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + request)
    first = tl.where(window < 0, 0, tl.maximum(length - 1 - window, 0))
    begin = first // tokens * tokens
    share = tl.cdiv(tl.cdiv(tl.maximum(length - begin, 0), parts), tokens) * tokens
    start = begin + part * share
    stop = tl.minimum(start + share, length)
    head = tl.arange(0, rows)
    column = tl.arange(0, width_block)
    inside = column < width
    heads = kv_head * group + head
    q_block = tl.load(
        q + request * q_stride + heads[:, None] * q_head_stride + column[None, :],
        (head < group)[:, None] & inside[None, :],
        0.0,
    )
    if upcast:
        q_block = q_block.to(tl.float32)
    top = tl.full([rows], -float("inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    values = tl.zeros([rows, width_block], tl.float32)
    for position in range(start, stop, tokens):
        place = position + tl.arange(0, tokens)
        block = tl.load(table + request * table_stride + position // page).to(tl.int64)
        within = place % page
        seen = (place < stop) & (place >= first)
        k = tl.load(
            k_cache
            + block * k_block_stride
            + within[None, :] * k_token_stride
            + kv_head * k_head_stride
            + column[:, None],
            seen[None, :] & inside[:, None],
            0.0,
        )
        v = tl.load(
            v_cache
            + block * v_block_stride
            + within[:, None] * v_token_stride
            + kv_head * v_head_stride
            + column[None, :],
            seen[:, None] & inside[None, :],
            0.0,
        )
        if upcast:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q_block, k, input_precision="ieee") * scale  # [rows, tokens]
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A part whose window begins later has seen nothing yet: -inf less -inf would be NaN.
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        decay = tl.exp2(top - safe_top)
        weights = tl.exp2(scores - safe_top[:, None])
        total = total * decay + tl.sum(weights, 1)
        values = values * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top
    if single:
        result = values / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(
            out + (request * tl.num_programs(1) * group + heads[:, None]) * width + column[None, :],
            result.to(out.dtype.element_ty),
            (head < group)[:, None] & inside[None, :],
        )
    else:
        place = (request * tl.num_programs(1) * group + heads) * parts + part
        tl.store(part_stats + place * 2, top, head < group)
        tl.store(part_stats + place * 2 + 1, total, head < group)
        tl.store(part_out + place[:, None] * width + column[None, :], values, (head < group)[:, None] & inside[None, :])


@triton.jit
def _merge_kernel(
    part_out,  # [n, parts, d] fp32, READ-ONLY
    part_stats,  # [n, parts, 2] fp32, READ-ONLY
    out,  # [n, d]
    parts,
    parts_block: tl.constexpr,
    width: tl.constexpr,
    width_block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, parts_block)
    column = tl.arange(0, width_block)
    tops = tl.load(part_stats + (row * parts + part) * 2, part < parts, -float("inf"))
    totals = tl.load(part_stats + (row * parts + part) * 2 + 1, part < parts, 0.0)
    top = tl.max(tops, 0)
    weights = tl.exp2(tops - tl.where(top == -float("inf"), 0.0, top))  # [parts]
    values = tl.load(
        part_out + (row * parts + part[:, None]) * width + column[None, :],
        (part < parts)[:, None] & (column < width)[None, :],
        0.0,
    )
    total = tl.sum(totals * weights, 0)
    result = tl.sum(values * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), column < width)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def part_count(programs: int, longest: int, multiprocessors: int) -> int:
    """Return into how many parts each request's tokens are cut, so that every multiprocessor has two programs.

    Args:
        programs: requests times key/value heads.
        longest: tokens that the block table has room for.
        multiprocessors: of the device.
    """
    return max(1, min(math.ceil(2 * multiprocessors / max(1, programs)), longest // _LEAST_PART, 32))


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """See op.paged_decode_attention.

    Raises:
        ValueError: blocks whose tokens the kernel cannot read in groups of 16.
    """
    page, kv_heads = k_cache.shape[1:3]
    if page % 16:
        raise ValueError(f"the Triton kernel needs cache blocks of a multiple of 16 tokens, not {page}; use chunked")
    parts = part_count(q.size(0) * kv_heads, block_table.size(1) * page, _multiprocessors(q.device))
    return _attend_in_parts(q, k_cache, v_cache, lengths, block_table, scale, window, parts)


def _attend_in_parts(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int,
    parts: int,
) -> torch.Tensor:
    (requests, heads, width), (page, kv_heads) = q.shape, k_cache.shape[1:3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if requests == 0:
        return out
    part_out, part_stats = (
        out.new_empty((requests, heads, parts, n), dtype=torch.float32) if parts > 1 else out for n in (width, 2)
    )
    q, k_cache, v_cache = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k_cache, v_cache))
    group, width_block = heads // kv_heads, max(16, triton.next_power_of_2(width))
    _decode_kernel[(requests, kv_heads, parts)](
        q,
        k_cache,
        v_cache,
        lengths.to(torch.int32),
        block_table,
        out,
        part_out,
        part_stats,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_table.stride(0),
        scale * _LOG2_E,
        window,
        parts,
        group=group,
        rows=max(_LEAST_ROWS, triton.next_power_of_2(group)),
        width=width,
        width_block=width_block,
        page=page,
        tokens=math.gcd(page, _TOKENS[q.element_size()]),
        single=parts == 1,
        upcast=q.device.type == "cpu",  # the interpreter's products know no bf16
    )
    if parts > 1:
        _merge_kernel[(requests * heads,)](
            part_out, part_stats, out, parts, triton.next_power_of_2(parts), width, width_block
        )
    return out


NARROW_LOADS = {"_merge_kernel": "a program reads a few parts of one head"}


def example_launches(example: Example) -> None:
    """Launch both kernels; see compile_examples.py."""
    q = example.per_row(32, 128, dtype=example.dtype)
    cache = torch.empty(64, 256, 8, 128, dtype=example.dtype, device="meta")
    lengths, table = example.per_row(dtype=torch.int32), example.per_row(32, dtype=torch.int32)
    for parts in (1, 4):
        _attend_in_parts(q, cache, cache, lengths, table, 128**-0.5, -1, parts)
