"""full_divergence: exact reverse KL, forward KL and generalized JSD between a student's and a teacher's logits."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_tropd.kernels.full_divergence import reference
from megatron_tropd.kernels.full_divergence.function import FullDivergence
from megatron_tropd.kernels.implementations import choose
from megatron_tropd.kernels.sharding import VocabShard, as_rows, check_leading, recut_shards

KINDS = ("reverse_kl", "forward_kl", "jsd")


def full_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    kind: str,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    inplace_backward: bool = False,
    implementation: str = "auto",
) -> torch.Tensor:
    """Return the divergence of whole softmax distributions, at `temperature`, in nats; the teacher gets no gradient.

    reverse_kl = KL(p_S || p_T); forward_kl = KL(p_T || p_S); jsd = beta KL(p_T || m) + (1 - beta) KL(p_S || m) with
    m = beta p_T + (1 - beta) p_S (GKD, arXiv 2306.13649). One packed all-gather forward, two for jsd; none backward.

    Args:
        student_logits: [..., V/tp] fp32, bf16 or fp16, this rank's shard.
        teacher_logits: [..., V'/tp], any of the dtypes. A vocabulary padded differently (V' != V) with tp > 1 is cut
            again, at the cost of one more exchange and a copy of the shard; see `recut_shards` to do it to the weights.
        kind: reverse_kl, forward_kl or jsd.
        group: the ranks that share the vocabulary; None for a single one.
        vocab_size: true vocabulary size of both; columns beyond it are padding and carry no probability.
        beta: the teacher's weight in jsd's mixture, between 0 and 1.
        temperature: divides both logits; the loss is not rescaled by its square.
        mask: [...] bool; rows where it is False are skipped: zeros, and no gradient.
        inplace_backward: let the gradient overwrite `student_logits`; only if nothing else reads them afterwards.
        implementation: auto (triton on CUDA, chunked elsewhere), triton, chunked or reference (float64).

    Returns:
        loss [...] fp32, the same on every rank, exactly zero where both logits are equal.

    Raises:
        ValueError: shapes that do not fit, an unknown kind or implementation, beta out of range.
    """
    check(kind, beta)
    check_leading(mask, student_logits=student_logits, teacher_logits=teacher_logits)
    student, teacher = as_rows(student_logits), as_rows(teacher_logits.detach())
    shard = VocabShard.of(student.size(1), group, vocab_size)
    VocabShard.of(teacher.size(1), group, vocab_size)
    if group is not None and shard.size > 1 and teacher.size(1) != student.size(1):
        teacher = recut_shards(teacher, student.size(1), group, dim=1)
    flat_mask = None if mask is None else mask.reshape(-1)
    passes = choose("full_divergence", "full_divergence", implementation, student.device)
    if passes is reference:
        loss = reference.divergence(student, teacher, kind, group, vocab_size, beta, temperature, flat_mask)
    else:
        loss = FullDivergence.apply(
            student, teacher, flat_mask, kind, beta, shard, 1.0 / temperature, inplace_backward, passes
        )
    return loss.view(student_logits.shape[:-1])


def check(kind: str, beta: float) -> None:
    """Raise ValueError for an unknown kind, or a beta for which jsd is no mixture."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta={beta} must lie between 0 and 1 for jsd; its limits are forward_kl and reverse_kl")
