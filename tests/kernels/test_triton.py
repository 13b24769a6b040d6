"""The Triton kernels against the chunked implementation's own float64 tests: in the interpreter on CPU, and on CUDA."""

import pytest
import torch
import torch.distributed as dist
from support import divergence_cases, logprob_cases, topk_cases
from support.helpers import TOLERANCES, assert_close, run_distributed

from megatron_tropd import kernels
from megatron_tropd.kernels.full_divergence.op import KINDS

pytest.importorskip("triton", reason="the package triton is not installed")

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
if torch.cuda.is_available():  # the interpreter is a setting of the whole process
    DEVICES = DEVICES[1:]
TRITON = {"implementation": "triton"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", logprob_cases.CASES)
def test_logprobs_entropy_and_gradient_equal_float64(name, device):
    logits, ids, mask, temperature, upstream = logprob_cases.case(name)
    for dtype in logprob_cases.DTYPES:
        whole = logits.clamp(-6e4, 6e4).to(dtype)
        wanted = logprob_cases.reference(whole, ids, logprob_cases.VOCAB, temperature, mask, upstream)
        for inplace in (False, True):
            leaf = whole.to(device, copy=True).requires_grad_()
            options = {"temperature": temperature, "mask": mask.to(device), "inplace_backward": inplace, **TRITON}
            picked, entropy, largest = kernels.vocab_parallel_logprobs(
                leaf * 1,
                ids.to(device),
                None,
                logprob_cases.VOCAB,
                with_entropy=True,
                with_max_probability=True,
                **options,
            )
            picked.backward(upstream.to(device))
            probabilities = (whole.double()[:, : logprob_cases.VOCAB] / temperature).softmax(-1).amax(-1) * mask
            torch.testing.assert_close(picked.double().cpu(), wanted[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(entropy.double().cpu(), wanted[1], rtol=1e-5, atol=2e-5)
            torch.testing.assert_close(largest.double().cpu(), probabilities, rtol=1e-5, atol=1e-6)
            assert_close(leaf.grad.cpu(), wanted[2], dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_and_gradient_equal_float64(kind, device):
    for name in divergence_cases.CASES:
        student, teacher, mask, temperature, beta, upstream = divergence_cases.case(name)
        for dtype in divergence_cases.DTYPES:
            of_dtype = (student.to(dtype), teacher.to(dtype))
            leaf = of_dtype[0].to(device, copy=True).requires_grad_()
            options = {"beta": beta, "temperature": temperature, "mask": mask.to(device), **TRITON}
            loss = kernels.full_divergence(leaf, of_dtype[1].to(device), kind, None, divergence_cases.VOCAB, **options)
            loss.backward(upstream.to(device))
            wanted = divergence_cases.expected(
                *of_dtype, kind, divergence_cases.VOCAB, beta, temperature, mask, upstream
            )
            torch.testing.assert_close(loss.double().cpu(), wanted[0], rtol=1e-5, atol=1e-5)
            tolerance = TOLERANCES[dtype]
            torch.testing.assert_close(leaf.grad.double().cpu(), wanted[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_divergence(kind, device):
    logits = torch.randn(4, 3000, device=device) * 5
    assert kernels.full_divergence(logits, logits.clone(), kind, None, 3000, beta=0.3, **TRITON).abs().max() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_topk_ids_and_logprobs_equal_a_float64_sort(device):
    mask = torch.arange(topk_cases.ROWS) != 4
    for logits in topk_cases.cases().values():
        for dtype in (torch.float32, torch.bfloat16):
            for k in (1, 8, topk_cases.VOCAB):
                values, ids = kernels.vocab_parallel_topk(
                    logits.to(dtype).to(device),
                    k,
                    None,
                    topk_cases.VOCAB,
                    temperature=1.7,
                    mask=mask.to(device),
                    **TRITON,
                )
                wanted = topk_cases.expected(logits.to(dtype), k, 1.7, mask)
                assert torch.equal(ids.cpu(), wanted[1])
                torch.testing.assert_close(values.double().cpu(), wanted[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_longer_than_a_block_and_repeated_ids_in_plenty(device):
    generator = torch.Generator().manual_seed(0)
    rows, vocab, padded, count = 2, 9001, 9004, 70
    logits = 4 * torch.randn(rows, padded, generator=generator)
    ids = torch.randint(40, (rows, count), generator=generator)  # 70 of 40: repeated within and across blocks of ids
    upstream = torch.randn(rows, count, generator=generator)
    leaf = logits.to(device, copy=True).requires_grad_()
    picked, entropy = kernels.vocab_parallel_logprobs(leaf, ids.to(device), None, vocab, with_entropy=True, **TRITON)
    picked.backward(upstream.to(device))
    every_row = torch.ones(rows, dtype=torch.bool)
    wanted = logprob_cases.reference(logits, ids, vocab, 1.0, every_row, upstream)
    for ours, theirs in zip((picked.detach(), entropy, leaf.grad), wanted, strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=1e-5, atol=1e-5)
    values, found = kernels.vocab_parallel_topk(logits.to(device), 64, None, vocab, **TRITON)
    best = logits[:, :vocab].double().log_softmax(-1).topk(64)
    assert torch.equal(found.cpu(), best.indices)
    torch.testing.assert_close(values.double().cpu(), best.values, rtol=1e-5, atol=1e-5)
    teacher = 4 * torch.randn(rows, padded, generator=generator)
    for kind in KINDS:
        leaf = logits.to(device, copy=True).requires_grad_()
        loss = kernels.full_divergence(leaf, teacher.to(device), kind, None, vocab, beta=0.3, **TRITON)
        loss.sum().backward()
        ones = torch.ones(rows)
        wanted = divergence_cases.expected(logits, teacher, kind, vocab, 0.3, 1.0, every_row, ones)
        torch.testing.assert_close(loss.double().cpu(), wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(leaf.grad.double().cpu(), wanted[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_fused_linear_operations_take_the_triton_passes(device):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 8, generator=generator), torch.randn(40, 8, generator=generator)
    ids = torch.randint(37, (5, 3), generator=generator)
    results = []
    for implementation in ("triton", "chunked"):
        leaves = [t.clone().to(device, copy=True).requires_grad_() for t in (hidden, weight)]
        picked, _ = kernels.fused_linear_logprobs(*leaves, ids.to(device), None, 37, implementation=implementation)
        teacher = (hidden.to(device), weight.to(device) * 0.5)
        loss = kernels.fused_linear_full_divergence(*leaves, *teacher, "jsd", None, 37, implementation=implementation)
        (picked.sum() + loss.sum()).backward()
        results.append((picked.detach(), loss.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def rank_main(size):
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    logits, ids, mask, temperature, upstream = logprob_cases.case("masked")
    leaf = logits.chunk(size, 1)[rank].clone().requires_grad_()
    options = {"temperature": temperature, "mask": mask, **TRITON}
    picked, _ = kernels.vocab_parallel_logprobs(leaf, ids, group, logprob_cases.VOCAB, **options)
    picked.backward(upstream)
    shard = logits.chunk(size, 1)[rank].contiguous()
    found = kernels.vocab_parallel_topk(shard, 40, group, logprob_cases.VOCAB, **options)[1]
    student, teacher, mask, temperature, beta, upstream = divergence_cases.case("plain")
    other = student.chunk(size, 1)[rank].clone().requires_grad_()
    loss = kernels.full_divergence(
        other, teacher.chunk(size, 1)[rank].contiguous(), "jsd", group, divergence_cases.VOCAB, **TRITON
    )
    loss.backward(upstream)
    return picked.detach(), leaf.grad, found, loss.detach(), other.grad


def test_sharded_over_four_ranks_in_the_interpreter():
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without CUDA")
    ranks = run_distributed(rank_main, 4, 4)
    logits, ids, mask, temperature, upstream = logprob_cases.case("masked")
    wanted = logprob_cases.reference(logits, ids, logprob_cases.VOCAB, temperature, mask, upstream)
    torch.testing.assert_close(ranks[0][0].double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks], 1).double(), wanted[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(ranks[0][2], topk_cases.expected(logits, 40, temperature, mask)[1])
    student, teacher, mask, temperature, beta, upstream = divergence_cases.case("plain")
    wanted = divergence_cases.expected(
        student, teacher, "jsd", divergence_cases.VOCAB, beta, temperature, mask, upstream
    )
    torch.testing.assert_close(ranks[0][3].double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([r[4] for r in ranks], 1).double(), wanted[1], rtol=1e-5, atol=1e-5)


def test_triton_where_it_cannot_run_is_refused(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("Triton runs here")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="'triton' cannot run on cpu"):
        kernels.vocab_parallel_topk(torch.randn(2, 8), 2, None, 8, **TRITON)
