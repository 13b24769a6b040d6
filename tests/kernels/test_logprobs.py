"""vocab_parallel_logprobs against float64 autograd over the vocabulary: values, gradients, collectives, memory."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.collectives import count_collectives
from support.helpers import assert_close, run_distributed
from support.logprob_cases import CASES, DTYPES, VOCAB, case, reference

from megatron_tropd.kernels import vocab_parallel_logprobs
from megatron_tropd.kernels.sharding import CHUNK_ELEMENTS


def rank_main(size: int):
    """Every case and dtype on this rank; returns [(case, dtype, log-probs, entropy, gradient shard, collectives)]."""
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    results = []
    for name in CASES:
        logits, ids, mask, temperature, upstream = case(name)
        for dtype in DTYPES:
            whole = logits.clamp(-6e4, 6e4).to(dtype)
            shard = whole.chunk(size, dim=1)[rank].clone()
            for inplace in (False, True):
                leaf = shard.clone().requires_grad_()
                with count_collectives() as forward:
                    picked, entropy = vocab_parallel_logprobs(
                        leaf * 1,  # not a leaf: the gradient may overwrite it
                        ids,
                        group,
                        VOCAB,
                        temperature=temperature,
                        with_entropy=True,
                        mask=mask,
                        inplace_backward=inplace,
                    )
                with count_collectives() as backward:
                    picked.backward(upstream)
                counts = (len(forward), len(backward))
                results.append((name, dtype, picked.detach(), entropy, leaf.grad, counts))
    return results


@pytest.mark.parametrize("size", [1, 2, 4])
def test_values_entropy_and_gradients_equal_float64_under_every_sharding(size):
    ranks = run_distributed(rank_main, size, size)
    for i, (name, dtype, picked, entropy, _, counts) in enumerate(ranks[0]):
        logits, ids, mask, temperature, upstream = case(name)
        whole = logits.clamp(-6e4, 6e4).to(dtype)
        expected = reference(whole, ids, VOCAB, temperature, mask, upstream)
        gradient = torch.cat([rank[i][4] for rank in ranks], dim=1)
        # Statistics are fp32 whatever the logits' dtype; only the gradient is rounded to it.
        torch.testing.assert_close(picked.double(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=2e-5)
        assert_close(gradient, expected[2], dtype)
        assert all(torch.equal(rank[i][2], picked) for rank in ranks), "ranks disagree"
        assert counts[0] <= 2, "more than two collectives forward"
        assert counts[1] == 0, "a collective in the backward pass"
        assert gradient[:, VOCAB:].abs().max() == 0, "padding received a gradient"


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(0, 7),
    st.integers(1, 6),
    st.floats(0.3, 3.0),
    st.integers(0, 99),
)
def test_any_shape_equals_float64(rows, vocab, padding, picks, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, vocab + padding, generator=generator)
    ids = torch.randint(vocab, (rows, picks), generator=generator)
    mask = torch.rand(rows, generator=generator) < 0.7
    upstream = torch.randn(rows, picks, generator=generator)
    leaf = logits.clone().requires_grad_()
    picked, entropy = vocab_parallel_logprobs(
        leaf, ids, None, vocab, temperature=temperature, mask=mask, with_entropy=True
    )
    picked.backward(upstream)
    expected = reference(logits, ids, vocab, temperature, mask, upstream)
    for ours, theirs in zip((picked, entropy, leaf.grad), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)


def test_rows_beyond_a_chunk_are_computed_alike():
    rows, vocab = 7, CHUNK_ELEMENTS // 3  # three rows per chunk
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(rows)[:, None] * 11
    upstream = torch.ones(rows, 1)
    leaf = logits.clone().requires_grad_()
    picked, _ = vocab_parallel_logprobs(leaf, ids, None, vocab)
    picked.backward(upstream)
    expected = reference(logits, ids, vocab, 1.0, torch.ones(rows, dtype=torch.bool), upstream)
    torch.testing.assert_close(picked.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), expected[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_farther_from_float64_than_the_plain_operation_in_the_same_dtype(dtype):
    generator = torch.Generator().manual_seed(1)
    logits = (6 * torch.randn(64, 5000, generator=generator)).to(dtype)
    ids = torch.randint(5000, (64, 1024), generator=generator)
    upstream = torch.randn(64, 1024, generator=generator)
    wanted = reference(logits, ids, 5000, 1.0, torch.ones(64, dtype=torch.bool), upstream)
    errors = []
    for ours in (True, False):
        leaf = logits.clone().requires_grad_()
        picked = (
            vocab_parallel_logprobs(leaf, ids, None, 5000)[0] if ours else leaf.log_softmax(-1).gather(-1, ids).float()
        )
        picked.backward(upstream)
        pairs = zip((picked.detach(), leaf.grad), (wanted[0], wanted[2]), strict=True)
        errors.append([(a.double() - b).abs().max().item() for a, b in pairs])
    assert errors[0][0] <= errors[1][0] + 1e-6
    assert errors[0][1] <= errors[1][1] + 1e-6


def test_rows_without_upstream_gradient_are_skipped():
    logits = torch.randn(4, 16)
    logits[2] = torch.nan  # would spoil a product with zero
    leaf = logits.clone().requires_grad_()
    picked, _ = vocab_parallel_logprobs(leaf, torch.ones(4, 1, dtype=torch.int64), None, 16)
    picked.backward(torch.tensor([[1.0], [-1.0], [0.0], [2.0]]))
    assert leaf.grad[2].eq(0).all()
    assert leaf.grad.isfinite().all()


def test_nothing_of_the_size_of_the_logits_is_kept_or_copied():
    logits = torch.randn(64, 512, dtype=torch.bfloat16).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vocab_parallel_logprobs(logits, torch.zeros(64, 3, dtype=torch.int64), None, 512, with_entropy=True)
    large = [t for t in kept if t.numel() >= logits.numel()]
    assert all(t.data_ptr() == logits.data_ptr() for t in large), "a copy of the logits is kept"
    assert sum(t.numel() for t in kept) < logits.numel() + 64 * 9


def test_inplace_backward_reuses_the_logits_memory():
    leaf = torch.randn(8, 32).requires_grad_()
    logits = leaf * 1
    gradients = []
    logits.register_hook(gradients.append)
    picked, _ = vocab_parallel_logprobs(logits, torch.ones(8, 1, dtype=torch.int64), None, 32, inplace_backward=True)
    picked.sum().backward()
    assert gradients[0].data_ptr() == logits.data_ptr()


def test_the_reference_passes_a_finite_difference_check():
    logits = torch.randn(3, 8, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[0, 5], [1, 1], [6, 2]])

    def picked(z):
        from megatron_tropd.kernels.logprobs.reference import all_logprobs

        return all_logprobs(z, None, 7, 1.3).gather(-1, ids)

    assert torch.autograd.gradcheck(picked, logits)


def test_implementations_agree_and_unknown_ones_are_refused():
    logits, ids = torch.randn(4, 16), torch.randint(13, (4, 2))
    results = [vocab_parallel_logprobs(logits, ids, None, 13, implementation=i)[0] for i in ("chunked", "reference")]
    assert_close(*results)
    with pytest.raises(ValueError, match="none of auto"):
        vocab_parallel_logprobs(logits, ids, None, 13, implementation="magic")


def test_shapes_that_do_not_fit_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match="share their leading dimensions"):
        vocab_parallel_logprobs(torch.randn(4, 16), torch.zeros(5, 1, dtype=torch.int64), None, 16)
    with pytest.raises(ValueError, match="fewer than vocab_size=20"):
        vocab_parallel_logprobs(torch.randn(4, 16), torch.zeros(4, 1, dtype=torch.int64), None, 20)
    transposed = torch.randn(3, 4, 16).transpose(0, 1)
    with pytest.raises(ValueError, match="without a copy"):
        vocab_parallel_logprobs(transposed, torch.zeros(4, 3, 1, dtype=torch.int64), None, 16)
