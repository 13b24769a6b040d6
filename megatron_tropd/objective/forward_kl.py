"""Part B's forward KL over the teacher's top-k, finite where a log-prob is -inf. Pure functions."""

from __future__ import annotations

import torch

from megatron_tropd.tokenizers.end_of_text import ABSENT


def topk_forward_kl(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, tail: str) -> torch.Tensor:
    """Return the forward KL over the teacher's top-k, [..., k] x [..., k] -> [...], differentiable in the student.

    truncated: sum_k p (log p - log q), as the paper prints it; may be negative, and keeps its gradient where it is.
    renormalized: both distributions normalised within the k first (the authors' script).
    tail: one more bucket for all the rest; the exact KL of two (k + 1)-way distributions, never negative.

    Tokens to which the teacher gives nothing (fewer than k have any probability) count for nothing, and one to which
    the student rules out counts as e^-10000, without a gradient.

    Raises:
        ValueError: `tail` is none of the three.
    """
    student_logprobs = floored(student_logprobs)
    supported = teacher_logprobs != -torch.inf
    if tail == "renormalized":
        student_logprobs = student_logprobs.log_softmax(-1)
        # Where the teacher gives nothing to any of them there is nothing to normalise.
        listed = torch.where(supported.any(-1, keepdim=True), teacher_logprobs, 0.0).log_softmax(-1)
        teacher_logprobs = torch.where(supported, listed, -torch.inf)
    kl = kl_terms(teacher_logprobs, student_logprobs).sum(-1)
    if tail in ("truncated", "renormalized"):
        return kl
    if tail != "tail":
        raise ValueError(f"tail {tail!r} is none of truncated, renormalized, tail")
    student_rest, teacher_rest = _log_rest(student_logprobs), _log_rest(teacher_logprobs)
    return kl + teacher_rest.exp() * (teacher_rest - student_rest)


def kl_terms(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return p (log p - log q) of log-probs; 0, in the gradients too, where p has no probability."""
    possible = p != -torch.inf
    difference = torch.where(possible, p, 0.0) - torch.where(possible, q, 0.0)
    return torch.where(possible, p, -torch.inf).exp() * difference


def _log_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """log(1 - sum exp(logprobs)), exact when the sum is nearly one; rounding beyond one counts as fp32's epsilon."""
    covered = logprobs.logsumexp(-1).clamp(max=-torch.finfo(torch.float32).eps)
    return torch.log(-torch.expm1(covered))


def floored(logprobs: torch.Tensor) -> torch.Tensor:
    """Return log-probs with very low ones in place of -inf, whose gradient is zero."""
    return torch.where(logprobs == -torch.inf, ABSENT, logprobs)
