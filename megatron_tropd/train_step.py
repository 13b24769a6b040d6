"""The seam to Megatron: forward_step, loss_func, gradients, optimizer — one call a training step.

The student's output layer is hooked, so that a micro-batch's `[s, b, V/tp]` logits become the `[s, b, 1 + k]` log-probs
that the objective reads, or are not made at all (student_outputs.py). Megatron's schedule, DDP, finalize_model_grads
and optimizer do the rest. `loss_func` returns Megatron's triple (loss sum, number of tokens, report) with
calculate_per_token_loss, so every loss token of the global batch weighs the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_tropd.config import ObjectiveConfig, TrainingConfig
from megatron_tropd.divergence import Divergence
from megatron_tropd.end_of_text import EndOfText
from megatron_tropd.megatron_compat import (
    checkpoint_on_one_rank,
    keep_adam_step_on_load,
    run_schedule,
    unwrap_model,
)
from megatron_tropd.micro_batches import Pairs, split_batch
from megatron_tropd.objectives import Objective, TokenDetails
from megatron_tropd.output_hook import OutputHook
from megatron_tropd.parallel import ParallelGroups
from megatron_tropd.student_outputs import StudentOutputs, read_student
from megatron_tropd.token_statistics import summarise
from megatron_tropd.types import TeacherScores, TrainingBatch

# Megatron's 2**32 is meant for a mean over a micro-batch's tokens. The loss here is their undivided sum, thousands of
# times larger, and each halving costs a whole step, rollout included. The scale grows again where there is room.
_FLOAT16_LOSS_SCALE = 2.0**10


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
    def modules(self) -> list[torch.nn.Module]:
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


@dataclass
class StepResult:
    """Metrics of one step, reduced over the whole job; the same on every data-parallel rank of the last stage."""

    metrics: dict[str, float] = field(default_factory=dict)
    num_loss_tokens: int = 0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    details: TokenDetails | None = None  # [b, s] of this rank's batch


def build_student(
    modules: list[torch.nn.Module], training: TrainingConfig, groups: ParallelGroups, vocab_size: int
) -> Student:
    """Wrap model chunks in Megatron's DDP and build its optimizer and learning-rate schedule."""
    config = modules[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=training.overlap_grad_reduce,
        overlap_param_gather=training.overlap_param_gather,
        align_param_gather=training.overlap_param_gather,  # all at once, see Student.gather_parameters
        use_distributed_optimizer=training.use_distributed_optimizer,
        check_for_nan_in_grad=not config.fp16,  # there overflows are expected: the step is skipped, the scale halved
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
) -> StepResult:
    """Run one optimizer step over this data-parallel rank's `batch`.

    Args:
        student: from `build_student`.
        batch: this rank's rows [b, s]; b a multiple of micro_batch_size, the same number on every rank.
        scores: the teacher's, aligned with `batch`; None on stages without the output layer.
        objective: from `objectives.build_objective`.
        config: `objective.*` of the recipe (temperature and kernel are read here).
        step: global step, an argument of the gate's random numbers.
        micro_batch_size: rows a forward pass.
        max_tokens: pack sequences into forward passes of about so many tokens instead; None: no packing.

    Returns:
        Reduced metrics (see `reduce_reports`) with gradient norm and learning rate.
    """
    for chunk in student.chunks:
        chunk.train()
    multiple = student.groups.token_multiple(student.modules[0].config)
    split = split_batch(batch, student.groups, micro_batch_size, max_tokens, multiple)
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
        updated, grad_norm, _ = student.optimizer.step()
    student.gather_parameters()
    if updated:
        student.scheduler.step(increment=1)
    result = reduce_reports(reports, student.groups)
    if reports and reports[0]["details"] is not None:
        result.details = split.join([report["details"] for report in reports])
    result.grad_norm = float(grad_norm or 0.0)
    result.learning_rate = student.optimizer.param_groups[0]["lr"]
    result.metrics["update_skipped"] = float(not updated)
    return result


def forward_step(
    data_iterator: Iterator[tuple[TrainingBatch, TeacherScores | None]],
    model: torch.nn.Module,
    *,
    student: Student,
    objective: Objective,
    config: ObjectiveConfig,
    step: int,
):
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
    loss_sum = result.loss.sum()
    num_tokens = batch.num_loss_tokens.to(torch.int)
    sums = {"loss": (loss_sum.detach(), num_tokens), **result.metrics}
    report = {"sums": sums, "counts": result.counts, "maxima": result.maxima, "minima": result.minima}
    report["details"] = result.details
    return loss_sum, num_tokens, report


def reduce_reports(reports: list[dict[str, Any]], groups: ParallelGroups) -> StepResult:
    """Reduce the micro-batches' reports over data- and context-parallel ranks, in two small collectives.

    `sums` (name -> (sum, count)) become means over the global batch, whatever the layout; `maxima` and `minima` the
    extremes; `counts` (name -> [bins]) what token_statistics.summarise reads off them. Stages without the output layer
    have no reports and return an empty result.
    """
    if not groups.is_last_stage:
        return StepResult()
    sums = _stack(reports, "sums", lambda values: torch.stack([torch.stack(v) for v in values]).sum(0))
    extremes = _stack(reports, "maxima", lambda values: torch.stack(values).amax(0))
    lowest = _stack(reports, "minima", lambda values: torch.stack(values).amin(0))
    extremes.update({f"-{name}": -value for name, value in lowest.items()})
    counts = _stack(reports, "counts", lambda values: torch.stack(values).sum(0))
    flat = torch.cat([torch.stack(list(sums.values())).flatten(), *counts.values()])  # [2 metrics + bins]
    torch.distributed.all_reduce(flat, group=groups.dp_cp)
    numbers = iter(flat.tolist())
    pairs = {name: (next(numbers), next(numbers)) for name in sums}
    metrics = summarise({name: list(islice(numbers, len(histogram))) for name, histogram in counts.items()})
    for name, (total, count) in pairs.items():
        if count or name == "loss":
            metrics[name] = total / max(count, 1)
        if name == "loss":
            num_tokens = int(count)
    if extremes:
        packed = torch.stack(list(extremes.values()))
        torch.distributed.all_reduce(packed, op=torch.distributed.ReduceOp.MAX, group=groups.dp_cp)
        for name, value in zip(extremes, packed.tolist(), strict=True):
            if abs(value) != float("inf"):  # no token of that kind anywhere
                metrics[name.lstrip("-")] = -value if name.startswith("-") else value
    return StepResult(metrics=metrics, num_loss_tokens=num_tokens)


def _stack(reports: list[dict[str, Any]], part: str, combine: Any) -> dict[str, torch.Tensor]:
    def as_double(value: Any) -> Any:
        return tuple(v.double() for v in value) if isinstance(value, tuple) else value.double()

    return {name: combine([as_double(r[part][name]) for r in reports]) for name in reports[0][part]}
