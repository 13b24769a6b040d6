"""Flags tokens with NaN or infinity, and the first stage with one: one int8 per token, on the device, without a sync.

flags = flag_tokens(batch, scores, outputs.logprobs, loss)  # [b, s], 0 where all is well
watch_gradient(output, flags, batch)                        # the backward pass adds what it finds
find_tokens(flags_by_micro_batch, batches, groups)          # on the host, after a step that went wrong
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_tropd.parallel.groups import ParallelGroups
from megatron_tropd.types import LOSS_NONE, LOSS_STUDENT, TeacherScores, TrainingBatch

# The stages in their order; a flag is a place in it, counted from 1. A token bears the first that went wrong.
STAGES = ("rollout", "teacher scores", "student log-probs", "loss", "gradient")

# No loss of a token is so large but one that is infinite (kernels count a log-prob of -inf as one of -1e30).
ABSURD = 1e12
_SHOWN = 4  # samples named by each rank


@dataclass(frozen=True)
class Finding:
    """One token, or one tensor, that is not finite."""

    stage: str
    rank: int  # of the process, in the student's part of the job
    micro_batch: int | None = None
    sample_id: int | None = None
    position: int | None = None  # of the token in its sequence
    token_id: int | None = None
    tensor: str | None = None  # the parameter's name, where it is its gradient


def flag_tokens(
    batch: TrainingBatch, scores: TeacherScores | None, logprobs: torch.Tensor, loss: torch.Tensor
) -> torch.Tensor:
    """Return a flag [b, s] int8 of every token with a loss; 0 on the others.

    A log-prob of -inf is a number here: objective/objectives.py knows what to do with it.

    Args:
        batch: the micro-batch.
        scores: the teacher's; None without a teacher.
        logprobs: [b, s, 1 + k] the student's.
        loss: [b, s].
    """
    nothing = torch.zeros_like(batch.loss_kind, dtype=torch.bool)
    teacher = nothing
    if scores is not None:
        teacher = _wrong(scores.logprobs)
        if scores.topk_logprobs.size(-1):
            teacher = teacher | _wrong(scores.topk_logprobs.amax(-1))
    wrong = (
        _wrong(batch.old_logprobs) & (batch.loss_kind == LOSS_STUDENT),
        teacher,
        _wrong(logprobs.detach().amax(-1)),
        ~(loss.detach().abs() < ABSURD),
    )
    flags = torch.zeros_like(batch.loss_kind)
    for stage in range(len(wrong), 0, -1):  # the first stage last, so that it stands
        flags.masked_fill_(wrong[stage - 1], stage)
    return flags.masked_fill_(batch.loss_kind == LOSS_NONE, 0)


def _wrong(values: torch.Tensor) -> torch.Tensor:
    return ~(values < torch.inf)  # NaN compares false


def watch_gradient(output: torch.Tensor, flags: torch.Tensor) -> None:
    """Let the backward pass flag tokens without a flag whose gradient [b, s, c] is not finite.

    Args:
        output: [b, s, c] from which the loss was computed.
        flags: [b, s] from `flag_tokens`; changed in the backward pass.
    """

    def note(gradient: torch.Tensor) -> None:
        wrong = _wrong(gradient.detach().abs().amax(-1)) & (flags == 0)
        flags.masked_fill_(wrong, len(STAGES))

    if output.requires_grad:
        output.register_hook(note)


def count_flags(flags: list[torch.Tensor]) -> torch.Tensor:
    """Return how many tokens of all micro-batches bear each stage's flag, [stages] float64."""
    every = torch.cat([f.flatten() for f in flags])
    return torch.stack([(every == stage).sum() for stage in range(1, len(STAGES) + 1)]).double()


def find_tokens(flags: list[torch.Tensor], batches: list[TrainingBatch], groups: ParallelGroups) -> list[Finding]:
    """Return the first token that bears the earliest stage's flag, of the first few samples that have one.

    Of this rank's tokens; one tensor-parallel rank speaks for all.
    """
    stages = [int(flag[flag > 0].min()) for flag in flags if (flag > 0).any()]
    if groups.tp_rank > 0 or not stages:
        return []
    found: dict[int, Finding] = {}
    for micro_batch, (flag, batch) in enumerate(zip(flags, batches, strict=True)):
        for row, column in (flag == min(stages)).nonzero().tolist():
            sample = int(batch.token_sample_ids[row, column])
            if sample not in found:
                place = (int(batch.position_ids[row, column]) + 1, int(batch.labels[row, column]))  # of the label
                found[sample] = Finding(STAGES[min(stages) - 1], dist.get_rank(), micro_batch, sample, *place)
        if len(found) >= _SHOWN:
            break
    return list(found.values())[:_SHOWN]
