"""Policy gradients: importance weights, PPO's clipped ratio, returns of whole responses as in TOP-D (arXiv 2607.04751).

    loss       -min(r A, clip(r, 1 - eps, 1 + eps) A),  r = pi_S / pi_rollout
    reward     r_t = log(alpha pi_T(x_t) / pi_rollout(x_t) + 1 - alpha)      bounded below by log(1 - alpha)
    return     R_t = r_t + mean of r_u over the later tokens u > t of the same response (0 after the last)
    advantage  A_t = (R_t - mean) / standard deviation, over all tokens of the prompt's responses

Advantages are computed once per step from log-probs that are known before the update, so they are the same under every
parallel layout and micro-batch size.
"""

from __future__ import annotations

import torch

_MOST_LOG_RATIO = 20.0  # beyond it, a ratio would overflow where the advantage is negative; it gets no gradient
_LEAST_DEVIATION = 1e-6  # below it, all returns of a prompt are the same, and none is better


@torch.no_grad()
def importance_weights(
    student_logprobs: torch.Tensor, old_logprobs: torch.Tensor, kept: torch.Tensor, kind: str, cap: float
) -> torch.Tensor:
    """Return w [b, s]: the ratio r = pi_S / pi_rollout, bounded; the weight of the policy-gradient terms.

    Args:
        student_logprobs: [b, s]; the ratio is 0 where they are -inf.
        old_logprobs: [b, s] log pi of the rollout.
        kept: [b, s] bool; the ratio of other tokens is 1.
        kind: "tis": min(r, cap); "icepop": r within [1 / cap, cap], else 0; "off": 1.
        cap: C, above 0.
    """
    if kind == "off":
        return torch.ones_like(student_logprobs)
    difference = torch.where(student_logprobs == -torch.inf, -torch.inf, student_logprobs - old_logprobs)
    ratio = torch.where(kept, difference, 0.0).exp()
    if kind == "tis":
        return ratio.clamp(max=cap)
    return torch.where((ratio <= cap) & (ratio >= 1.0 / cap), ratio, 0.0)


def clipped_policy_loss(
    student_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    known: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    """Return PPO's loss [b, s], differentiable in the student.

    Args:
        student_logprobs: [b, s] log pi_S, finite.
        old_logprobs: [b, s] log pi of the rollout; -inf counts as a ratio of 1 without a gradient.
        advantages: [b, s], finite, no gradient.
        known: [b, s] bool, tokens whose student's log-prob is one; elsewhere the loss is zero.
        epsilon: largest deviation of the ratio from 1 that still gains.
    """
    advantages = torch.where(known, advantages, 0.0)
    comparable = known & (old_logprobs != -torch.inf)
    log_ratio = torch.where(comparable, student_logprobs - torch.where(comparable, old_logprobs, 0.0), 0.0)
    ratio = log_ratio.clamp(max=_MOST_LOG_RATIO).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - epsilon, 1.0 + epsilon) * advantages)


@torch.no_grad()
def response_advantages(
    old_logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    kept: torch.Tensor,
    groups: torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    """Return A [b, s] fp32, zero on tokens that are not `kept`.

    Args:
        old_logprobs: [b, s] log pi of the rollout.
        teacher_logprobs: [b, s] log pi_T of the same tokens; -inf where it rules them out.
        kept: [b, s] bool, the student's own tokens; a row is a response.
        groups: [b] int64, the prompt of each row.
        alpha: in (0, 1), weight of the teacher's ratio.
    """
    rewards = _rewards(old_logprobs, teacher_logprobs, kept, alpha)
    later = kept.flip(-1).cumsum(-1).flip(-1) - kept.long()
    sums = rewards.flip(-1).cumsum(-1).flip(-1) - rewards
    returns = torch.where(kept, rewards + sums / later.clamp(min=1), 0.0)

    _, place = groups.unique(return_inverse=True)
    count, total = (_by_group(x.sum(-1), place) for x in (kept.double(), returns))
    mean = (total / count.clamp(min=1)).unsqueeze(-1)
    centred = torch.where(kept, returns - mean, 0.0)
    deviation = (_by_group(centred.square().sum(-1), place) / count.clamp(min=1)).sqrt().unsqueeze(-1)
    return torch.where(deviation > _LEAST_DEVIATION, centred / deviation, 0.0).float()


def _rewards(old: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor, alpha: float) -> torch.Tensor:
    """r [b, s] fp64; log(1 - alpha) where the teacher rules the token out, and 0 off the `kept` tokens."""
    known = kept & (teacher != -torch.inf) & (old != -torch.inf)
    ratio = torch.where(known, teacher.double() - old.double(), -torch.inf)
    rest = torch.log1p(torch.tensor(-alpha, dtype=torch.float64, device=old.device))
    rewards = torch.logaddexp(ratio + torch.log(torch.tensor(alpha, dtype=torch.float64, device=old.device)), rest)
    return torch.where(kept, rewards, 0.0)


def _by_group(values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Return for each row the sum of `values` [b] over the rows of its group."""
    return torch.zeros_like(values).index_add(0, place, values)[place]
