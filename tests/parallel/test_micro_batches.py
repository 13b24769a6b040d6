"""Micro-batches by rows and by token budget: what lies where, and that everything comes back to its place."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import run_distributed

from megatron_tropd.parallel.micro_batches import Pairs, first_fit, split_batch, spread

LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(any)


@given(LENGTHS)
def test_every_sequence_is_in_one_bin_and_none_overflows(lengths):
    for bins in (first_fit(lengths, 60), spread(lengths, 60, len(first_fit(lengths, 60)))):
        assert sorted(place for places in bins for place in places) == [i for i, n in enumerate(lengths) if n]
        assert max(sum(lengths[place] for place in places) for places in bins) <= 60
    assert len(first_fit(lengths, 60)) <= 2 * -(-sum(lengths) // 60)


def test_bins_are_as_many_as_asked_and_about_equal():
    assert spread([5, 5, 5, 5], 20, 2) == [[0, 2], [1, 3]]
    assert spread([5], 20, 3) == [[0], [], []]
    assert [sorted(b) for b in spread([6, 5, 5, 4], 10, 2)] == [[0, 3], [1, 2]]


def test_bins_that_would_overflow_when_equal_are_filled_one_after_the_other():
    lengths = [6, 5, 5, 4, 4, 4, 2]  # distributed evenly 16 and 14
    assert spread(lengths, 16, 2) == [[0, 3, 4, 6], [1, 2, 5]]
    assert spread(lengths, 15, 3) != spread(lengths, 15, 2) == first_fit(lengths, 15)


def make_batch(rows: int = 5, width: int = 32):
    """Rows of different lengths, one of them without a loss; every token is its place in the batch."""
    from megatron_tropd.types import LOSS_GUIDANCE, LOSS_NONE, LOSS_STUDENT, TrainingBatch

    tokens = torch.arange(rows * width).view(rows, width)
    kind = torch.full((rows, width), LOSS_NONE, dtype=torch.int8)
    for row, (start, middle, stop) in enumerate([(3, 5, 9), (1, 1, 20), (0, 0, 0), (2, 14, 30), (4, 4, 5)][:rows]):
        kind[row, start:middle], kind[row, middle:stop] = LOSS_GUIDANCE, LOSS_STUDENT
    positions = torch.arange(width).expand(rows, width).contiguous()
    return TrainingBatch(tokens, tokens + 1, positions, kind, -tokens.float(), torch.arange(10, 10 + rows))


def split_rank(cp: int, max_tokens):
    """Split, look at every token, and bring token numbers and a nested dataclass back."""
    from megatron_tropd.config import ModelConfig
    from megatron_tropd.objective.objectives import TokenDetails
    from megatron_tropd.objective.trust_region import TrustGate
    from megatron_tropd.parallel import groups as parallel
    from megatron_tropd.types import TeacherScores

    model = ModelConfig(context_parallel_size=cp)
    groups = parallel.initialize(model)
    batch = make_batch()
    split = split_batch(batch, groups, 5, max_tokens, groups.token_multiple(model))
    scores = TeacherScores(batch.tokens.float(), batch.tokens[..., None].repeat(1, 1, 3), -batch.tokens[..., None])
    widths = {part.tokens.size(1) * groups.cp_size for part in split.batches}
    assert widths == {split.seq_length}
    for part, taken in zip(split.batches, split.take(scores), strict=True):
        kept = part.loss_kind != 0
        assert torch.equal(part.tokens[kept], taken.logprobs[kept].long())
        assert torch.equal(taken.topk_ids[kept], part.tokens[kept][:, None].repeat(1, 3))
        assert torch.equal(part.old_logprobs[kept], -part.tokens[kept].float())
        assert torch.equal(part.token_sample_ids[kept], 10 + part.tokens[kept] // 32)
        assert torch.equal(part.position_ids[kept], part.tokens[kept] % 32)
        assert torch.equal(part.labels[kept], part.tokens[kept] + 1)
    assert list(split.take(None)) == [None] * len(split.batches)
    assert [part for part, _ in Pairs(split.batches, split.take(scores))] == split.batches
    details = [
        TokenDetails(p.tokens.float(), p.tokens * 2.0, TrustGate(p.tokens * 3.0, p.tokens * 4.0)) for p in split.batches
    ]
    whole, details = split.join([part.tokens for part in split.batches]), split.join(details)
    kept = batch.loss_kind != 0
    assert torch.equal(whole[kept], batch.tokens[kept])
    assert torch.equal(details.gate.weight[kept], batch.tokens[kept] * 4.0)
    assert details.student_logprobs.shape == batch.tokens.shape
    layout = [None if p.packed_seq_params is None else p.packed_seq_params.cu_seqlens_q.tolist() for p in split.batches]
    return layout, sum(p.num_loss_tokens.item() for p in split.batches)


@pytest.mark.parametrize("max_tokens", [None, 32, 40, 1000])
@pytest.mark.parametrize("cp", [1, 2])
def test_every_token_goes_where_its_scores_go_and_comes_back(cp, max_tokens):
    results = run_distributed(split_rank, cp, cp, max_tokens)
    assert sum(tokens for _, tokens in results) == make_batch().num_loss_tokens.item()
    for layout, _ in results:
        assert layout == results[0][0]
    # Rows of 9, 20, 0, 30 and 5 tokens; the row without a loss is left out, and the last one bears the padding.
    expected = {32: [[0, 32], [0, 32], [0, 9, 32]], 1000: [[0, 9, 29, 59, 64]]}
    if cp == 1 and max_tokens in expected:
        assert results[0][0] == expected[max_tokens]


def uneven_rank():
    """Two data-parallel ranks, one of which has next to nothing to do."""
    from megatron_tropd.config import ModelConfig
    from megatron_tropd.parallel import groups as parallel

    groups = parallel.initialize(ModelConfig())
    rank = int(os.environ["RANK"])
    batch = make_batch() if rank == 0 else make_batch().rows(2, 3)
    split = split_batch(batch, groups, 1, max_tokens=32)
    empty = [part for part in split.batches if not part.num_loss_tokens]
    for part in empty:
        assert part.packed_seq_params.cu_seqlens_q.tolist() == [0, part.tokens.size(1)]
    return len(split.batches), len(empty)


def test_data_parallel_ranks_make_as_many_micro_batches():
    assert run_distributed(uneven_rank, 2) == [(3, 0), (3, 3)]
