"""Padding, labels, loss kinds and micro-batches, by hand."""

import pytest
import torch

from megatron_tropd.parallel.batching import microbatches, pad_rollouts
from megatron_tropd.types import LOSS_GUIDANCE, LOSS_NONE, LOSS_STUDENT, Rollouts


def make_rollouts() -> Rollouts:
    """Two samples: prompt 3 + prefix 2 + student 2, and prompt 2 + student 1."""
    return Rollouts(
        tokens=[[1, 2, 3, 4, 5, 6, 7], [8, 9, 10]],
        prompt_lengths=[3, 2],
        prefix_lengths=[2, 0],
        lengths=[7, 3],
        logprobs=[[-0.5, -0.25], [-1.0]],
        finish_reasons=["eos", "length"],
        sample_ids=[40, 41],
    )


def test_every_label_is_the_next_token_with_its_kind_and_old_logprob():
    batch = pad_rollouts(make_rollouts(), pad_multiple=4, pad_id=99)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 99], [8, 9, 10, 99, 99, 99, 99, 99]]
    assert batch.labels.tolist() == [[2, 3, 4, 5, 6, 7, 0, 0], [9, 10, 0, 0, 0, 0, 0, 0]]
    n, g, s = LOSS_NONE, LOSS_GUIDANCE, LOSS_STUDENT
    assert batch.loss_kind.tolist() == [[n, n, g, g, s, s, n, n], [n, s, n, n, n, n, n, n]]
    assert batch.old_logprobs.tolist() == [[0, 0, 0, 0, -0.5, -0.25, 0, 0], [0, -1, 0, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [list(range(8))] * 2
    assert batch.sample_ids.tolist() == [40, 41]
    assert batch.num_loss_tokens.item() == 5


def test_filler_rows_carry_no_loss():
    batch = pad_rollouts(make_rollouts(), pad_multiple=8, row_multiple=4)
    assert batch.tokens.shape == (4, 8)
    assert batch.sample_ids.tolist() == [40, 41, -1, -1]
    assert (batch.loss_kind[2:] == LOSS_NONE).all()
    assert batch.num_loss_tokens.item() == 5


def test_an_empty_share_is_a_batch_without_loss():
    empty = Rollouts([], [], [], [], [], [], [])
    batch = pad_rollouts(empty, pad_multiple=8, row_multiple=2)
    assert batch.tokens.shape == (2, 8)
    assert batch.num_loss_tokens.item() == 0


def test_microbatches_are_views_that_cover_the_batch_once():
    batch = pad_rollouts(make_rollouts(), row_multiple=4)
    parts = microbatches(batch, 2)
    assert torch.equal(torch.cat([p.tokens for p in parts]), batch.tokens)
    assert parts[1].tokens.data_ptr() == batch.tokens[2:].data_ptr()
    assert sum(p.num_loss_tokens.item() for p in parts) == batch.num_loss_tokens.item()
    with pytest.raises(AssertionError, match="micro_batch_size=3"):
        microbatches(batch, 3)
