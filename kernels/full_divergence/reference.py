"""The definitions: divergences of float64 softmaxes over the gathered true vocabulary, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_tropd.kernels.logprobs.reference import all_logprobs


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: str,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    beta: float,
    temperature: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return the loss [n] fp32; student and teacher logits [n, V/tp], mask [n] or None."""
    student_logprobs = all_logprobs(student, group, vocab_size, temperature)
    teacher_logprobs = all_logprobs(teacher, group, vocab_size, temperature).detach()
    loss = DEFINITIONS[kind](student_logprobs, teacher_logprobs, beta)
    if mask is not None:
        loss = torch.where(mask, loss, 0.0)
    return loss.float()


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of log-probs [n, v]; outcomes without probability in p contribute nothing, nor to the gradient."""
    possible = p != -torch.inf
    difference = torch.where(possible, p, 0.0) - torch.where(possible, q, 0.0)
    return (torch.where(possible, p, -torch.inf).exp() * difference).sum(-1)


def _jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    weights = student.new_tensor([beta, 1 - beta]).log()
    possible = (student != -torch.inf) | (teacher != -torch.inf)  # elsewhere logaddexp's gradient is NaN
    mixture = torch.logaddexp(teacher + weights[0], torch.where(possible, student, 0.0) + weights[1])
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


DEFINITIONS = {
    "reverse_kl": lambda student, teacher, beta: _kl(student, teacher),
    "forward_kl": lambda student, teacher, beta: _kl(teacher, student),
    "jsd": _jsd,
}
