"""A micro-batch's tokens as the formulas of objective/objectives.py read them, and the statistics of all methods.

No infinity is left where one would multiply: a log-prob of -inf is 0 in `sampled`; `comparable` marks the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_tropd.objective.result import Total, largest, total, totals_where_known
from megatron_tropd.objective.trust_region import TrustGate
from megatron_tropd.types import TeacherScores, TrainingBatch


@dataclass(frozen=True, kw_only=True)
class StudentTokens:
    """The student's own tokens; [b, s] unless said otherwise."""

    logprobs: torch.Tensor  # [b, s, 1 + k] of the student, differentiable, whatever they are off the kept tokens
    scores: TeacherScores
    batch: TrainingBatch
    kept: torch.Tensor  # bool, the student's own
    sampled: torch.Tensor  # the student's log-probs, differentiable, 0 where they are -inf or not kept
    student: torch.Tensor  # the same without gradient, -inf where they are
    teacher: torch.Tensor  # the teacher's, 0 where not kept
    importance: torch.Tensor  # w, no gradient
    gate: TrustGate

    @cached_property
    def trusted(self) -> torch.Tensor:
        """M on the student's tokens, fp32."""
        return self.gate.weight * self.kept

    @cached_property
    def outlying(self) -> torch.Tensor:
        """1 - M on the student's tokens, fp32."""
        return (1.0 - self.gate.weight) * self.kept

    @cached_property
    def ruled_out(self) -> torch.Tensor:
        """Tokens to which a model gives no probability, bool."""
        return self.kept & ((self.student == -torch.inf) | (self.teacher == -torch.inf))

    @cached_property
    def comparable(self) -> torch.Tensor:
        """The others, bool."""
        return self.kept & ~self.ruled_out

    @cached_property
    def difference(self) -> torch.Tensor:
        """log pi_T - log pi_S without gradient; -inf where the teacher rules the token out."""
        return torch.where(self.teacher == -torch.inf, -torch.inf, self.teacher - self.sampled).detach()

    @cached_property
    def advantage(self) -> torch.Tensor:
        """A: `difference`, and 0 on tokens that are not comparable."""
        return torch.where(self.ruled_out, 0.0, self.difference)

    @cached_property
    def mismatch(self) -> torch.Tensor:
        """|log pi_S - log pi_rollout|; infinite or NaN where either is."""
        return torch.where(self.kept, self.student - self.batch.old_logprobs, 0.0).abs()

    @property
    def matched(self) -> torch.Tensor:
        """Tokens whose mismatch is a number, bool."""
        return self.kept & (self.mismatch < torch.inf)

    @property
    def shown(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Values and the tokens that count, for `token_histograms`."""
        return {
            "rho": (self.gate.rho, self.kept),
            "advantage": (self.advantage, self.comparable),
            "mismatch": (self.mismatch, self.matched),
        }

    def metrics(self) -> dict[str, Total]:
        """Return totals for means over the global batch's tokens, by the names of metrics.jsonl."""
        kept, gate, scores = self.kept, self.gate, self.scores
        found = {
            "trust_fraction": total(self.trusted, kept),
            "outlier_fraction": total(self.outlying, kept),
            "mean_rho": total(torch.where(kept, gate.rho, 0.0), kept),
            "advantage": total(self.advantage, self.comparable),
            "reverse_kl": total(-self.advantage, self.comparable),
            "ruled_out_fraction": total(self.ruled_out, kept),
            "logprob_mismatch": total(torch.where(self.matched, self.mismatch, 0.0), self.matched),
            "importance_weight": total(torch.where(kept, self.importance, 0.0), kept),
            **totals_where_known("teacher_entropy", scores.entropy, kept),
        }
        if scores.weights is not None:
            found["selected_fraction"] = total(kept & (scores.weights > 0), kept)
        return found

    def maxima(self) -> dict[str, torch.Tensor]:
        """Return the largest values, scalars; -inf where there is no token."""
        return {
            "advantage_max": largest(self.advantage, self.comparable),
            "logprob_mismatch_max": largest(self.mismatch, self.matched),
        }

    def minima(self) -> dict[str, torch.Tensor]:
        """Return the smallest values, scalars; inf where there is no token."""
        return {"advantage_min": -largest(-self.advantage, self.comparable)}
