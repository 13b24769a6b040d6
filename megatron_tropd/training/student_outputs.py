"""The student's outputs in training: the few numbers per token that the objective reads, in place of logits.

with read_student(student, batch, scores, objective, config):
    output = model(...)                                         # [b, s, 1 + k + 1], or one more with a divergence
outputs = StudentOutputs.unpack(output, with_divergence=False)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from megatron_tropd.config import ObjectiveConfig
from megatron_tropd.kernels import fused_linear_logprobs, vocab_parallel_logprobs
from megatron_tropd.mcore.compat import run_schedule
from megatron_tropd.objective.objectives import Objective
from megatron_tropd.parallel.micro_batches import PackedSplit, Pairs, RowSplit
from megatron_tropd.training.student import Student
from megatron_tropd.types import LOSS_NONE, TeacherScores, TrainingBatch


@dataclass
class StudentOutputs:
    """The student's numbers at every token, fp32; on the last stage."""

    logprobs: torch.Tensor  # [b, s, 1 + k], differentiable unless there is a divergence
    entropy: torch.Tensor  # [b, s], no gradient
    divergence: torch.Tensor | None = None  # [b, s], differentiable

    def pack(self) -> torch.Tensor:
        """Return one tensor [..., 1 + k + 1 (+ 1)], of which Megatron's schedule knows how to take care."""
        last = [] if self.divergence is None else [self.divergence.unsqueeze(-1)]
        return torch.cat([self.logprobs, self.entropy.unsqueeze(-1), *last], dim=-1)

    @classmethod
    def unpack(cls, output: torch.Tensor, with_divergence: bool) -> StudentOutputs:
        """Undo `pack`."""
        divergence = None
        if with_divergence:
            output, divergence = output[..., :-1], output[..., -1]
        return cls(output[..., :-1], output[..., -1].detach(), divergence)


def read_student(
    student: Student,
    batch: TrainingBatch,
    scores: TeacherScores | None,
    objective: Objective,
    config: ObjectiveConfig,
) -> AbstractContextManager[None]:
    """Return the context in which a forward pass of `batch` gives packed StudentOutputs on the last stage.

    Args:
        student: its hook, vocabulary and, for an objective over the whole vocabulary, `divergence`.
        batch: the micro-batch.
        scores: the teacher's of it.
        objective: says at which ids the student is read, and whether a divergence is.
        config: `objective.*` of the recipe (temperature and kernel are read here).
    """
    mask = (batch.loss_kind != LOSS_NONE).t()  # [s, b]

    def ids_to_read() -> torch.Tensor:  # [s, b, 1 + k]
        return objective.ids(batch, scores).transpose(0, 1)

    def from_logits(logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        ids = ids_to_read()
        # Nothing else reads the logits: their gradient may overwrite them.
        logprobs, entropy = vocab_parallel_logprobs(
            logits,
            student.end.extend(ids),
            student.groups.tp,
            student.vocab_size,
            temperature=config.temperature,
            with_entropy=True,
            mask=mask,
            inplace_backward=True,
            implementation=config.kernel,
        )
        assert entropy is not None  # it was asked for
        return StudentOutputs(student.end.merge(logprobs, ids), entropy).pack()

    def from_hidden(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ids = ids_to_read()
        assert student.divergence is not None  # the objective is one
        assert scores is not None  # of the teacher, whose hidden states it reads
        assert scores.hidden is not None
        divergence = student.divergence(hidden, weight, scores.hidden, batch.loss_kind != LOSS_NONE)
        with torch.no_grad():  # the sampled tokens are only reported
            logprobs, entropy = fused_linear_logprobs(
                hidden,
                weight,
                student.end.extend(ids),
                student.groups.tp,
                student.vocab_size,
                temperature=config.temperature,
                with_entropy=True,
                mask=mask,
                implementation=config.kernel,
            )
        assert entropy is not None  # it was asked for
        return StudentOutputs(student.end.merge(logprobs, ids), entropy, divergence).pack()

    return student.hook.replaced(from_hidden) if objective.divergence else student.hook.armed(from_logits)


def run_micro_batch(
    data_iterator: Iterator[tuple[TrainingBatch, TeacherScores | None]],
    model: torch.nn.Module,
    student: Student,
    objective: Objective,
    config: ObjectiveConfig,
) -> tuple[torch.Tensor, TrainingBatch, TeacherScores | None]:
    """Run the next micro-batch through this stage; return its output and what the iterator gave.

    Args:
        data_iterator: gives a micro-batch and the teacher's scores of it.
        model: the chunk that Megatron's schedule runs.
        student, objective, config: see `read_student`.

    Returns:
        Packed StudentOutputs [b, s, 1 + k + 1 (+ 1)] on the last stage, else hidden states [s, b, h]; batch; scores.
    """
    batch, scores = next(data_iterator)
    with read_student(student, batch, scores, objective, config):
        output = model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.packed_seq_params)
    return output, batch, scores


def prepare_scores(
    student: Student,
    split: RowSplit | PackedSplit,
    batch: TrainingBatch,
    scores: TeacherScores | None,
    objective: Objective,
    config: ObjectiveConfig,
    step: int,
) -> TeacherScores | None:
    """Return what `Objective.prepare` makes of the scores of `batch`, with the entropies if it needs them; collective.

    Args:
        student, split, scores, objective, config: see `student_entropies`.
        batch: of which `split` is.
        step: global step.
    """
    by_entropy = objective.selects_by(step) == "entropy"
    entropy = student_entropies(student, split, scores, objective, config) if by_entropy else None
    return objective.prepare(batch, scores, step, entropy, student.groups.dp)


@torch.no_grad()
def student_entropies(
    student: Student,
    split: RowSplit | PackedSplit,
    scores: TeacherScores | None,
    objective: Objective,
    config: ObjectiveConfig,
) -> torch.Tensor | None:
    """Return the entropies [b, s] fp32 in nats of this data-parallel rank's batch; collective over the student's ranks.

    They are those that the update's own forward pass will find: same micro-batches, mode and temperature.

    Args:
        student: in the mode in which it will train.
        split: of the batch.
        scores: the teacher's, aligned with the batch.
        objective: says at which ids the student is read.
        config: `objective.*` of the recipe (temperature and kernel are read here).

    Returns:
        None on stages without the output layer.
    """

    def forward_step(
        data_iterator: Iterator[tuple[TrainingBatch, TeacherScores | None]], model: torch.nn.Module
    ) -> tuple[torch.Tensor, object]:
        output, _, _ = run_micro_batch(data_iterator, model, student, objective, config)
        return output, _entropy

    found = run_schedule(
        student.groups,
        forward_step,
        Pairs(split.batches, split.take(scores)),
        student.chunks,
        seq_length=split.seq_length,
        micro_batch_size=split.micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return split.join(found) if found else None


def _entropy(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
    return StudentOutputs.unpack(output, with_divergence=False).entropy
