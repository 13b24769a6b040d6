"""Statistics and gradient of the full divergences as Triton kernels; CUDA, or the CPU in Triton's interpreter.

Forward reads both shards once (twice for jsd): a program a row, running maxima, sums and cross term. Backward reads
both and writes one: a program a row block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_tropd.kernels.compile_examples import Example
from megatron_tropd.kernels.sharding import VocabShard
from megatron_tropd.kernels.triton_rows import LN_2, LOG2_E, advance, as_bytes, block_size, load_row, widths

_BLOCK = 2048
_KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


@triton.jit
def _statistics_kernel(
    weighting,  # [n, >= width] logits of the model whose probabilities weigh the cross term, READ-ONLY
    other,  # [n, >= width] logits of the other model, READ-ONLY
    mask,  # [n] int8 or None: rows to compute
    out,  # [n, 5] fp32: weighting's maximum and sum, other's, sum of e^w (w - o)
    weighting_row_stride,
    weighting_column_stride,
    other_row_stride,
    other_column_stride,
    width,
    readable,
    padded: tl.constexpr,
    scale,
    factor,  # scale * log2(e)
    with_cross: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if mask is not None:
        if tl.load(mask + row) == 0:
            return
    top_w = -float("inf")
    top_o = -float("inf")
    total_w = tl.zeros([block], tl.float32)
    total_o = tl.zeros([block], tl.float32)
    cross = tl.zeros([block], tl.float32)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        w = load_row(weighting, row, weighting_row_stride, columns, weighting_column_stride, width, readable, padded)
        o = load_row(other, row, other_row_stride, columns, other_column_stride, width, readable, padded)
        top_w, shift_w, w = advance(top_w, w, factor)
        top_o, shift_o, o = advance(top_o, o, factor)
        e = tl.exp2(w)
        if with_cross:
            # Moving both maxima moves each earlier term (w - o) by the difference of the shifts.
            moved = tl.exp2(shift_w) * (cross + total_w * (shift_w - shift_o))
            cross = moved + e * (w - o)
        total_w = tl.exp2(shift_w) * total_w + e
        total_o = tl.exp2(shift_o) * total_o + tl.exp2(o)
    tl.store(out + row * 5, top_w * scale)
    tl.store(out + row * 5 + 1, tl.sum(total_w, 0))
    tl.store(out + row * 5 + 2, top_o * scale)
    tl.store(out + row * 5 + 3, tl.sum(total_o, 0))
    tl.store(out + row * 5 + 4, tl.sum(cross, 0) * LN_2)


@triton.jit
def _expm1(y):
    """e^y - 1 for y <= 0, by its series near 0 where the difference would cancel."""
    series = y * (1 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720 + y * (1 / 5040)))))))
    return tl.where(y > -0.25, series, tl.exp(y) - 1)


@triton.jit
def _log1p(x):
    """log(1 + x) for -1 < x <= 0, by the series of atanh near 0."""
    s = x / (2 + x)
    q = s * s
    series = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9)))))
    return tl.where(x > -0.25, series, tl.log(1 + x))


@triton.jit
def _over_mixture(a, b, beta):
    """a - m and b - m for m = log(beta e^b + (1 - beta) e^a), exactly 0 where a = b; see chunked._over_mixture."""
    d = a - b
    larger = -_log1p(tl.where(d > 0, beta, 1 - beta) * _expm1(-tl.abs(d)))
    return larger + tl.minimum(d, 0.0), larger - tl.maximum(d, 0.0)


@triton.jit
def _load_logprobs(
    logits, row, row_stride, columns, column_stride, width, readable, padded: tl.constexpr, top, rest, scale
):
    """Log-probs of a block, -inf as -1e30."""
    z = load_row(logits, row, row_stride, columns, column_stride, width, readable, padded)
    return tl.maximum(z * scale - top - rest, -1e30)


@triton.jit
def _mixture_kernel(
    student,  # [n, >= width], READ-ONLY
    teacher,  # [n, >= width], READ-ONLY
    mask,  # [n] int8 or None
    stats,  # [n, 4] fp32
    out,  # [n, 2] fp32: parts of KL(student || m), KL(teacher || m)
    student_row_stride,
    student_column_stride,
    teacher_row_stride,
    teacher_column_stride,
    width,
    readable,
    padded: tl.constexpr,
    scale,
    beta,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if mask is not None:
        if tl.load(mask + row) == 0:
            return
    top_s, rest_s = tl.load(stats + row * 4), tl.load(stats + row * 4 + 1)
    top_t, rest_t = tl.load(stats + row * 4 + 2), tl.load(stats + row * 4 + 3)
    of_student = tl.zeros([block], tl.float32)
    of_teacher = tl.zeros([block], tl.float32)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        a = _load_logprobs(
            student,
            row,
            student_row_stride,
            columns,
            student_column_stride,
            width,
            readable,
            padded,
            top_s,
            rest_s,
            scale,
        )
        b = _load_logprobs(
            teacher,
            row,
            teacher_row_stride,
            columns,
            teacher_column_stride,
            width,
            readable,
            padded,
            top_t,
            rest_t,
            scale,
        )
        over_s, over_t = _over_mixture(a, b, beta)
        of_student += tl.exp(a) * over_s
        of_teacher += tl.exp(b) * over_t
    tl.store(out + row * 2, tl.sum(of_student, 0))
    tl.store(out + row * 2 + 1, tl.sum(of_teacher, 0))


@triton.jit
def _gradient_kernel(
    student,  # [n, columns], may be `out`
    teacher,  # [n, >= width], READ-ONLY
    out,  # [n, columns]
    mask,  # [n] int8 or None
    stats,  # [n, 4] fp32
    divergence,  # [n] fp32
    gradient,  # [n] fp32
    student_row_stride,
    student_column_stride,
    teacher_row_stride,
    teacher_column_stride,
    out_row_stride,
    out_column_stride,
    width,
    readable,
    padded: tl.constexpr,
    columns_in_all,
    scale,
    beta,
    kind: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    g = scale * tl.load(gradient + row)
    if mask is not None:
        g = tl.where(tl.load(mask + row) == 0, 0.0, g)
    # A row without gradient is not read.
    wanted, readable = columns < tl.where(g == 0, 0, width), tl.where(g == 0, 0, readable)
    top_s, rest_s = tl.load(stats + row * 4), tl.load(stats + row * 4 + 1)
    top_t, rest_t = tl.load(stats + row * 4 + 2), tl.load(stats + row * 4 + 3)
    a = _load_logprobs(
        student, row, student_row_stride, columns, student_column_stride, width, readable, padded, top_s, rest_s, scale
    )
    b = _load_logprobs(
        teacher, row, teacher_row_stride, columns, teacher_column_stride, width, readable, padded, top_t, rest_t, scale
    )
    if kind == 0:
        value = tl.exp(a) - tl.exp(b)
    elif kind == 1:
        value = tl.exp(a) * ((a - b) - tl.load(divergence + row))
    else:
        over_s, _ = _over_mixture(a, b, beta)
        value = (1 - beta) * tl.exp(a) * (over_s - tl.load(divergence + row))
    value = tl.where(wanted, g * value, 0.0)
    address = out + row * out_row_stride + columns * out_column_stride
    tl.store(address, value.to(out.dtype.element_ty), columns < columns_in_all)


def statistics(
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: str,
    mask: torch.Tensor | None,
    shard: VocabShard,
    scale: float,
) -> torch.Tensor:
    """See chunked.statistics."""
    out = student.new_zeros((student.size(0), 5), dtype=torch.float32)
    if shard.true_width == 0:
        out[:, 0] = out[:, 2] = -torch.inf
        return out
    if student.size(0) == 0:
        return out
    weighting, other = (teacher, student) if kind == "forward_kl" else (student, teacher)
    _statistics_kernel[(student.size(0),)](
        weighting,
        other,
        as_bytes(mask),
        out,
        *weighting.stride(),
        *other.stride(),
        *widths(shard.true_width, student, teacher),
        scale,
        scale * LOG2_E,
        kind != "jsd",
        block_size(shard.true_width, _BLOCK),
        num_warps=8,
    )
    return out[:, [2, 3, 0, 1, 4]] if kind == "forward_kl" else out


def mixture_statistics(
    student: torch.Tensor,
    teacher: torch.Tensor,
    beta: float,
    mask: torch.Tensor | None,
    stats: torch.Tensor,
    shard: VocabShard,
    scale: float,
) -> torch.Tensor:
    """See chunked.mixture_statistics."""
    out = student.new_zeros((student.size(0), 2), dtype=torch.float32)
    if shard.true_width == 0 or student.size(0) == 0:
        return out
    strides = (*student.stride(), *teacher.stride())
    _mixture_kernel[(student.size(0),)](
        student,
        teacher,
        as_bytes(mask),
        stats.contiguous(),
        out,
        *strides,
        *widths(shard.true_width, student, teacher),
        scale,
        beta,
        block_size(shard.true_width, _BLOCK),
        num_warps=8,
    )
    return out


def write_gradient(
    out: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: str,
    beta: float,
    mask: torch.Tensor | None,
    stats: torch.Tensor,
    divergence: torch.Tensor,
    gradient: torch.Tensor,
    shard: VocabShard,
    scale: float,
) -> None:
    """See chunked.write_gradient."""
    n, columns = out.shape
    if n == 0:
        return
    block = block_size(columns, _BLOCK)
    _gradient_kernel[(n, triton.cdiv(columns, block))](
        student,
        teacher,
        out,
        as_bytes(mask),
        stats.contiguous(),
        divergence.contiguous(),
        gradient.float().contiguous(),
        *student.stride(),
        *teacher.stride(),
        *out.stride(),
        *widths(shard.true_width, student, teacher),
        columns,
        scale,
        beta,
        _KINDS[kind],
        block,
    )


def example_launches(example: Example) -> None:
    """Launch every kernel; see compile_examples.py."""
    student, teacher, mask, shard = example.logits(), example.logits(), example.mask(), example.shard
    stats, per_row = example.per_row(4), example.per_row()
    for kind in _KINDS:
        statistics(student, teacher, kind, mask, shard, 1.0)
        write_gradient(student, student, teacher, kind, 0.5, mask, stats, per_row, per_row, shard, 1.0)
    mixture_statistics(student, teacher, 0.5, mask, stats, shard, 1.0)
