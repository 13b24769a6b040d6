"""Histograms and quantiles against numpy, parts against the whole, and the gradient's shares against autograd."""

import math

import numpy as np
import pytest
import torch
from support.objective_cases import BETA, SEED, STEP, VOCAB, K, inputs, scores_of, variants

from megatron_tropd.config import GuidanceConfig
from megatron_tropd.methods import METHODS
from megatron_tropd.objective.objectives import build_objective
from megatron_tropd.objective.token_statistics import (
    QUANTILES,
    RHO_BINS,
    gradient_shares,
    logit_gradient,
    summarise,
    token_histograms,
)
from megatron_tropd.types import LOSS_GUIDANCE, LOSS_NONE, LOSS_STUDENT, TeacherScores


def tokens(count=3000):
    """Values [b, s] of many sizes, and which of them count."""
    generator = torch.Generator().manual_seed(3)
    advantage = torch.randn(10, count // 10, generator=generator) * 10 ** torch.randn(
        10, count // 10, generator=generator
    )
    mismatch = 1e-3 * advantage.abs() ** 1.5
    kept = torch.rand(10, count // 10, generator=generator) < 0.8
    return advantage.clamp(max=0).exp(), advantage, mismatch, kept


def histograms(rho, advantage, mismatch, kept):
    return token_histograms({"rho": (rho, kept), "advantage": (advantage, kept), "mismatch": (mismatch, kept)})


def lists(counts):
    return {name: histogram.tolist() for name, histogram in counts.items()}


def test_histograms_and_quantiles_are_those_of_the_tokens():
    rho, advantage, mismatch, kept = tokens()
    found = summarise(lists(histograms(rho, advantage, mismatch, kept)))
    expected, _ = np.histogram(rho[kept].numpy(), bins=RHO_BINS, range=(0, 1))
    assert found["rho_histogram"] == expected.tolist()
    for key, values in (("advantage", advantage[kept]), ("logprob_mismatch", mismatch[kept])):
        for label, share in QUANTILES.items():
            exact = np.quantile(values.numpy(), share)
            assert found[f"{key}_{label}"] == pytest.approx(exact, rel=0.22, abs=2e-3 if key == "advantage" else 1e-8)


def test_parts_add_up_to_the_whole_and_tokens_without_loss_change_nothing():
    values = tokens()
    whole = histograms(*values)
    parts = [histograms(*(value[rows] for value in values)) for rows in (slice(0, 3), slice(3, 10))]
    assert lists(whole) == {name: (parts[0][name] + parts[1][name]).tolist() for name in whole}
    *numbers, kept = values
    assert all(total == kept.sum() for total in (histogram.sum() for histogram in whole.values()))
    garbage = [torch.where(kept, value, math.nan) for value in numbers]
    assert lists(histograms(*garbage, kept)) == lists(whole)


def test_nan_is_no_large_number():
    kept = torch.ones(1, 3, dtype=torch.bool)
    values = torch.tensor([[0.5, math.nan, 0.5]])
    found = summarise(lists(histograms(values, values, values, kept)))
    assert sum(found["rho_histogram"]) == 2
    assert found["advantage_p99"] == pytest.approx(0.5, rel=0.22)


def test_extremes_lie_in_the_outer_bins_and_no_token_gives_nothing():
    big = torch.tensor([[-1e6, 1e6]])
    kept = torch.ones(1, 2, dtype=torch.bool)
    found = summarise(lists(histograms(torch.ones(1, 2), big, big.abs(), kept)))
    assert found["rho_histogram"] == [0] * (RHO_BINS - 1) + [2]
    assert (found["advantage_p01"], found["advantage_p99"]) == (pytest.approx(-100), pytest.approx(100))
    assert summarise(lists(histograms(torch.ones(1, 2), big, big, ~kept))) == {}
    assert summarise({}) == {}


def test_logit_gradient_by_hand():
    # q = (1/2, 1/4, 1/4); d loss / d log q = (1, -2, 0), C = -1: (1 + 1/2, -2 + 1/4, 1/4)
    norm = logit_gradient(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25]).log())
    assert norm.item() == pytest.approx(1.5 + 1.75 + 0.25)
    assert logit_gradient(torch.zeros(3, 2), torch.full((3, 2), -torch.inf)).tolist() == [0, 0, 0]
    shares = gradient_shares({"trusted": torch.tensor([1.0, 2.0]), "outlier": torch.tensor([1.0])})
    assert {name: (total / whole).item() for name, (total, whole) in shares.items()} == {
        "gradient_share_trusted": 0.75,
        "gradient_share_outlier": 0.25,
    }


SHARED = [v for v in variants() if not METHODS[v.name].divergence and v.gate != "soft"]  # each token is of one kind


@pytest.mark.parametrize("config", SHARED, ids=lambda c: "-".join(map(str, vars(c).values())))
def test_the_shares_are_those_of_the_gradient_in_the_logits(config):
    student, teacher, batch = inputs()
    scores = scores_of(teacher, batch)
    objective = build_objective(config, GuidanceConfig(beta=BETA), SEED)
    leaf = student[..., :VOCAB].clone().requires_grad_()
    logprobs = leaf.log_softmax(-1).transpose(0, 1).gather(-1, objective.ids(batch, scores))
    student_entropy = -(leaf.detach().softmax(-1) * leaf.detach().log_softmax(-1)).sum(-1).t()
    result = objective.loss(logprobs, objective.prepare(batch, scores, STEP, student_entropy), batch, STEP)
    result.loss.sum().backward()
    norms = leaf.grad.abs().sum(-1).t().double()  # [b, s]
    kinds = {"guidance": batch.loss_kind == LOSS_GUIDANCE}
    if objective.needs_teacher:
        is_student, trusted = batch.loss_kind == LOSS_STUDENT, result.details.gate.weight == 1
        kinds |= {"trusted": is_student & trusted, "outlier": is_student & ~trusted}
    assert norms[batch.loss_kind == LOSS_NONE].sum() == 0
    for kind, chosen in kinds.items():
        ours, total = result.metrics[f"gradient_share_{kind}"]
        assert ours.item() == pytest.approx(norms[chosen].sum().item(), rel=1e-4, abs=1e-5)
        assert total.item() == pytest.approx(norms.sum().item(), rel=1e-4)


def test_a_soft_gate_splits_a_tokens_gradient():
    config = next(v for v in variants() if v.gate == "soft" and v.outlier == "mask" and v.importance == "off")
    student, teacher, batch = inputs()
    log_s, log_t = (x[..., :VOCAB].log_softmax(-1).transpose(0, 1) for x in (student, teacher))
    scores = TeacherScores(log_t.gather(-1, batch.labels[..., None])[..., 0], *reversed(log_t.topk(K, -1)))
    sampled = log_s.gather(-1, batch.labels[..., None]).requires_grad_()
    metrics = build_objective(config, GuidanceConfig(beta=BETA), SEED).loss(sampled, scores, batch, STEP).metrics
    advantage = scores.logprobs - sampled.detach()[..., 0]
    weight = advantage.clamp(max=0).exp() * advantage.abs() * 2 * (1 - sampled.detach()[..., 0].exp())
    expected = weight[batch.loss_kind == LOSS_STUDENT].sum().item()
    assert metrics["gradient_share_trusted"][0].item() == pytest.approx(expected, rel=1e-4)
    assert metrics["gradient_share_outlier"][0].item() == 0
