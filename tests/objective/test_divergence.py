"""Divergences from hidden states: by hand where teacher and student agree; end-of-text ids that are one event."""

import itertools

import pytest
import torch
import torch.distributed as dist
from support.helpers import assert_close, run_distributed

from megatron_tropd.kernels.full_divergence.op import KINDS
from megatron_tropd.kernels.full_divergence.reference import DEFINITIONS
from megatron_tropd.objective.divergence import Divergence
from megatron_tropd.tokenizers.end_of_text import EndOfText

VOCAB, PADDED, ENDS = 29, 32, (3, 11, 28)
BETA, TEMPERATURE = 0.3, 1.4
CASES = list(itertools.product(KINDS, (False, True)))  # of which divergence, with ids apart or one event


def material():
    """Hidden states [s, b, h] and weights, the teacher's [b, s, h'] and weights, and a mask [b, s]."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 2, 8, generator=generator), torch.randn(PADDED, 8, generator=generator)
    theirs, their_weight = torch.randn(2, 5, 6, generator=generator), torch.randn(PADDED, 6, generator=generator)
    mask = torch.rand(2, 5, generator=generator) < 0.7
    return hidden, weight, theirs, their_weight, mask


def expected(kind, end):
    """Float64 over a vocabulary in which the ids of `end` are one; the loss and both gradients of its sum."""
    hidden, weight, theirs, their_weight, mask = material()
    hidden, weight = (t.double().requires_grad_() for t in (hidden, weight))

    def merged(logits):
        logprobs = (logits[..., :VOCAB] / TEMPERATURE).log_softmax(-1)
        if not end:
            return logprobs
        others = [i for i in range(VOCAB) if i not in ENDS]
        return torch.cat([logprobs[..., others], logprobs[..., list(ENDS)].logsumexp(-1, keepdim=True)], dim=-1)

    teacher = merged(theirs.double().transpose(0, 1) @ their_weight.double().t())
    loss = torch.where(mask.t(), DEFINITIONS[kind](merged(hidden @ weight.t()), teacher, BETA), 0.0)
    loss.sum().backward()
    return loss.detach(), hidden.grad, weight.grad


def divergences_rank():
    """Every case's loss and gradients on this rank."""
    dist.init_process_group("gloo")
    return {case: divergence_of(*case, dist.group.WORLD) for case in CASES}


def divergence_of(kind, end, group):
    rank, size = group.rank(), group.size()
    hidden, weight, theirs, their_weight, mask = material()
    hidden, shard = hidden.requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()
    divergence = Divergence(
        kind, their_weight.chunk(size)[rank], group, VOCAB, BETA, TEMPERATURE, end=EndOfText(ENDS if end else ())
    )
    loss = divergence(hidden, shard, theirs, mask)
    loss.sum().backward()
    return loss.detach(), hidden.grad, shard.grad


@pytest.mark.parametrize("size", [1, 2])
def test_loss_and_gradients_are_those_of_the_vocabulary_in_which_ends_are_one(size):
    ranks = run_distributed(divergences_rank, size)
    for case in CASES:
        losses, hidden, weights = zip(*(rank[case] for rank in ranks), strict=True)
        loss, hidden_gradient, weight_gradient = expected(*case)
        assert_close(losses[0], loss, torch.float32)
        assert_close(sum(hidden), hidden_gradient, torch.float32)
        assert_close(torch.cat(weights), weight_gradient, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_diverge_by_nothing(kind):
    hidden, weight, _, _, mask = material()
    end = EndOfText(ENDS)
    found = Divergence(kind, weight, None, VOCAB, end=end)(hidden, weight, hidden.transpose(0, 1), mask)
    assert found.abs().max() < 1e-6
