"""The seam to Megatron: forward_step, loss_func, gradients, optimizer; one call per training step.

The life of a micro-batch, hop by hop (b rows, s tokens of a context-parallel share, V/tp a vocabulary shard):

    train_step          batch, scores [B, S] -> split_batch, Objective.prepare -> micro-batches [b, s]
    run_schedule        Megatron's 1F1B or interleaved schedule calls, per micro-batch and stage:
    forward_step        arms the output layer (student_outputs.read_student), runs the model: hidden [s, b, h]
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
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_tropd.config import ObjectiveConfig, TrainingConfig
from megatron_tropd.mcore.compat import (
    checkpoint_on_one_rank,
    keep_adam_step_on_load,
    run_schedule,
    step_optimizer,
    unwrap_model,
)
from megatron_tropd.mcore.output_hook import OutputHook
from megatron_tropd.numbers.finite_weights import named_gradients, not_finite
from megatron_tropd.numbers.flags import STAGES, Finding, find_tokens, flag_tokens, watch_gradient
from megatron_tropd.numbers.step_report import Limits, StepResult, reduce_reports
from megatron_tropd.objective.divergence import Divergence
from megatron_tropd.objective.objectives import Objective
from megatron_tropd.parallel.groups import ParallelGroups
from megatron_tropd.parallel.micro_batches import Pairs, split_batch
from megatron_tropd.tokenizers.end_of_text import EndOfText
from megatron_tropd.training.entropies import prepare_scores
from megatron_tropd.training.student_outputs import StudentOutputs, read_student
from megatron_tropd.types import TeacherScores, TrainingBatch

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

# Megatron's 2**32 is meant for a mean over a micro-batch's tokens. The loss here is their undivided sum, thousands of
# times larger, and each halving costs a whole step, rollout included. The scale grows again where there is room.
_FLOAT16_LOSS_SCALE = 2.0**10
_NO_LIMITS = Limits()


@dataclass
class Student:
    """The model that trains, with everything Megatron needs to train it."""

    chunks: list[DistributedDataParallel]
    optimizer: Any
    scheduler: OptimizerParamScheduler
    groups: ParallelGroups
    hook: OutputHook
    vocab_size: int
    end: EndOfText = field(default_factory=EndOfText)  # end-of-text ids that are one event
    divergence: Divergence | None = None  # where the objective is one over the whole vocabulary
    offload: bool = False  # see `training_state`
    _is_away: bool = False

    @property
    def modules(self) -> list[GPTModel]:
        """The bare GPTModel chunks: the very parameters that train."""
        return [unwrap_model(chunk) for chunk in self.chunks]

    @property
    def vocabulary_width(self) -> int:
        """Rows of this rank's shard of the output layer, padding included."""
        return self.modules[-1].vocab_size // self.groups.tp_size

    def gather_parameters(self, wait: bool = False) -> None:
        """Begin to gather the parameters that other data-parallel ranks updated, or `wait` for them.

        Does nothing without overlap_param_gather, where the optimizer gathers them itself. Else each layer waits for
        its own when it runs next, in a rollout as in training; what reads parameters otherwise waits here.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=wait)

    @contextmanager
    def training_state(self) -> Iterator[None]:
        """Within the context gradients and optimizer state are on the device; outside, with `offload`, they are not.

        Then rollouts and the teacher's pass have their memory. What an update leaves of gradients is lost.
        """
        if self._is_away:
            for chunk in self.chunks:
                chunk.restore_grad_buffers()
            self.optimizer.restore_from_cpu()
        self._is_away = False
        yield
        self.leave_device()

    def leave_device(self) -> None:
        """With `offload`, free the gradients and move the optimizer's state to host memory."""
        if self.offload:
            self._is_away = True
            self.optimizer.offload_to_cpu()
            for chunk in self.chunks:
                chunk.offload_grad_buffers()


def build_student(
    modules: list[GPTModel], training: TrainingConfig, groups: ParallelGroups, vocab_size: int
) -> Student:
    """Wrap model chunks in Megatron's DDP and build its optimizer and learning-rate schedule."""
    config = modules[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=training.overlap_grad_reduce,
        overlap_param_gather=training.overlap_param_gather,
        align_param_gather=training.overlap_param_gather,  # all at once, see Student.gather_parameters
        use_distributed_optimizer=training.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # it would raise on one rank, without names; train_step looks at the norm
    )
    chunks = [
        DistributedDataParallel(config, ddp_config, module, disable_bucketing=i > 0, pg_collection=groups.collection)
        for i, module in enumerate(modules)
    ]
    optimizer = get_megatron_optimizer(
        _optimizer_config(training, config), chunks, use_gloo_process_groups=False, pg_collection=groups.collection
    )
    keep_adam_step_on_load(optimizer)
    checkpoint_on_one_rank(optimizer, groups.host)
    config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    min_lr = training.lr if training.lr_schedule == "constant" else (training.min_lr or 0.0)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=min_lr,
        lr_warmup_steps=training.lr_warmup_steps,
        lr_decay_steps=max(training.steps, training.lr_warmup_steps + 1),
        lr_decay_style=training.lr_schedule,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=training.steps,
        wd_incr_style="constant",
    )
    hook = OutputHook(chunks)
    return Student(chunks, optimizer, scheduler, groups, hook, vocab_size, offload=training.offload_optimizer)


def _optimizer_config(training: TrainingConfig, config: Any) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer=training.optimizer,
        lr=training.lr,
        min_lr=training.min_lr or 0.0,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=config.bf16,
        fp16=config.fp16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=training.use_distributed_optimizer,
        overlap_param_gather=training.overlap_param_gather,
        initial_loss_scale=_FLOAT16_LOSS_SCALE,
    )


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
    batch, scores = next(data_iterator)
    with read_student(student, batch, scores, objective, config):
        output = model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.packed_seq_params)
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
    lowest = {f"-{name}": -value for name, value in result.minima.items()}
    extremes = {**result.maxima, **lowest}
    report = {"sums": sums, "counts": result.counts, "extremes": extremes, "details": result.details, "flags": flags}
    return loss_sum, num_tokens, report
