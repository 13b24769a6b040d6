"""full_divergence against float64 autograd over the whole vocabulary: values, gradients, collectives, memory."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.collectives import count_collectives
from support.divergence_cases import CASES, DTYPES, VOCAB, case, expected
from support.helpers import TOLERANCES, run_distributed

from megatron_tropd.kernels import full_divergence, recut_shards
from megatron_tropd.kernels.full_divergence.op import KINDS
from megatron_tropd.kernels.sharding import CHUNK_ELEMENTS


def rank_main(size, implementation):
    """Every case, kind and dtype on this rank: [(case, kind, dtype, loss, gradient shard, collectives)]."""
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    results = []
    for name in CASES:
        student, teacher, mask, temperature, beta, upstream = case(name)
        for kind in KINDS:
            for dtype in DTYPES:
                leaf = student.to(dtype).chunk(size, 1)[rank].clone().requires_grad_()
                shard = teacher.to(dtype).chunk(size, 1)[rank].clone()
                before = shard.clone()
                options = {"beta": beta, "temperature": temperature, "mask": mask, "implementation": implementation}
                inplace = rank % 2 == 1
                with count_collectives() as forward:
                    loss = full_divergence(leaf * 1, shard, kind, group, VOCAB, inplace_backward=inplace, **options)
                with count_collectives() as backward:
                    loss.backward(upstream)
                assert torch.equal(shard, before), "the teacher's logits were overwritten"
                results.append((name, kind, dtype, loss.detach(), leaf.grad, (len(forward), len(backward))))
    return results


def compare(ranks):
    """Assert that every rank's results equal float64's."""
    for i, (name, kind, dtype, loss, _, counts) in enumerate(ranks[0]):
        student, teacher, mask, temperature, beta, upstream = case(name)
        wanted, wanted_gradient = expected(
            student.to(dtype), teacher.to(dtype), kind, VOCAB, beta, temperature, mask, upstream
        )
        gradient = torch.cat([rank[i][4] for rank in ranks], dim=1)
        where = f"{name} {kind} {dtype}"
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5, msg=lambda m: f"{where}: {m}")
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=tolerance, atol=tolerance)
        assert all(torch.equal(rank[i][3], loss) for rank in ranks), "ranks disagree"
        allowed = 1 + (kind == "jsd") + (name == "wider_teacher")
        assert counts[0] <= (allowed if len(ranks) > 1 else 0), f"{where}: {counts[0]} collectives forward"
        assert counts[1] == 0, "a collective in the backward pass"
        assert gradient[:, VOCAB:].abs().max() == 0, "padding received a gradient"
        if dtype == torch.float32:
            assert gradient.double().sum(1).abs().max() < 1e-5, "a row's gradient does not sum to zero"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_and_gradient_equal_float64_under_every_sharding(size):
    compare(run_distributed(rank_main, size, size, "chunked"))


def test_the_reference_agrees_with_the_formulas_under_sharding():
    compare_reference = run_distributed(rank_main, 2, 2, "reference")
    for name, kind, dtype, loss, *_ in compare_reference[0]:
        student, teacher, mask, temperature, beta, upstream = case(name)
        wanted, _ = expected(student.to(dtype), teacher.to(dtype), kind, VOCAB, beta, temperature, mask, upstream)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@example("reverse_kl", 6, 11, 4, 0.375, 0.5, 89)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(0, 7),
    st.floats(0.3, 3.0),
    st.floats(0.05, 0.95),
    st.integers(0, 99),
)
def test_any_shape_equals_float64(kind, rows, vocab, padding, temperature, beta, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (4 * torch.randn(rows, vocab + padding, generator=generator) for _ in range(2))
    mask = torch.rand(rows, generator=generator) < 0.7
    upstream = torch.randn(rows, generator=generator)
    leaf = student.clone().requires_grad_()
    loss = full_divergence(leaf, teacher, kind, None, vocab, beta=beta, temperature=temperature, mask=mask)
    loss.backward(upstream)
    wanted = expected(student, teacher, kind, vocab, beta, temperature, mask, upstream)
    torch.testing.assert_close(loss.double(), wanted[0], rtol=2e-5, atol=2e-5)
    # A gradient is a difference of log-ratios of up to a hundred nats: it is as exact as the row's largest one, and no
    # more exact than the ratios that are subtracted: 2e-5 of a hundredth of their spread is an fp32 epsilon and a half.
    ratios = (student - teacher)[:, :vocab].double() / temperature
    spread = upstream.abs() / temperature * (ratios.amax(1) - ratios.amin(1))
    largest = torch.maximum(wanted[1].abs().amax(1), spread / 100).clamp(min=1.0).unsqueeze(1)
    torch.testing.assert_close(leaf.grad.double() / largest, wanted[1] / largest, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_divergence_and_no_gradient(kind):
    logits = torch.randn(6, 50, dtype=torch.bfloat16) * 5
    leaf = logits.clone().requires_grad_()
    loss = full_divergence(leaf, logits, kind, None, 47, beta=0.3)
    loss.sum().backward()
    assert loss.abs().max() == 0
    assert leaf.grad.abs().max() < 1e-7


def test_two_outcomes_by_hand():
    student, teacher = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])  # (1/4, 3/4) and (1/2, 1/2)
    by_hand = {
        "reverse_kl": 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
        "forward_kl": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
        "jsd": 0.25 * (math.log(4 / 3) + math.log(4 / 5)) + 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)),
    }
    for kind, wanted in by_hand.items():
        assert full_divergence(student, teacher, kind, None, 2).item() == pytest.approx(wanted, abs=1e-7)


def test_rows_beyond_a_chunk_and_leading_dimensions():
    vocab = CHUNK_ELEMENTS // 7
    student, teacher = torch.randn(2, 5, 3, vocab).unbind(0)
    mask = torch.rand(5, 3) < 0.6
    leaf = student.clone().requires_grad_()
    loss = full_divergence(leaf, teacher, "reverse_kl", None, vocab, mask=mask)
    assert loss.shape == (5, 3)
    loss.sum().backward()
    flat = (student.flatten(0, 1), teacher.flatten(0, 1))
    wanted = expected(*flat, "reverse_kl", vocab, 0.5, 1.0, mask.flatten(), torch.ones(15))
    torch.testing.assert_close(loss.flatten().double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.flatten(0, 1).double(), wanted[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_farther_from_float64_than_the_plain_operation_in_the_same_dtype(kind, dtype):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (6 * torch.randn(2, 32, 3000, generator=generator)).to(dtype).unbind(0)
    upstream = torch.randn(32, generator=generator)
    wanted = expected(student, teacher, kind, 3000, 0.5, 1.0, torch.ones(32, dtype=torch.bool), upstream)
    errors = []
    for ours in (True, False):
        leaf = student.clone().requires_grad_()
        loss = full_divergence(leaf, teacher, kind, None, 3000) if ours else plain(leaf, teacher, kind)
        loss.float().backward(upstream)
        pairs = zip((loss.detach(), leaf.grad), wanted, strict=True)
        errors.append([(a.double() - b).abs().max().item() for a, b in pairs])
    assert errors[0][0] <= errors[1][0] + 1e-6
    assert errors[0][1] <= errors[1][1] + 1e-6


def plain(student, teacher, kind):
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    if kind != "jsd":
        return (q.exp() * (q - p)).sum(-1) if kind == "forward_kl" else (p.exp() * (p - q)).sum(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (q.exp() * (q - m)).sum(-1) + 0.5 * (p.exp() * (p - m)).sum(-1)


def test_nothing_of_the_size_of_the_logits_is_kept():
    student, teacher = torch.randn(64, 512).requires_grad_(), torch.randn(64, 512)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        full_divergence(student, teacher, "jsd", None, 512)
    own = {student.data_ptr(), teacher.data_ptr()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) <= 64 * 6


def test_what_makes_no_sense_is_refused():
    logits = torch.randn(4, 16)
    with pytest.raises(ValueError, match="'kl' is none of reverse_kl, forward_kl, jsd"):
        full_divergence(logits, logits, "kl", None, 16)
    with pytest.raises(ValueError, match=r"beta=1\.0 must lie between 0 and 1"):
        full_divergence(logits, logits, "jsd", None, 16, beta=1.0)
    with pytest.raises(ValueError, match="share their leading dimensions"):
        full_divergence(logits, logits[:3], "jsd", None, 16)
    with pytest.raises(ValueError, match="fewer than vocab_size=20"):
        full_divergence(logits, torch.randn(4, 20), "jsd", None, 20)


def recut_main(size):
    dist.init_process_group("gloo")
    results = []
    for old, new in ((16, 18), (18, 16), (16, 40), (5, 1)):
        whole = torch.arange(3 * old * size).view(3, old * size)
        shard = whole.chunk(size, 1)[dist.get_rank()]
        over_columns = recut_shards(shard, new, dist.group.WORLD, dim=1)
        over_rows = recut_shards(shard.t().contiguous(), new, dist.group.WORLD, dim=0)
        assert torch.equal(over_columns, over_rows.t())
        results.append((whole, over_columns))
    return results


def test_shards_are_cut_anew():
    ranks = run_distributed(recut_main, 3, 3)
    for i, (whole, shard) in enumerate(ranks[0]):
        ours = torch.cat([rank[i][1] for rank in ranks], 1)
        common = min(whole.size(1), ours.size(1))
        assert torch.equal(ours[:, :common], whole[:, :common])
        assert ours.size(1) == 3 * shard.size(1)
        assert ours[:, common:].eq(0).all()
