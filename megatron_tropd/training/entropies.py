"""The student's entropies before an update, by one forward pass, for methods that choose the batch's tokens by them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from megatron_tropd.config import ObjectiveConfig
from megatron_tropd.mcore.compat import run_schedule
from megatron_tropd.objective.objectives import Objective
from megatron_tropd.parallel.micro_batches import PackedSplit, Pairs, RowSplit
from megatron_tropd.training.student_outputs import StudentOutputs, read_student
from megatron_tropd.types import TeacherScores, TrainingBatch

if TYPE_CHECKING:
    from megatron_tropd.training.step import Student


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
        batch, part = next(data_iterator)
        with read_student(student, batch, part, objective, config):
            output = model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.packed_seq_params)
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
