"""Part A of the method: which student tokens lie in the trust region. Pure functions, no state, no gradient.

rho_t = min(pi_T(x_t) / pi_S(x_t), 1) is speculative decoding's acceptance probability. The Bernoulli gate's random
numbers depend on (seed, step, sample id, position) alone: the same under every layout and after a resume.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_tropd.counter_rng import STREAM_GATE, counter_uniform

GATES = ("bernoulli", "threshold", "soft")


@dataclass
class TrustGate:
    """The gate's view of every token, shapes as the log-probs given."""

    rho: torch.Tensor  # fp32 in [0, 1]
    weight: torch.Tensor  # M: fp32, 0 or 1 for bernoulli and threshold, rho for soft


@torch.no_grad()
def trust_gate(
    student_logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    gate: str,
    threshold: float,
    *,
    seed: int,
    step: int,
    sample_ids: torch.Tensor,
    positions: torch.Tensor,
) -> TrustGate:
    """Return rho and M of every token; one that the teacher rules out (rho is 0) is outside whatever the threshold.

    Args:
        student_logprobs: [b, s] trainer's log pi_S of the sampled tokens; any gradient is cut.
        teacher_logprobs: [b, s] log pi_T of the same tokens, at the same temperature.
        gate: bernoulli (M ~ Bernoulli(rho), the paper's), threshold (M = rho >= threshold) or soft (M = rho).
        threshold: tau of the threshold gate.
        seed: the run's seed.
        step: the training step.
        sample_ids: [b, s] (or [b, 1]) global sample ids.
        positions: [b, s] absolute positions of the sampled tokens.

    Raises:
        ValueError: the gate is none of GATES.
    """
    difference = (teacher_logprobs.float() - student_logprobs.float()).clamp(max=0.0)
    rho = torch.where(teacher_logprobs == -torch.inf, 0.0, difference.exp())  # where the student's is -inf, too
    if gate == "bernoulli":
        uniform = counter_uniform(seed, STREAM_GATE, step, sample_ids, positions)
        weight = (uniform < rho).to(rho.dtype)
    elif gate == "threshold":
        weight = ((rho >= threshold) & (rho > 0)).to(rho.dtype)
    elif gate == "soft":
        weight = rho
    else:
        raise ValueError(f"gate {gate!r} is none of {', '.join(GATES)}")
    return TrustGate(rho, weight)
