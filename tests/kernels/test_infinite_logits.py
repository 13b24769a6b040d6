"""Logits of -inf (tokens that a model rules out): log-probs, top-k and divergences of every implementation."""

import math

import pytest
import torch

from megatron_tropd.config import GuidanceConfig, ObjectiveConfig
from megatron_tropd.kernels import full_divergence, vocab_parallel_logprobs, vocab_parallel_topk
from megatron_tropd.objective.objectives import build_objective
from megatron_tropd.types import LOSS_STUDENT, TeacherScores, TrainingBatch

NONE = -math.inf
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits_with_infinities():
    """[n, 8] of student and teacher, with -inf in one, in both, and rows that are one-hot."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 8, generator=generator) for _ in range(2))
    teacher[0, 3:] = student[1, :2] = NONE
    student[2, 5:] = teacher[2, 5:] = NONE
    teacher[3, 1:] = student[4, 1:] = NONE
    return student.to(DEVICE), teacher.to(DEVICE)


@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
def test_field_cases_a22_kernels_read_infinite_logits(implementation):
    logits, teacher = logits_with_infinities()
    ids = torch.arange(8, device=DEVICE).expand(5, 8).contiguous()
    leaf = logits.clone().requires_grad_()
    options = {"implementation": implementation, "temperature": 1.7}
    logprobs, entropy = vocab_parallel_logprobs(leaf, ids, None, 8, with_entropy=True, **options)
    exact = (logits.double() / 1.7).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), torch.special.entr(exact.exp()).sum(-1), rtol=1e-5, atol=1e-5)
    values, _ = vocab_parallel_topk(teacher, 8, None, 8, **options)
    expected = (teacher.double() / 1.7).log_softmax(-1).sort(-1, descending=True).values
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    kinds = torch.full((1, 5), LOSS_STUDENT, dtype=torch.int8, device=DEVICE)
    batch = TrainingBatch(*(ids[:1, :5],) * 3, kinds, logprobs[None, :, 0].detach(), ids[0, :1])
    scores = TeacherScores(teacher.log_softmax(-1)[None, :, 0], ids[None], teacher.log_softmax(-1)[None])
    objective = build_objective(ObjectiveConfig(name="fkl_outlier", topk=8), GuidanceConfig(), 0)
    whole = torch.cat([logprobs[:, :1], logprobs], -1)[None]
    objective.loss(whole, scores, batch, 0).loss.sum().backward()
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("implementation", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_field_cases_a22_full_divergences_of_infinite_logits_are_no_nan(kind, implementation):
    student, teacher = logits_with_infinities()
    leaf = student.clone().requires_grad_()
    found = full_divergence(leaf, teacher, kind, None, 8, beta=0.3, implementation=implementation)
    found.sum().backward()
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    mixture = 0.3 * p + 0.7 * q
    sides = {"forward_kl": [(1, p, q)], "reverse_kl": [(1, q, p)], "jsd": [(0.3, p, mixture), (0.7, q, mixture)]}[kind]
    exact = sum(w * torch.where(a > 0, a * (a / b).log(), 0.0).sum(-1) for w, a, b in sides)
    finite = torch.isfinite(exact)
    assert finite.any()
    torch.testing.assert_close(found[finite].double(), exact[finite], rtol=1e-5, atol=1e-5)
    assert (found[~finite] > 1e20).all()  # infinite, or so large that it is taken for it
    assert torch.isfinite(leaf.grad[finite]).all()
    if kind == "forward_kl":
        torch.testing.assert_close(leaf.grad.double(), q - p, rtol=1e-5, atol=1e-5)
