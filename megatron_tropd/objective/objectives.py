"""Objectives by name: student log-probs at {sampled token} + the teacher's top-k, and the teacher's scores -> loss.

The method in five formulas; x the sampled token, l = log pi, sg stop-gradient, S student, T teacher (arXiv 2606.01249):

    gate       rho = min(pi_T(x) / pi_S(x), 1),  M ~ Bernoulli(rho)                              (A, trust_region.py)
    trusted    K1 = -sg(w A) l_S(x),  A = l_T(x) - l_S(x),  w = min(pi_S / pi_rollout, C)        (_student_tokens)
    outlier    FKL = sum over v in TopK(pi_T) of pi_T(v) (l_T(v) - l_S(v))                       (B, forward_kl.py)
    prefix     G = -beta l_S(x)  on the tokens that the teacher wrote                            (C, Objective.loss)
    loss       mean over the loss tokens of the global batch of  M K1 + (1 - M) FKL,  or of G

Plain PyTorch over [..., 1 + k], differentiated by autograd on top of one kernel (kernels/logprobs); a new method is an
entry in methods.py and a few lines in this file, never a kernel. Formulas: arXiv 2606.01249, sections A (gate), B
(outliers), C (guidance). The loss is exactly zero on all other tokens, whatever values they hold.

A log-prob of -inf is no mistake: a teacher may rule a token out, or an API list but its most probable ones. Such a
token lies outside the trust region, and no part of the loss that would be infinite there is taken.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_tropd.config import GuidanceConfig, ObjectiveConfig
from megatron_tropd.errors import UserError
from megatron_tropd.methods import METHODS, Method
from megatron_tropd.objective.forward_kl import floored, topk_forward_kl
from megatron_tropd.objective.policy_gradient import clipped_policy_loss, importance_weights, response_advantages
from megatron_tropd.objective.result import Extremes, ObjectiveResult, TokenDetails, total, totals_where_known, weighed
from megatron_tropd.objective.selection import reward_floor, select_tokens, selection_weights
from megatron_tropd.objective.token_statistics import gradient_shares, logit_gradient, loss_gradient, token_histograms
from megatron_tropd.objective.tokens import StudentTokens
from megatron_tropd.objective.trust_region import TrustGate, trust_gate
from megatron_tropd.types import LOSS_GUIDANCE, LOSS_STUDENT, TeacherScores, TrainingBatch


def build_objective(
    config: ObjectiveConfig, guidance: GuidanceConfig, seed: int, samples_per_prompt: int = 1, steps: int = 0
) -> Objective:
    """Return the objective that the recipe names.

    Args:
        config: objective.* of the recipe.
        guidance: its guidance.*.
        seed: of the gate.
        samples_per_prompt: responses to a prompt, among which returns are normalised.
        steps: of the whole training; half of them are the exploration of `reopold` unless the recipe says how many.

    Raises:
        UserError: an unknown name, or keys that contradict it.
    """
    method = METHODS.get(config.name)
    if method is None:  # of a recipe made in Python; those that are read are checked there
        raise UserError(f"objective.name={config.name!r} is unknown; choose one of {', '.join(METHODS)}.")
    if not method.gated and (config.gate or config.outlier):
        key = "gate" if config.gate else "outlier"
        raise UserError(
            f"objective.name={config.name} has no trust region, so objective.{key}={getattr(config, key)} has no "
            f"meaning; remove the key or choose objective.name=tropd."
        )
    if method.outlier and config.outlier not in (None, method.outlier):
        raise UserError(
            f"objective.name={config.name} fixes objective.outlier={method.outlier}, but the recipe says "
            f"{config.outlier}; remove the key, or choose tropd or fkl_outlier by what you want on outliers."
        )
    if method.divergence == "jsd" and not 0 < config.beta < 1:
        raise UserError(
            f"objective.beta={config.beta} makes no mixture for objective.name=jsd; give a number between 0 and 1. Its "
            "limits are objective.name=fkl_full and rkl_full."
        )
    outlier = (method.outlier or config.outlier or "fkl") if method.gated else method.outlier
    gate = config.gate or "bernoulli"
    explored = exploration_steps(config, steps)
    return Objective(config, method, outlier, gate, guidance.beta, seed, samples_per_prompt, explored)


def exploration_steps(config: ObjectiveConfig, steps: int) -> int:
    """Return the number of steps before `reopold` refines: the recipe's, or half of the training's `steps`."""
    return steps // 2 if config.exploration_steps is None else config.exploration_steps


@dataclass(frozen=True)
class Objective:
    """A pure function of log-probs, scores and batch; holds only settings."""

    config: ObjectiveConfig
    method: Method
    outlier: str | None
    gate: str
    guidance_beta: float
    seed: int
    samples_per_prompt: int = 1
    exploration_steps: int = 0

    @property
    def uses_guidance(self) -> bool:
        """Whether responses may begin with a teacher's prefix."""
        return self.method.guided

    @property
    def needs_rollout(self) -> bool:
        """Whether the student writes responses; if not, it learns from given ones."""
        return not self.method.data

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss reads the teacher's scores."""
        return not self.method.data

    @property
    def divergence(self) -> str | None:
        """Which exact divergence the loss is, for which it needs hidden states; None: it reads single tokens."""
        return self.method.divergence

    @property
    def topk(self) -> int:
        """How many of the teacher's most probable tokens the loss reads."""
        reads = self.outlier in ("fkl", "fkl_advantage") or self.method.uncertain
        return (self.config.topk or self.method.topk) if reads else 0

    @property
    def extremes(self) -> Extremes:
        """The names of `maxima` and of `minima` that `loss` returns."""
        if not self.needs_teacher:
            return Extremes()
        return Extremes(maxima=("advantage_max", "logprob_mismatch_max"), minima=("advantage_min",))

    def ids(self, batch: TrainingBatch, scores: TeacherScores | None) -> torch.Tensor:
        """Return the ids [b, s, 1 + k] at which the student is read: the sampled token, then the teacher's top-k."""
        labels = batch.labels.unsqueeze(-1)
        return labels if scores is None or not self.topk else torch.cat([labels, scores.topk_ids.long()], dim=-1)

    def selects_by(self, step: int) -> str | None:
        """What decides on which of the student's tokens there is a loss: "entropy", "reward", or None: on all."""
        if self.method.selects != "phases":
            return self.method.selects
        explores = step < self.exploration_steps
        mask = self.config.exploration_mask if explores else self.config.refinement_mask
        return None if mask == "none" else mask

    def prepare(
        self,
        batch: TrainingBatch,
        scores: TeacherScores | None,
        step: int = 0,
        entropy: torch.Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> TeacherScores | None:
        """Return the scores with what needs the whole batch, before it is cut into micro-batches and shares.

        Collective over `group` where the method selects tokens.

        Args:
            batch: all rows of this data-parallel rank; the responses to a prompt are among them.
            scores: the teacher's, aligned with it; None on stages without the output layer.
            step: global step.
            entropy: [b, s] of the student, nats; where it `selects_by` entropy.
            group: the data-parallel ranks; None: there is but this process.
        """
        if scores is None:
            return None
        kept = batch.loss_kind == LOSS_STUDENT
        if self.method.returns:
            groups = batch.sample_ids // self.samples_per_prompt
            found = response_advantages(batch.old_logprobs, scores.logprobs, kept, groups, self.config.alpha)
            return dataclasses.replace(scores, advantages=found)
        by = self.selects_by(step)
        if by is None:
            return scores
        selected = select_tokens(by, scores.logprobs, batch.old_logprobs, entropy, kept, self.config, group)
        return dataclasses.replace(scores, weights=selection_weights(selected, kept, group))

    def loss(
        self,
        student_logprobs: torch.Tensor,
        scores: TeacherScores | None,
        batch: TrainingBatch,
        step: int,
        student_entropy: torch.Tensor | None = None,
        divergence: torch.Tensor | None = None,
    ) -> ObjectiveResult:
        """Return each token's loss, method.loss = student tokens: M K1 + (1 - M) outlier; prefix: -beta log pi_S.

        Args:
            student_logprobs: [b, s, 1 + k] fp32 trainer's log pi_S at `ids`, differentiable.
            scores: the teacher's, of the same micro-batch and temperature; None if not `needs_teacher`.
            batch: the micro-batch.
            step: global step, an argument of the gate's random numbers.
            student_entropy: [b, s], only reported.
            divergence: [b, s] of the whole distributions, differentiable; where `self.divergence` names one.
        """
        is_student, is_guidance = batch.loss_kind == LOSS_STUDENT, batch.loss_kind == LOSS_GUIDANCE
        if self.divergence:  # over distributions, whichever model wrote the token
            is_student, is_guidance = is_student | is_guidance, torch.zeros_like(is_guidance)
        beta = 1.0 if self.method.data else self.guidance_beta
        given = floored(torch.where(is_guidance, student_logprobs[..., 0], 0.0))
        factor = beta if batch.weights is None else beta * batch.weights
        result = ObjectiveResult(loss=-factor * given)
        if self.needs_teacher:
            assert scores is not None  # the teacher's, then
            student = self._student_tokens(student_logprobs, scores, batch, step, is_student, divergence)
            result = dataclasses.replace(student, loss=student.loss + result.loss)
        result.metrics["loss_guidance"] = total(-factor * given, is_guidance)
        result.metrics["guidance_fraction"] = total(is_guidance, is_student | is_guidance)
        if not self.divergence:  # whose gradient is that of one kind of token
            learned = is_guidance & (student_logprobs[..., 0] != -torch.inf)  # a floored one has no gradient
            result.gradients["guidance"] = logit_gradient((factor * learned).unsqueeze(-1), given.unsqueeze(-1))
            result.metrics |= gradient_shares(result.gradients)
        if student_entropy is not None:
            kept = is_student if self.needs_rollout else is_guidance
            result.metrics["student_entropy"] = total(torch.where(kept, student_entropy, 0.0), kept)
        return result

    def _student_tokens(
        self,
        logprobs: torch.Tensor,
        scores: TeacherScores,
        batch: TrainingBatch,
        step: int,
        kept: torch.Tensor,
        divergence: torch.Tensor | None,
    ) -> ObjectiveResult:
        """Parts A and B on the student's own tokens; `kept` [b, s] marks them."""
        tokens = self._read(logprobs, scores, batch, step, kept)
        trusted, outlying = tokens.trusted, tokens.outlying
        reward = tokens.advantage
        if self.method.floored:  # also where the teacher rules the token out
            reward = tokens.difference.clamp(min=reward_floor(self.config.mixture))
        trust_loss = weighed(trusted, self._trusted(tokens, reward, divergence))
        outlier_loss, forward_kl = self._outlier(tokens)
        outlier_loss = weighed(outlying, outlier_loss)
        if self.method.uncertain:  # an addition, also where the teacher rules the sampled token out
            trust_loss = trust_loss + self._where_uncertain(tokens)
        pull = weighed(trusted, tokens.importance * reward)  # K1's derivative in log pi_S(x), with the sign turned
        for weights in (scores.weights, batch.weights):
            if weights is not None:
                trust_loss, pull = weighed(weights, trust_loss), weighed(weights, pull)
                outlier_loss = weighed(weights, outlier_loss)
        metrics = {
            "loss_trust": total(trust_loss, trusted),
            "loss_outlier": total(outlier_loss, outlying),
            **tokens.metrics(),
            **totals_where_known("outlier_forward_kl", forward_kl, outlying),
        }
        return ObjectiveResult(
            loss=trust_loss + outlier_loss,
            metrics=metrics,
            maxima=tokens.maxima(),
            minima=tokens.minima(),
            counts=token_histograms(tokens.shown),
            gradients={
                "trusted": self._trusted_gradient(trust_loss, pull, tokens),
                "outlier": self._outlier_gradient(outlier_loss, tokens),
            },
            details=TokenDetails(tokens.student, tokens.teacher, tokens.gate),
        )

    def _read(
        self, logprobs: torch.Tensor, scores: TeacherScores, batch: TrainingBatch, step: int, kept: torch.Tensor
    ) -> StudentTokens:
        # Zeros off the loss tokens first: garbage times zero may be NaN, in the gradient even where the loss is masked.
        sampled = torch.where(kept, logprobs[..., 0], 0.0)  # [b, s, 1 + k] -> [b, s], as all below
        teacher = torch.where(kept, scores.logprobs, 0.0)
        correction = (self.config.importance, self.config.importance_cap)
        return StudentTokens(
            logprobs=logprobs,
            scores=scores,
            batch=batch,
            kept=kept,
            # From here on no infinity: what it would be multiplied by may be zero.
            sampled=torch.where(sampled == -torch.inf, 0.0, sampled),
            student=sampled.detach(),
            teacher=teacher,
            importance=importance_weights(sampled, batch.old_logprobs, kept, *correction),
            gate=self._gate(sampled, teacher, batch, step),
        )

    def _gate(self, sampled: torch.Tensor, teacher: torch.Tensor, batch: TrainingBatch, step: int) -> TrustGate:
        gate = trust_gate(
            sampled,
            teacher,
            self.gate,
            self.config.gate_threshold,
            seed=self.seed,
            step=step,
            sample_ids=batch.token_sample_ids,
            positions=batch.position_ids + 1,  # of the label
        )
        if self.method.gated:
            return gate
        if self.method.everywhere:
            return TrustGate(gate.rho, torch.zeros_like(gate.weight))
        # Without a trust region all is in it, but for a token whose advantage would be infinite.
        all_of_it = torch.ones_like(gate.weight)
        is_bounded = self.divergence or self.method.returns or self.method.floored
        return TrustGate(gate.rho, all_of_it if is_bounded else torch.where(teacher == -torch.inf, 0.0, all_of_it))

    def _trusted(self, tokens: StudentTokens, reward: torch.Tensor, divergence: torch.Tensor | None) -> torch.Tensor:
        """The loss [b, s] of every token as if it were trusted."""
        if divergence is not None:  # of distributions: nothing to weigh by how x was drawn
            return torch.where(tokens.kept, divergence, 0.0)
        if self.method.clipped:
            own = tokens.scores.advantages if self.method.returns else reward
            assert own is not None  # `prepare` sets the advantages
            known = tokens.kept & (tokens.student != -torch.inf)
            return clipped_policy_loss(tokens.sampled, tokens.batch.old_logprobs, own, known, self.config.ppo_clip)
        return -tokens.importance * reward * tokens.sampled  # K1, -sg(A) log pi_S(x)

    def _where_uncertain(self, tokens: StudentTokens) -> torch.Tensor:
        """EOPD's addition: lambda 1[H(pi_T) > tau] times the top-k forward KL."""
        entropy = tokens.scores.entropy
        if entropy is None:
            raise ValueError(f"objective.name={self.config.name} needs the teacher's entropies (with_entropy)")
        uncertain = tokens.kept & (entropy > self.config.entropy_above)
        return self.config.entropy_weight * weighed(uncertain.float(), self._forward_kl(tokens))

    def _trusted_gradient(self, loss: torch.Tensor, pull: torch.Tensor, tokens: StudentTokens) -> torch.Tensor:
        """The `logit_gradient` of the trusted tokens' loss."""
        if not self.method.clipped:
            return logit_gradient(pull[..., None], tokens.sampled[..., None])
        repeated = tokens.scores.topk_ids.long() == tokens.batch.labels.unsqueeze(-1) if self.topk else None
        return loss_gradient(loss, tokens.logprobs, tokens.kept, slice(None), repeated)

    def _outlier_gradient(self, loss: torch.Tensor, tokens: StudentTokens) -> torch.Tensor:
        listed = slice(1, None) if self.outlier == "fkl" else slice(0, 1)
        return loss_gradient(loss, tokens.logprobs, tokens.kept, listed)

    def _forward_kl(self, tokens: StudentTokens) -> torch.Tensor:
        kept = tokens.kept.unsqueeze(-1)
        student_topk = torch.where(kept, tokens.logprobs[..., 1:], -1.0)  # [b, s, k]
        teacher_topk = torch.where(kept, tokens.scores.topk_logprobs, -1.0)
        return topk_forward_kl(student_topk, teacher_topk, self.config.tail)  # [b, s]

    def _outlier(self, tokens: StudentTokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Part B: loss [b, s] of every token as if it were an outlier, and the forward KL where it was computed."""
        if self.outlier is None or self.outlier == "mask":
            return torch.zeros_like(tokens.sampled), None
        if self.outlier == "clip":
            return -tokens.importance * tokens.difference.clamp(min=self.config.clip) * tokens.sampled, None
        forward_kl = self._forward_kl(tokens)
        if self.outlier == "fkl":
            return forward_kl, forward_kl.detach()
        return tokens.importance * forward_kl.detach() * tokens.sampled, forward_kl.detach()  # A = -sg(KL)
