"""Exact divergence of student and teacher over the whole vocabulary, from both models' hidden states.

On the student's last pipeline stage. The teacher's hidden states come with its scores, its output layer comes once, cut
into the student's vocabulary shards; of either model's logits no more than a chunk is ever there.

    divergence = Divergence("reverse_kl", teacher.output_weight(width), groups.tp, tokenizer.vocab_size)
    with student.hook.replaced(lambda hidden, weight: divergence(hidden, weight, scores.hidden, mask)):
        output = model(...)                                             # [b, s]
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_tropd.kernels import fused_linear_full_divergence, fused_linear_logprobs
from megatron_tropd.objective.forward_kl import kl_terms
from megatron_tropd.tokenizers.end_of_text import EndOfText


@dataclass
class Divergence:
    """A divergence with everything that is the same for all tokens."""

    kind: str  # reverse_kl, forward_kl or jsd, as in kernels.full_divergence
    teacher_weight: torch.Tensor | None  # [V/tp, h_teacher]; None but on the student's last stage
    group: dist.ProcessGroup  # the student's tensor-parallel ranks
    vocab_size: int  # true vocabulary size
    beta: float = 0.5
    temperature: float = 1.0
    implementation: str = "auto"
    end: EndOfText = field(default_factory=EndOfText)  # end-of-text ids that are one event

    def __call__(
        self, hidden: torch.Tensor, weight: torch.Tensor, teacher_hidden: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return the divergence [s, b] fp32 in nats, zero where `mask` is False; differentiable in the student.

        Args:
            hidden: [s, b, h] the student's, whole on every tensor-parallel rank.
            weight: [V/tp, h] the student's output layer.
            teacher_hidden: [b, s, h_teacher].
            mask: [b, s] bool.
        """
        assert self.teacher_weight is not None  # this is the student's last stage
        theirs = (teacher_hidden.transpose(0, 1), self.teacher_weight)
        found = fused_linear_full_divergence(
            hidden,
            weight,
            *theirs,
            self.kind,
            self.group,
            self.vocab_size,
            beta=self.beta,
            temperature=self.temperature,
            mask=mask.t(),
            implementation=self.implementation,
        )
        if not self.end:
            return found
        ids = self.end.extend(torch.empty((*hidden.shape[:2], 0), dtype=torch.int64, device=hidden.device))
        student = self._logprobs(hidden, weight, ids, mask)
        with torch.no_grad():
            teacher = self._logprobs(*theirs, ids, mask)
        events = [self.end.event(logprobs).squeeze(-1) for logprobs in (student, teacher)]
        merged = self._terms(*events) - self._terms(student, teacher).sum(-1)
        return found + torch.where(mask.t(), merged, 0.0)

    def _logprobs(
        self, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return a model's log-probs [s, b, j] at ids [s, b, j]."""
        logprobs, _ = fused_linear_logprobs(
            hidden,
            weight,
            ids,
            self.group,
            self.vocab_size,
            temperature=self.temperature,
            mask=mask.t(),
            implementation=self.implementation,
        )
        return logprobs

    def _terms(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return what outcomes of these log-probs contribute to the divergence."""
        if self.kind == "forward_kl":
            return kl_terms(teacher, student)
        if self.kind == "reverse_kl":
            return kl_terms(student, teacher)
        weights = student.new_tensor([self.beta, 1 - self.beta])
        possible = (student != -torch.inf) | (teacher != -torch.inf)  # elsewhere logaddexp's gradient is NaN
        mixture = torch.logaddexp(teacher + weights[0].log(), torch.where(possible, student, 0.0) + weights[1].log())
        return weights[0] * kl_terms(teacher, mixture) + weights[1] * kl_terms(student, mixture)
