"""Statistics and gradient of the full divergences in bounded row chunks of plain torch; CPU, and fallback elsewhere."""

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

_TEMPORARIES = 3  # [rows, V/tp] tensors alive at once in a chunk, so that together they stay within its bound


def statistics(
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: str,
    mask: torch.Tensor | None,
    shard: VocabShard,
    scale: float,
) -> torch.Tensor:
    """Return this shard's part of every row [n, 5] fp32; a and b are the student's and teacher's z less their maxima.

    Columns: max and sum of e^a of the student, max and sum of e^b of the teacher, and the cross term: sum of
    e^b (b - a) for forward_kl, of e^a (a - b) for reverse_kl, 0 for jsd (which takes a second look).

    Args:
        student: [n, V/tp] logits.
        teacher: [n, V/tp] logits, cut alike.
        kind: forward_kl, reverse_kl or jsd.
        mask: [n] bool rows to compute, or None for all; the others give an arbitrary finite part.
        shard: this rank's columns.
        scale: 1 / temperature.
    """
    out = student.new_zeros((student.size(0), 5), dtype=torch.float32)
    if shard.true_width == 0:
        out[:, 0] = out[:, 2] = -torch.inf
        return out
    read_student, read_teacher = ChunkReader(student, shard, scale), ChunkReader(teacher, shard, scale)
    for chunk in row_chunks(student.size(0), _TEMPORARIES * shard.true_width, mask):
        a, b = read_student(chunk), read_teacher(chunk)
        top_a, top_b = _subtract_top(a), _subtract_top(b)
        weighted, other = (b, a) if kind == "forward_kl" else (a, b)
        other_total = None
        if kind == "jsd":
            cross, total = torch.zeros_like(top_a), exp_(weighted).sum(1)
        else:
            e = exp_(weighted.clone())
            total = e.sum(1)
            difference = weighted.sub_(other)
            cross = torch.linalg.vecdot(e, difference)
        other_total = exp_(other).sum(1)
        totals = (other_total, total) if kind == "forward_kl" else (total, other_total)
        out[chunk] = torch.stack([top_a, totals[0], top_b, totals[1], cross], 1)
    return out


def _subtract_top(z: torch.Tensor) -> torch.Tensor:
    """Subtract each row's maximum in place and return it [n]; -inf becomes -1e30, so that no difference is NaN."""
    top = z.amax(1)
    z.sub_(torch.where(top == -torch.inf, 0.0, top).unsqueeze(1)).clamp_(min=-1e30)
    return top


def mixture_statistics(
    student: torch.Tensor,
    teacher: torch.Tensor,
    beta: float,
    mask: torch.Tensor | None,
    stats: torch.Tensor,
    shard: VocabShard,
    scale: float,
) -> torch.Tensor:
    """Return jsd's second look [n, 2] fp32: this shard's part of KL(student || m) and of KL(teacher || m).

    Args:
        student, teacher, mask, shard, scale: as in `statistics`.
        beta: the teacher's weight in the mixture m.
        stats: [n, 4] student's maximum and log-sum-exp less it, teacher's likewise, over all shards.
    """
    out = student.new_zeros((student.size(0), 2), dtype=torch.float32)
    read_student, read_teacher = ChunkReader(student, shard, scale), ChunkReader(teacher, shard, scale)
    for chunk in row_chunks(student.size(0), 2 * _TEMPORARIES * max(shard.true_width, 1), mask):
        a, b = _logprobs(read_student(chunk), read_teacher(chunk), stats[chunk])
        over_student, over_teacher = _over_mixture(a, b, beta)
        out[chunk] = torch.stack(
            [torch.linalg.vecdot(exp_(a), over_student), torch.linalg.vecdot(exp_(b), over_teacher)], 1
        )
    return out


def _logprobs(a: torch.Tensor, b: torch.Tensor, stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a chunk's student and teacher z into log-probs in place, -inf as -1e30; stats [c, 4]."""
    part = stats.unsqueeze(2)
    a.sub_(part[:, 0]).sub_(part[:, 1]).clamp_(min=-1e30)
    b.sub_(part[:, 2]).sub_(part[:, 3]).clamp_(min=-1e30)
    return a, b


def _over_mixture(a: torch.Tensor, b: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a - m and b - m for m = log(beta e^b + (1 - beta) e^a): exactly 0 where a = b, and never overflowing.

    With d = a - b: a - m = -log1p(beta (e^-d - 1)), used where d > 0; b - m = -log1p((1 - beta)(e^d - 1)) elsewhere.
    """
    d = a - b
    weight = torch.where(d > 0, beta, 1 - beta)
    larger = d.abs().neg_().expm1_().mul_(weight).log1p_().neg_()
    return larger + d.clamp(max=0.0), larger.sub_(d.clamp_(min=0.0))


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
    """Write the gradient of the student's logits into `out` [n, V/tp], which may be `student` itself.

    forward_kl: p_S - p_T; reverse_kl: p_S ((l_S - l_T) - KL); jsd: (1 - beta) p_S ((l_S - l_m) - KL(p_S || m)); each
    times gradient * scale.

    Args:
        out: where to; every element is written, zeros on padding and on rows that the mask leaves out.
        student, teacher, kind, beta, mask, shard, scale: as in the forward pass.
        stats: [n, 4] student's maximum and log-sum-exp less it, teacher's likewise, over all shards.
        divergence: [n] KL(p_S || p_T) for reverse_kl, KL(p_S || m) for jsd, unused for forward_kl.
        gradient: [n] of the loss.
    """
    mask = rows_with_gradient(gradient, mask)
    zero_other_rows(out, mask, shard)
    read_student, read_teacher = ChunkReader(student, shard, scale), ChunkReader(teacher, shard, scale)
    for chunk in row_chunks(student.size(0), _TEMPORARIES * max(shard.true_width, 1), mask):
        g = gradient[chunk].float().mul(scale).unsqueeze(1)
        a, b = _logprobs(read_student(chunk), read_teacher(chunk), stats[chunk])
        if kind == "forward_kl":
            result = exp_(a).sub_(exp_(b)).mul_(g)
        elif kind == "reverse_kl":
            result = b.neg_().add_(a).sub_(divergence[chunk].unsqueeze(1)).mul_(exp_(a)).mul_(g)
        else:
            over_student, _ = _over_mixture(a, b, beta)
            result = over_student.sub_(divergence[chunk].unsqueeze(1)).mul_(exp_(a)).mul_(g * (1 - beta))
        write_rows(out, chunk, result)
