"""fused_linear_full_divergence: full_divergence without ever holding more than a chunk of either model's logits."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_tropd.kernels.full_divergence.op import check
from megatron_tropd.kernels.fused_linear_full_divergence import reference
from megatron_tropd.kernels.fused_linear_full_divergence.function import FusedLinearFullDivergence
from megatron_tropd.kernels.implementations import choose
from megatron_tropd.kernels.linear import check_linear
from megatron_tropd.kernels.sharding import VocabShard


def fused_linear_full_divergence(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    kind: str,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Return the divergence of softmax(hidden weight^T / temperature) of two models; the teacher gets no gradient.

    One packed all-gather forward, two for jsd; none backward. With tp > 1 the gradient of `student_hidden` is this
    shard's part; see `fused_linear_logprobs` for Megatron's mapping that sums the parts.

    Args:
        student_hidden: [..., h] fp32, bf16 or fp16, the whole h on every rank.
        student_weight: [V/tp, h], of the same dtype; its gradient is summed in fp32, into `main_grad` where it has one.
        teacher_hidden: [..., h'], any dtype; its hidden size may differ.
        teacher_weight: [V/tp, h'], cut like the student's: `recut_shards(weight, V/tp, group, dim=0)` does it once for
            a vocabulary that was padded differently.
        kind, group, vocab_size, beta, temperature: as in `full_divergence`.
        mask: [...] bool; rows where it is False give zeros and no gradient (their logits are made all the same).
        implementation: of the passes over a chunk: auto, triton, chunked; or reference (float64, all at once).

    Returns:
        loss [...] fp32, the same on every rank.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown kind or implementation, beta out of range.
    """
    check(kind, beta)
    check_linear(student_hidden, student_weight, "the student's")
    check_linear(teacher_hidden, teacher_weight, "the teacher's")
    shapes = [student_hidden.shape[:-1], teacher_hidden.shape[:-1], *([] if mask is None else [mask.shape])]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"leading dimensions of student, teacher and mask differ: {[tuple(s) for s in shapes]}")
    shard, _ = (VocabShard.of(weight.size(0), group, vocab_size) for weight in (student_weight, teacher_weight))
    if shard.size > 1 and teacher_weight.size(0) != student_weight.size(0):
        raise ValueError(
            f"the teacher's output layer has {teacher_weight.size(0)} rows per rank and the student's "
            f"{student_weight.size(0)}: their vocabularies are padded differently. Reshard the teacher's once, with "
            "recut_shards(teacher_weight, student_weight.size(0), group, dim=0)"
        )
    student, teacher = (t.reshape(-1, t.size(-1)) for t in (student_hidden, teacher_hidden.detach()))
    flat_mask = None if mask is None else mask.reshape(-1)
    weights = (student_weight, teacher_weight.detach())
    if implementation == "reference":
        options = (kind, group, vocab_size, beta, temperature, flat_mask)
        loss = reference.divergence(student, weights[0], teacher, weights[1], *options)
    else:
        passes = choose("fused_linear_full_divergence", "full_divergence", implementation, student.device)
        loss = FusedLinearFullDivergence.apply(
            student, weights[0], teacher, weights[1], flat_mask, kind, beta, shard, 1.0 / temperature, passes
        )
    return loss.view(student_hidden.shape[:-1])
