"""Mistakes found in other implementations, made here on purpose: the comparison that ours passes catches each one."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from support.helpers import run_distributed

from megatron_tropd.kernels import full_divergence, fused_linear_logprobs, linear, vocab_parallel_logprobs
from megatron_tropd.objective.forward_kl import topk_forward_kl

VOCAB, WIDTH, ROWS = 13, 8, 6  # two shards of eight columns, three of them padding at the end


def whole_logits():
    generator = torch.Generator().manual_seed(3)
    return [2 * torch.randn(ROWS, 2 * WIDTH, generator=generator) for _ in range(2)]


def assert_forward_kl_is_right(ranks, temperature=1.0):
    """Compare [(loss, gradient shard)] by rank with float64 autograd over the true vocabulary."""
    student, teacher = whole_logits()
    leaf = student.double().requires_grad_()
    log_p = (leaf[:, :VOCAB] / temperature).log_softmax(-1)
    log_q = (teacher.double()[:, :VOCAB] / temperature).log_softmax(-1)
    wanted = (log_q.exp() * (log_q - log_p)).sum(-1)
    wanted.sum().backward()
    gradient = torch.cat([g for _, g in ranks], 1)
    torch.testing.assert_close(ranks[0][0].double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-5, atol=1e-5)


def ours(student, teacher, group, temperature):
    return full_divergence(student, teacher, "forward_kl", group, VOCAB, temperature=temperature)


class _Sum(torch.autograd.Function):
    """All-reduce; backward all-reduces too (each rank uses the sum for its own part), or not (all compute the same)."""

    @staticmethod
    def forward(ctx, part, group, replicated):
        ctx.replicated = replicated
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        if not ctx.replicated:
            dist.all_reduce(total)
        return total, None, None


def sharded_forward_kl(student, teacher, group, temperature, of_partition, of_loss, inside=None):
    """Forward KL over shards in plain autograd; two sums over ranks: of the partition function and of the loss."""
    first = group.rank() * WIDTH
    inside = torch.arange(first, first + WIDTH) < VOCAB if inside is None else inside

    def log_softmax(z):
        z = torch.where(inside, z / temperature, -torch.inf)
        top = z.detach().amax(-1, keepdim=True)
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        return z - top - of_partition((z - top).exp().sum(-1, keepdim=True)).log()

    log_p, log_q = log_softmax(student).masked_fill(~inside, 0.0), log_softmax(teacher).detach()
    return of_loss(torch.where(inside, log_q.exp() * (log_q - log_p), 0.0).sum(-1))


def right_in_plain_autograd(student, teacher, group, temperature):
    sums = (lambda p: _Sum.apply(p, group, False), lambda p: _Sum.apply(p, group, True))
    return sharded_forward_kl(student, teacher, group, temperature, *sums)


def raw_inplace_all_reduce(student, teacher, group, temperature):
    """The collective writes behind autograd's back: the right value, but only the own rank's part of the gradient."""

    def raw(part):
        total = part.clone()
        dist.all_reduce(total.detach(), group=group)  # shares memory with `total`
        return total

    return sharded_forward_kl(student, teacher, group, temperature, raw, lambda p: _Sum.apply(p, group, True))


def multiplied_by_tp(student, teacher, group, temperature):
    """An autograd collective over a loss that every rank computes alike: its backward sums tp equal gradients."""
    sums = (lambda p: _Sum.apply(p, group, False), lambda p: _Sum.apply(p, group, False))
    return sharded_forward_kl(student, teacher, group, temperature, *sums)


def padded_per_shard(student, teacher, group, temperature):
    """Padding taken to be at the end of every shard instead of the end of the vocabulary: ids are misaligned."""
    sums = (lambda p: _Sum.apply(p, group, False), lambda p: _Sum.apply(p, group, True))
    inside = torch.arange(WIDTH) < -(-VOCAB // 2)
    return sharded_forward_kl(student, teacher, group, temperature, *sums, inside)


def student_alone_tempered(student, teacher, group, temperature):
    """The student's logits divided by the temperature, the teacher's not."""
    return full_divergence(student, teacher * temperature, "forward_kl", group, VOCAB, temperature=temperature)


def rank_main(implementation, temperature):
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    student, teacher = (t.chunk(2, 1)[rank].clone() for t in whole_logits())
    student.requires_grad_()
    loss = implementation(student, teacher, group, temperature)
    loss.sum().backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize("implementation", [ours, right_in_plain_autograd])
def test_ours_and_the_right_plain_one_pass_the_comparison(implementation):
    assert_forward_kl_is_right(run_distributed(rank_main, 2, implementation, 1.7), 1.7)


@pytest.mark.parametrize(
    "mistake", [raw_inplace_all_reduce, multiplied_by_tp, padded_per_shard, student_alone_tempered]
)
def test_the_comparison_catches(mistake):
    results = run_distributed(rank_main, 2, mistake, 1.7)
    with pytest.raises(AssertionError):
        assert_forward_kl_is_right(results, 1.7)


def negative_truncated_kl():
    """A student with more mass on the teacher's top-k than the teacher: the truncated KL is negative."""
    teacher = torch.tensor([[0.3, 0.2]]).log()
    return torch.tensor([[0.5, 0.4]]).log().requires_grad_(), teacher


def test_a_clamp_of_the_truncated_kl_would_lose_its_gradient():
    student, teacher = negative_truncated_kl()
    loss = topk_forward_kl(student, teacher, "truncated")
    loss.sum().backward()
    assert loss.item() < 0
    torch.testing.assert_close(student.grad, -teacher.exp())  # d/d log q of sum p (log p - log q)
    clamped, teacher = negative_truncated_kl()
    topk_forward_kl(clamped, teacher, "truncated").clamp_min(0).sum().backward()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(clamped.grad, -teacher.exp())


def kept_for_backward(compute):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = compute()
    return SimpleNamespace(elements=sum({t.data_ptr(): t.numel() for t in kept}.values()), result=result)


def test_chunks_in_a_loop_under_autograd_would_all_stay_alive(monkeypatch):
    tokens, vocab, width, rows = 64, 256, 4, 8
    monkeypatch.setitem(linear.LOGITS_ELEMENTS, "cpu", rows * vocab)
    hidden, weight = torch.randn(tokens, width).requires_grad_(), torch.randn(vocab, width).requires_grad_()
    ids = torch.zeros(tokens, 1, dtype=torch.int64)

    def looped():
        parts = zip(hidden.split(rows), ids.split(rows), strict=True)
        return torch.cat([(h @ weight.t()).log_softmax(-1).gather(-1, i) for h, i in parts])

    limit = tokens * vocab // 4
    assert kept_for_backward(lambda: fused_linear_logprobs(hidden, weight, ids, None, vocab)[0]).elements < limit
    assert kept_for_backward(looped).elements > limit
    logits = (hidden @ weight.t()).detach().requires_grad_()
    kept = kept_for_backward(lambda: vocab_parallel_logprobs(logits, ids, None, vocab)[0])
    assert kept.elements - logits.numel() < limit
