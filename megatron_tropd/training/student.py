"""The model that trains: chunks under Megatron's DDP, optimizer, learning-rate schedule, and where its state is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_tropd.config import TrainingConfig
from megatron_tropd.mcore.compat import (
    checkpoint_on_one_rank,
    keep_adam_step_on_load,
    unwrap_model,
)
from megatron_tropd.mcore.output_hook import OutputHook
from megatron_tropd.objective.divergence import Divergence
from megatron_tropd.parallel.groups import ParallelGroups
from megatron_tropd.tokenizers.end_of_text import EndOfText

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
