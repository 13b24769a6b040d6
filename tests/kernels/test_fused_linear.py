"""The fused linear operations against float64 autograd from hidden states and weights; memory and main_grad."""

import pytest
import torch
import torch.distributed as dist
from support.collectives import count_collectives
from support.divergence_cases import expected as expected_divergence
from support.helpers import TOLERANCES, run_distributed

from megatron_tropd.kernels import fused_linear_full_divergence, fused_linear_logprobs, linear
from megatron_tropd.kernels.full_divergence.op import KINDS

VOCAB, PADDED, ROWS, HIDDEN, TEACHER_HIDDEN = 61, 64, 11, 16, 24
DTYPES = (torch.float32, torch.bfloat16)


def material(dtype):
    """Hidden states and weights of student and teacher, ids, mask, upstream gradients; values that dtype holds."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight = normal(ROWS, HIDDEN), normal(PADDED, HIDDEN)
    teacher_hidden, teacher_weight = normal(ROWS, TEACHER_HIDDEN), normal(PADDED, TEACHER_HIDDEN)
    ids = torch.randint(VOCAB, (ROWS, 4), generator=generator)
    ids[:, 2] = ids[:, 0]
    mask = torch.arange(ROWS) % 4 != 1
    return hidden, weight, teacher_hidden, teacher_weight, ids, mask, normal(ROWS, 4), normal(ROWS)


def expected_logprobs(hidden, weight, ids, mask, upstream):
    hidden, weight = (t.double().requires_grad_() for t in (hidden, weight))
    logprobs = (hidden @ weight.t())[:, :VOCAB].div(1.3).log_softmax(-1).gather(-1, ids)
    logprobs = torch.where(mask[:, None], logprobs, 0.0)
    logprobs.backward(upstream.double())
    return logprobs.detach(), hidden.grad, weight.grad


def rank_main(size):
    """Each operation and dtype on this rank, with a chunk of three tokens and with one chunk for all."""
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    results = []
    for dtype in DTYPES:
        hidden, weight, teacher_hidden, teacher_weight, ids, mask, upstream, upstream_row = material(dtype)
        for chunk in (3, ROWS):
            linear.LOGITS_ELEMENTS["cpu"], linear.LEAST_TOKENS = chunk * PADDED // size, 1
            for kind in ("logprobs", *KINDS):
                leaf, shard = hidden.clone().requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()
                with count_collectives() as forward:
                    if kind == "logprobs":
                        output, entropy = fused_linear_logprobs(
                            leaf, shard, ids, group, VOCAB, temperature=1.3, mask=mask, with_entropy=True
                        )
                        assert not entropy.requires_grad
                    else:
                        teacher_shard = teacher_weight.chunk(size)[rank].clone()
                        teacher = (teacher_hidden, teacher_shard)
                        output = fused_linear_full_divergence(
                            leaf, shard, *teacher, kind, group, VOCAB, beta=0.2, temperature=1.3, mask=mask
                        )
                with count_collectives() as backward:
                    output.backward(upstream.float() if kind == "logprobs" else upstream_row.float())
                counts = (len(forward), len(backward))
                results.append((dtype, kind, output.detach(), leaf.grad, shard.grad, counts))
    return results


@pytest.mark.parametrize("size", [1, 2, 4])
def test_values_and_gradients_equal_float64_under_every_sharding(size):
    ranks = run_distributed(rank_main, size, size)
    for i, (dtype, kind, output, _, _, counts) in enumerate(ranks[0]):
        hidden, weight, teacher_hidden, teacher_weight, ids, mask, upstream, upstream_row = material(dtype)
        if kind == "logprobs":
            wanted, hidden_gradient, weight_gradient = expected_logprobs(hidden, weight, ids, mask, upstream)
        else:
            logits = hidden.double() @ weight.double().t()
            teacher = teacher_hidden.double() @ teacher_weight.double().t()
            wanted, gradient = expected_divergence(logits, teacher, kind, VOCAB, 0.2, 1.3, mask, upstream_row)
            hidden_gradient, weight_gradient = gradient @ weight.double(), gradient.t() @ hidden.double()
        ours = torch.stack([rank[i][3].double() for rank in ranks]).sum(0)  # Megatron's mapping sums the shards' parts
        scale = 1.0 if dtype == torch.float32 else 4.0  # bf16 logits carry the rounding of a product of 16 terms
        tolerance = scale * TOLERANCES[dtype]
        torch.testing.assert_close(output.double(), wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours, hidden_gradient, rtol=tolerance, atol=tolerance)
        whole = torch.cat([rank[i][4] for rank in ranks])
        torch.testing.assert_close(whole.double(), weight_gradient, rtol=tolerance, atol=tolerance)
        assert counts[0] <= (1 + (kind == "jsd") if size > 1 else 0)
        assert counts[1] == 0
        assert whole[VOCAB:].abs().max() == 0, "padding rows of the weight received a gradient"


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest number of elements that an operation returns, views of what was there included."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("kind", ["logprobs", "jsd"])
def test_no_more_than_a_chunk_of_logits_is_ever_held(kind, monkeypatch):
    tokens, vocab, width, rows = 64, 512, 8, 5
    monkeypatch.setitem(linear.LOGITS_ELEMENTS, "cpu", rows * vocab)
    hidden, weight = torch.randn(tokens, width).requires_grad_(), torch.randn(vocab, width).requires_grad_()
    with LargestTensor() as seen:
        if kind == "logprobs":
            loss = fused_linear_logprobs(hidden, weight, torch.zeros(tokens, 3, dtype=torch.int64), None, vocab)[0]
        else:
            loss = fused_linear_full_divergence(hidden, weight, hidden.detach(), weight.detach() * 2, kind, None, vocab)
        loss.sum().backward()
    assert seen.largest <= max(rows * vocab, vocab * width)


def test_the_weight_gradient_goes_into_megatrons_main_grad():
    hidden, weight, *_ = material(torch.bfloat16)
    ids = torch.zeros(ROWS, 1, dtype=torch.int64)
    plain = weight.float().requires_grad_()
    fused_linear_logprobs(hidden.float(), plain, ids, None, VOCAB)[0].sum().backward()
    weight = weight.clone().requires_grad_()
    weight.main_grad = torch.ones(PADDED, HIDDEN)
    weight.grad_added_to_main_grad = False
    fused_linear_logprobs(hidden, weight, ids, None, VOCAB)[0].sum().backward()
    assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad - 1, plain.grad, rtol=0.05, atol=0.05)


def test_of_a_weight_that_is_the_embeddings_too_autograd_sees_zeros():
    """Megatron adds what autograd sums up over both uses to main_grad: there must be no garbage in it."""
    hidden, weight, *_ = material(torch.float32)
    weight = weight.clone().requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = torch.zeros(PADDED, HIDDEN), False, True
    embedded = weight[5].sum()
    (embedded + fused_linear_logprobs(hidden, weight, torch.zeros(ROWS, 1).long(), None, VOCAB)[0].sum()).backward()
    assert torch.equal(weight.grad, torch.nn.functional.one_hot(torch.tensor(5), PADDED)[:, None].expand(-1, HIDDEN))
    assert weight.main_grad.abs().max() > 0


def test_sums_over_many_chunks_lose_nothing_in_bf16(monkeypatch):
    """1,024 equal tokens, one per chunk: a sum kept in bf16 stops growing at 256 times what is added."""
    monkeypatch.setitem(linear.LOGITS_ELEMENTS, "cpu", 16)
    hidden, weight = (
        torch.ones(1024, 1, dtype=torch.bfloat16),
        torch.zeros(16, 1, dtype=torch.bfloat16).requires_grad_(),
    )
    fused_linear_logprobs(hidden, weight, torch.zeros(1024, 1, dtype=torch.int64), None, 16)[0].sum().backward()
    assert weight.grad[0].item() == pytest.approx(1024 * 15 / 16, rel=4e-3)


def test_what_does_not_fit_is_refused():
    hidden, weight, ids = torch.randn(4, 8), torch.randn(16, 8), torch.zeros(4, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="of one dtype"):
        fused_linear_logprobs(hidden.bfloat16(), weight, ids, None, 16)
    with pytest.raises(ValueError, match="must share their leading dimensions"):
        fused_linear_logprobs(hidden, weight, ids[:3], None, 16)
    with pytest.raises(ValueError, match="leading dimensions of student, teacher and mask differ"):
        fused_linear_full_divergence(hidden, weight, hidden[:3], weight, "jsd", None, 16)
    with pytest.raises(ValueError, match="the teacher's hidden states"):
        fused_linear_full_divergence(hidden, weight, hidden, weight.t(), "jsd", None, 16)
    run_distributed(refusal_main, 2)


def refusal_main():
    dist.init_process_group("gloo")
    hidden, weight = torch.randn(4, 8), torch.randn(16, 8)
    with pytest.raises(ValueError, match="recut_shards"):
        fused_linear_full_divergence(hidden, weight, hidden, torch.randn(18, 8), "jsd", dist.group.WORLD, 32)


@pytest.mark.parametrize(
    ("version", "can"),
    [
        ("2.6.0", False),
        ("2.9.1+cu128", False),
        ("2.10.0", True),
        ("2.11.0+cu130", True),
        ("2.13.0a0+git1234", True),
        ("3.0.0", True),
    ],
)
def test_only_torch_from_2_10_adds_half_precision_products_to_fp32(version, can):
    assert linear.adds_products_in_fp32(version) is can


@pytest.mark.parametrize("version", ["2.6.0", "2.11.0"])
def test_the_weight_gradient_with_and_without_that_addmm(version, monkeypatch):
    """On a CPU both take the fallback; on CUDA the version decides."""
    runs = linear.adds_products_in_fp32(torch.__version__) or not linear.adds_products_in_fp32(version)
    device = "cuda" if torch.cuda.is_available() and runs else "cpu"
    monkeypatch.setattr(torch, "__version__", version)
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(12, 8, dtype=torch.bfloat16, device=device)
    total = linear.WeightGradient(weight, needed=True)
    wanted = torch.zeros(12, 8, dtype=torch.float64)
    for _ in range(3):
        gradient, hidden = (torch.randn(5, n, generator=generator).bfloat16() for n in (12, 8))
        total.add(gradient.to(device), hidden.to(device))
        wanted += gradient.double().t() @ hidden.double()
    assert total.total.dtype == torch.float32
    torch.testing.assert_close(total.total.double().cpu(), wanted, rtol=1e-2, atol=1e-2)
