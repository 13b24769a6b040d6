"""The seam to Megatron: forward_step, loss_func, gradients, optimizer; one call per training step.

The life of a micro-batch, hop by hop (b rows, s tokens of a context-parallel share, V/tp a vocabulary shard):

    train_step          batch, scores [B, S] -> split_batch, Objective.prepare -> micro-batches [b, s]
    run_schedule        Megatron's 1F1B or interleaved schedule calls, per micro-batch and stage:
    forward_step        arms the output layer (student_outputs.run_micro_batch), runs the model: hidden [s, b, h]
    output layer        logits [s, b, V/tp] -> OutputHook -> vocab_parallel_logprobs at Objective.ids
                        -> StudentOutputs [s, b, 1 + k + 1]: log-probs of x and of the teacher's top-k, entropy;
                        for a divergence the logits are never made: hidden and weight go to a fused operation
    GPTModel            transposes to [b, s, ...]
    loss_func           unpacks; Objective.loss -> loss [b, s]; returns (sum, number of loss tokens, report)
    schedule            backward; finalize_model_grads divides by the global batch's loss tokens
    reduce_reports      sums of all micro-batches and ranks -> metrics; _update steps the optimizer, or says why not

With calculate_per_token_loss every loss token of the global batch weighs the same, whatever its micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megatron_tropd.config import ObjectiveConfig
from megatron_tropd.mcore.compat import (
    run_schedule,
    step_optimizer,
)
from megatron_tropd.numbers.finite_weights import named_gradients, not_finite
from megatron_tropd.numbers.flags import STAGES, Finding, find_tokens, flag_tokens, watch_gradient
from megatron_tropd.numbers.step_report import Limits, StepResult, reduce_reports
from megatron_tropd.objective.objectives import Objective
from megatron_tropd.parallel.groups import ParallelGroups
from megatron_tropd.parallel.micro_batches import Pairs, split_batch
from megatron_tropd.training.student import Student
from megatron_tropd.training.student_outputs import StudentOutputs, prepare_scores, run_micro_batch
from megatron_tropd.types import TeacherScores, TrainingBatch

_NO_LIMITS = Limits()


def train_step(
    student: Student,
    batch: TrainingBatch,
    scores: TeacherScores | None,
    objective: Objective,
    config: ObjectiveConfig,
    step: int,
    micro_batch_size: int,
    max_tokens: int | None = None,
    limits: Limits = _NO_LIMITS,
) -> StepResult:
    """Run one optimizer step over this data-parallel rank's `batch`; collective over the student's ranks.

    Where a number is not finite, or beyond `limits`, the parameters and the optimizer stay as they are, on all ranks.

    Args:
        student: from `build_student`.
        batch: this rank's rows [b, s]; b a multiple of micro_batch_size, the same number on every rank.
        scores: the teacher's, aligned with `batch`; None on stages without the output layer.
        objective: from `objectives.build_objective`.
        config: `objective.*` of the recipe (temperature and kernel are read here).
        step: global step, an argument of the gate's random numbers.
        micro_batch_size: rows a forward pass.
        max_tokens: pack sequences into micro-batches of at most this many tokens instead; None: no packing.
        limits: the same on all ranks.

    Returns:
        Reduced metrics (see `reduce_reports`) with gradient norm and learning rate, and what kept it from an update.
    """
    for chunk in student.chunks:
        chunk.train()
    multiple = student.groups.token_multiple(student.modules[0].config)
    split = split_batch(batch, student.groups, micro_batch_size, max_tokens, multiple)
    scores = prepare_scores(student, split, batch, scores, objective, config, step)
    with student.training_state():
        for chunk in student.chunks:
            chunk.zero_grad_buffer()
        student.optimizer.zero_grad()
        reports = run_schedule(
            student.groups,
            partial(forward_step, student=student, objective=objective, config=config, step=step),
            Pairs(split.batches, split.take(scores)),
            student.chunks,
            seq_length=split.seq_length,
            micro_batch_size=split.micro_batch_size,
            forward_only=False,
        )
        result = reduce_reports(reports, student.groups, objective.extremes)
        updated = _update(student, result, limits)
        if result.problem in STAGES:
            result.findings = _locate(student, result.problem, reports, split.batches)
    student.gather_parameters()
    if updated:
        student.scheduler.step(increment=1)
    if reports and reports[0]["details"] is not None:
        result.details = split.join([report["details"] for report in reports])
    result.learning_rate = student.optimizer.param_groups[0]["lr"]
    result.metrics["update_skipped"] = float(not updated)
    return result


def _update(student: Student, result: StepResult, limits: Limits) -> bool:
    """Step the optimizer unless a number is out of order; set the result's norm and problem. Returns whether it did.

    All ranks decide alike: `reduce_reports` and the norm are global.
    """
    is_float16 = student.modules[0].config.fp16
    result.problem = result.first_bad_stage or ("loss spike" if result.loss > limits.loss else None)
    if result.problem is None and not result.num_loss_tokens:
        result.problem = "no tokens"  # Adam's momentum and weight decay alone would move the weights
    if result.problem is not None:  # before the loss scaler treats it as an overflow
        return False

    def accept(norm: float) -> bool:
        if not math.isfinite(norm):
            result.problem = "gradient"
        elif limits.grad_norm < math.inf and _largest(norm, student.groups) > limits.grad_norm:
            result.problem = "gradient spike"
        return result.problem is None

    updated, norm = step_optimizer(student.optimizer, accept)
    result.grad_norm = norm or 0.0
    if is_float16:
        result.loss_scale = float(student.optimizer.get_loss_scale())
    if not updated and result.problem is None:
        # A scale that cannot be lowered any more is not what overflows.
        result.problem = "gradient" if result.loss_scale is None or result.loss_scale <= 1.0 else "overflow"
    return updated


def _locate(student: Student, problem: str, reports: list[dict], batches: list[TrainingBatch]) -> list[Finding]:
    """Return this rank's tokens and gradients that are not finite; only while the gradients are there."""
    found = find_tokens([report["flags"] for report in reports], batches[: len(reports)], student.groups)
    names = not_finite(named_gradients(student.modules)) if problem == "gradient" else []
    return found + [Finding(problem, torch.distributed.get_rank(), tensor=name) for name in names]


def _largest(value: float, groups: ParallelGroups) -> float:
    """Return the largest of the ranks' values: replicas round differently, and must not part over it."""
    largest = torch.tensor(value, dtype=torch.float64, device=groups.device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return float(largest)


def forward_step(
    data_iterator: Iterator[tuple[TrainingBatch, TeacherScores | None]],
    model: torch.nn.Module,
    *,
    student: Student,
    objective: Objective,
    config: ObjectiveConfig,
    step: int,
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Megatron's forward_step: one micro-batch through this stage; returns (output, loss_func)."""
    output, batch, scores = run_micro_batch(data_iterator, model, student, objective, config)
    return output, partial(loss_func, batch=batch, scores=scores, objective=objective, step=step)


def loss_func(
    output: torch.Tensor, *, batch: TrainingBatch, scores: TeacherScores | None, objective: Objective, step: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Megatron's loss function: `output` [b, s, StudentOutputs] to (loss sum, number of loss tokens, report).

    The sum is left undivided: with calculate_per_token_loss Megatron divides the gradients by the number of tokens of
    the global batch. A micro-batch without loss tokens contributes a zero that still runs backward, since every
    data-parallel rank must take part in the gradient reduction.
    """
    outputs = StudentOutputs.unpack(output, with_divergence=objective.divergence is not None)
    result = objective.loss(outputs.logprobs, scores, batch, step, outputs.entropy, outputs.divergence)
    flags = flag_tokens(batch, scores, outputs.logprobs, result.loss)
    watch_gradient(output, flags)
    loss_sum = result.loss.sum()
    num_tokens = batch.num_loss_tokens.to(torch.int)
    sums = {"loss": (loss_sum.detach(), num_tokens), **result.metrics}
    report = {"sums": sums, "counts": result.counts, "maxima": result.maxima, "minima": result.minima}
    report |= {"details": result.details, "flags": flags}
    return loss_sum, num_tokens, report
