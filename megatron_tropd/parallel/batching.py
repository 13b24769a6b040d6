"""From ragged rollouts to padded, labelled tensors of one data-parallel rank, and their split into micro-batches.

Sequences are padded on the right, so causal attention never sees the padding and needs no mask. Packing several
sequences into one row is not done here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_tropd.rounding import round_up
from megatron_tropd.types import LOSS_GUIDANCE, LOSS_NONE, LOSS_STUDENT, Rollouts, TrainingBatch


def pad_rollouts(
    rollouts: Rollouts,
    *,
    pad_multiple: int = 8,
    row_multiple: int = 1,
    pad_id: int = 0,
    device: torch.device | str = "cpu",
    dropped: Sequence[bool] = (),
    weights: Sequence[float] = (),
) -> TrainingBatch:
    """Pad rollouts into a TrainingBatch [b, s] on `device`.

    Args:
        rollouts: this data-parallel rank's samples.
        pad_multiple: s is rounded up to it (tensor-parallel size, with sequence parallelism).
        row_multiple: b is rounded up to it (micro_batch_size) with filler rows: sample id -1 and no loss.
        pad_id: token on padding; carries no loss.
        device: where the tensors are put, in one transfer each.
        dropped: of each response, whether none of its tokens has a loss; empty: of none.
        weights: of each response, the factor of its losses; empty: 1 each.

    Position t is labelled with token t + 1: LOSS_GUIDANCE where that is a prefix token, LOSS_STUDENT where the student
    wrote it.
    """
    rows = round_up(max(len(rollouts), 1), row_multiple)
    longest = max(rollouts.lengths, default=1)
    width = round_up(longest, pad_multiple)
    tokens = torch.full((rows, width), pad_id, dtype=torch.int64)
    labels = torch.zeros((rows, width), dtype=torch.int64)
    loss_kind = torch.zeros((rows, width), dtype=torch.int8)
    old_logprobs = torch.zeros((rows, width), dtype=torch.float32)
    sample_ids = torch.full((rows,), -1, dtype=torch.int64)
    for row, sequence in enumerate(rollouts.tokens):
        length = rollouts.lengths[row]
        prefix_start = rollouts.prompt_lengths[row]
        student_start = prefix_start + rollouts.prefix_lengths[row]
        tokens[row, :length] = torch.tensor(sequence, dtype=torch.int64)
        labels[row, : length - 1] = tokens[row, 1:length]
        loss_kind[row, prefix_start - 1 : student_start - 1] = LOSS_GUIDANCE
        loss_kind[row, student_start - 1 : length - 1] = LOSS_STUDENT
        if dropped and dropped[row]:
            loss_kind[row] = LOSS_NONE
        old_logprobs[row, student_start - 1 : length - 1] = torch.tensor(rollouts.logprobs[row], dtype=torch.float32)
        sample_ids[row] = rollouts.sample_ids[row]
    batch = {
        "tokens": tokens,
        "labels": labels,
        "position_ids": torch.arange(width).expand(rows, width).contiguous(),
        "loss_kind": loss_kind,
        "old_logprobs": old_logprobs,
        "sample_ids": sample_ids,
    }
    if any(weight != 1.0 for weight in weights):
        factors = torch.tensor([*weights, *[1.0] * (rows - len(weights))], dtype=torch.float32)
        batch["weights"] = factors.unsqueeze(-1).expand(rows, width).contiguous()
    return TrainingBatch(**{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})


def microbatches(batch: TrainingBatch, micro_batch_size: int) -> list[TrainingBatch]:
    """Split a batch along its rows into views of `micro_batch_size` rows, which must divide them."""
    rows = batch.tokens.size(0)
    assert rows % micro_batch_size == 0, f"{rows} rows are no multiple of micro_batch_size={micro_batch_size}"
    return [batch.rows(start, start + micro_batch_size) for start in range(0, rows, micro_batch_size)]
