"""The definition: divergences of float64 logits."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_tropd.kernels.full_divergence import reference


def divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    kind: str,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    beta: float,
    temperature: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return the loss [n] fp32; hidden [n, h], weights [V/tp, h] of student and teacher, mask [n] or None."""
    student = hidden.double() @ weight.double().t()
    teacher = teacher_hidden.double() @ teacher_weight.double().t()
    return reference.divergence(student, teacher, kind, group, vocab_size, beta, temperature, mask)
