"""Handles steps whose numbers are not finite, or spike: one message for all ranks, a skip or a stop, and a count.

guard = NumberGuard(recipe.training, state.guard)           # the dictionary is kept in checkpoints
result = train_step(..., limits=guard.limits())             # makes no update beyond them
metrics = guard.observe(step, result, rollouts, models)     # collective where something was wrong
guard.enforce()                                             # stops the run if the recipe demands it
"""

from __future__ import annotations

import logging
import math
import statistics
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.config import TrainingConfig
from megatron_tropd.errors import UserError
from megatron_tropd.numbers.finite_weights import everywhere, named_parameters, not_finite
from megatron_tropd.numbers.flags import STAGES, Finding
from megatron_tropd.numbers.step_report import Limits, StepResult
from megatron_tropd.parallel.groups import any_rank
from megatron_tropd.types import Rollouts

logger = logging.getLogger(__name__)

_LEAST_HISTORY = 5  # steps before a median is meaningful
_SHOWN = 6  # tokens or tensors in a message

_WHAT = {
    "rollout": "the student's log-probs as it wrote its responses",
    "teacher scores": "the teacher's scores",
    "student log-probs": "the student's log-probs in training",
    "loss": "the loss, though both models' log-probs are finite",
    "gradient": "the student's gradient, though the loss is finite",
    "loss spike": "a loss far above the usual",
    "gradient spike": "a gradient far above the usual",
}
_REMEDY = {
    "rollout": "Look at the student's weights and student.dtype (float16 ends at 65504), and at training.lr.",
    "teacher scores": (
        "Look at the teacher's weights and teacher.dtype (float16 ends at 65504; most models need bfloat16 or float32)."
    ),
    "student log-probs": "Look at the student's weights and student.dtype (float16 ends at 65504), and at training.lr.",
    "loss": "Look at objective.importance_cap, objective.clip, guidance.beta and objective.temperature.",
    "gradient": "Look at student.dtype, training.lr and training.clip_grad, and at the tokens' own texts.",
    "loss spike": "Raise training.loss_spike_factor if such steps are harmless, lower training.lr if they are not.",
    "gradient spike": "Raise training.grad_norm_spike_factor if such steps are harmless, else lower training.lr.",
}


class NumberGuard:
    """Follows a run's numbers; every rank holds the same state.

    Args:
        config: `training.*`: on_nan, max_skipped_steps, spike factors and window.
        state: what a checkpoint kept, changed in place; empty in a new run.
    """

    def __init__(self, config: TrainingConfig, state: dict[str, Any]):
        self._config = config
        self._state = state
        for name in ("losses", "grad_norms", "skipped"):
            state.setdefault(name, [])
        state.setdefault("overflows", 0)
        self._error: str | None = None

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """The steps without an update so far, with their reasons; overflows of a loss scale are not among them."""
        return self._state["skipped"]

    @property
    def overflows(self) -> int:
        """Steps in which float16's loss scale was too high, and was lowered."""
        return self._state["overflows"]

    def limits(self) -> Limits:
        """Return what the next step may not exceed."""
        loss = self._limit(self._config.loss_spike_factor, "losses")
        return Limits(loss, self._limit(self._config.grad_norm_spike_factor, "grad_norms"))

    def _limit(self, factor: float | None, name: str) -> float:
        values = self._state[name]
        if factor is None or len(values) < min(_LEAST_HISTORY, self._config.spike_window):
            return math.inf
        return factor * statistics.median(values)

    def observe(
        self, step: int, result: StepResult, rollouts: Rollouts, models: dict[str, list[torch.nn.Module]]
    ) -> dict[str, float]:
        """Take note of a step; returns what to log of it. Collective over the student's ranks where it had a problem.

        Args:
            step: the step's number.
            result: what `train_step` returned.
            rollouts: this data-parallel rank's, for the prompts' ids.
            models: role -> chunks whose parameters are looked through if a number was not finite.
        """
        if result.problem is None:
            self._remember("losses", self._config.loss_spike_factor, result.loss)
            self._remember("grad_norms", self._config.grad_norm_spike_factor, result.grad_norm)
        elif result.problem == "overflow":
            self._state["overflows"] += 1
        elif result.problem == "no tokens":  # no mistake, and nothing to compare later steps with
            if dist.get_rank() == 0:
                logger.warning("step %d: no token has a loss (see rollout.on_*), so there was no update", step)
        else:
            self._take_problem(step, result, rollouts, models)
        return self._metrics(result)

    def _remember(self, name: str, factor: float | None, value: float) -> None:
        if factor is not None:
            self._state[name] = [*self._state[name], value][-self._config.spike_window :]

    def _metrics(self, result: StepResult) -> dict[str, float]:
        spikes = sum(entry["reason"].endswith("spike") for entry in self.skipped)
        metrics: dict[str, float] = {"nan_steps": len(self.skipped) - spikes}
        if self._config.loss_spike_factor is not None or self._config.grad_norm_spike_factor is not None:
            metrics["spike_steps"] = spikes
        if result.loss_scale is not None:
            metrics |= {"loss_scale": result.loss_scale, "overflow_steps": self.overflows}
        return metrics

    def _take_problem(self, step: int, result: StepResult, rollouts: Rollouts, models: dict[str, list]) -> None:
        message = self._describe(step, result, rollouts, models)
        self.skipped.append({"step": step, "reason": result.problem})
        is_spike = result.problem not in STAGES
        if self._config.on_nan == "stop" and not is_spike:
            self._error = (
                f"{message} The update was not made, and the run ends (training.on_nan=stop); the newest checkpoint is "
                "as it was. training.on_nan=skip leaves out such steps, up to training.max_skipped_steps."
            )
        elif len(self.skipped) > self._config.max_skipped_steps:
            steps = ", ".join(f"{entry['step']} ({entry['reason']})" for entry in self.skipped)
            self._error = (
                f"{message} {len(self.skipped)} steps were skipped, more than training.max_skipped_steps="
                f"{self._config.max_skipped_steps}: {steps}. The newest checkpoint is as it was."
            )
        elif dist.get_rank() == 0:
            logger.warning("%s The update was skipped (%d so far)", message, len(self.skipped))

    def enforce(self) -> None:
        """Raise UserError where the last step observed ends the run; the same on all ranks."""
        if self._error is not None:
            raise UserError(self._error)

    def _describe(self, step: int, result: StepResult, rollouts: Rollouts, models: dict[str, list]) -> str:
        problem = result.problem
        assert problem is not None  # only steps with one are described
        if problem == "loss spike":
            limit = self.limits().loss
            return f"step {step}: {_WHAT[problem]}: {result.loss:.4g}, beyond {limit:.4g}. {_REMEDY[problem]}"
        if problem == "gradient spike":
            limit = self.limits().grad_norm
            return f"step {step}: {_WHAT[problem]}: norm {result.grad_norm:.4g}, beyond {limit:.4g}. {_REMEDY[problem]}"
        places = everywhere([_place(finding, rollouts) for finding in result.findings])
        weights = everywhere(
            [
                f"{name} of the {role} (rank {dist.get_rank()})"
                for role, modules in models.items()
                for name in not_finite(named_parameters(modules))
            ]
        )
        tokens = sum(result.bad_tokens)
        text = f"step {step}: NaN or infinity in {_WHAT[problem]}"
        text += f", {tokens} tokens in all" if tokens else ""
        text += f": {_listed(places)}." if places else "."
        if weights:
            text += f" Weights that are not finite: {_listed(weights)}."
        elif models:
            text += f" The weights of {' and '.join(models)} are finite."
        return f"{text} {_REMEDY[problem]}"


def _place(finding: Finding, rollouts: Rollouts) -> str:
    """Return where a number was not finite, in words, with the prompt's id."""
    if finding.tensor is not None:
        return f"{finding.tensor} (rank {finding.rank})"
    text = f"rank {finding.rank}, micro-batch {finding.micro_batch}, sample {finding.sample_id}"
    if finding.sample_id in rollouts.sample_ids:
        row = rollouts.sample_ids.index(finding.sample_id)
        if row < len(rollouts.prompts):
            prompt = rollouts.prompts[row]
            text += f" of prompt {prompt.id!r}" + (f" ({prompt.row})" if prompt.row else "")
    return f"{text}, position {finding.position} (token id {finding.token_id})"


def _listed(items: list[str]) -> str:
    return "; ".join(items[:_SHOWN]) + (" and others" if len(items) > _SHOWN else "")


def check_responses(rollouts: Rollouts, role: str, on_nan: str = "stop") -> int:
    """Refuse responses that were drawn from logits that are not finite; collective over the model's ranks.

    Returns how many prompts, of all ranks, have such a response: 0 unless `on_nan` is skip.

    Args:
        rollouts: this data-parallel rank's.
        role: of the model that wrote them: student or teacher.
        on_nan: stop, or skip to warn alone.

    Raises:
        UserError: on every rank, with the prompts' ids.
    """
    rows = [i for i, logprobs in enumerate(rollouts.logprobs) if not sum(logprobs) < math.inf]
    if not any_rank(bool(rows)):
        return 0
    places = everywhere([f"prompt {rollouts.prompts[i].id!r} (rank {dist.get_rank()})" for i in rows])
    message = (
        f"NaN or infinity in the {role}'s logits as it wrote its responses to {_listed(places)}: what it drew is "
        f"arbitrary. Look at the {role}'s weights and at {role}.dtype (float16 ends at 65504)."
    )
    if on_nan == "stop":
        raise UserError(message)
    if dist.get_rank() == 0:
        logger.warning(message)
    return len(places)
