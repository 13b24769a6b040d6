"""Every objective against its formula in float64: losses and logit gradients at TP=1, 2 and 4; cases by hand."""

import math

import pytest
import torch
import torch.distributed as dist
from support.helpers import run_distributed
from support.objective_cases import (
    ALPHA,
    BETA,
    CAP,
    CLIP,
    ENTROPY,
    EPS,
    LAMBDA,
    MIXTURE,
    SAMPLES,
    SEED,
    SHARE,
    STEP,
    TAU,
    VOCAB,
    B,
    K,
    S,
    inputs,
    variants,
)

from megatron_tropd.config import GuidanceConfig, ObjectiveConfig
from megatron_tropd.counter_rng import STREAM_GATE, counter_uniform
from megatron_tropd.kernels import full_divergence, vocab_parallel_logprobs, vocab_parallel_topk
from megatron_tropd.methods import METHODS
from megatron_tropd.objective.forward_kl import topk_forward_kl
from megatron_tropd.objective.objectives import build_objective
from megatron_tropd.objective.policy_gradient import response_advantages
from megatron_tropd.objective.selection import most_uncertain
from megatron_tropd.types import LOSS_GUIDANCE, LOSS_NONE, LOSS_STUDENT, TeacherScores, TrainingBatch, UserError


def expected(config: ObjectiveConfig, student, teacher, batch):
    """method.md in float64: loss [b, s] of whole logits [s, b, V], written apart from the code under test."""
    log_s = student[..., :VOCAB].log_softmax(-1).transpose(0, 1)
    log_t = teacher.double()[..., :VOCAB].log_softmax(-1).transpose(0, 1)
    x_s = log_s.gather(-1, batch.labels[..., None])[..., 0]
    x_t = log_t.gather(-1, batch.labels[..., None])[..., 0]
    method = METHODS[config.name]
    if method.data:
        return torch.where(batch.loss_kind == LOSS_GUIDANCE, -x_s, 0.0)
    if method.divergence:
        mixture = (config.beta * log_t.exp() + (1 - config.beta) * log_s.exp()).log()
        from_student, from_teacher = (
            (p.exp() * (p - q)).sum(-1)
            for p, q in (
                (log_s, mixture if method.divergence == "jsd" else log_t),
                (log_t, mixture if method.divergence == "jsd" else log_s),
            )
        )
        share = {"reverse_kl": 0.0, "forward_kl": 1.0, "jsd": config.beta}[method.divergence]
        return torch.where(batch.loss_kind != LOSS_NONE, share * from_teacher + (1 - share) * from_student, 0.0)
    rho = (x_t - x_s.detach()).exp().clamp(max=1.0)
    gate = config.gate or "bernoulli"
    if not method.gated:
        m = torch.zeros_like(rho) if config.name == "fkl_topk" else torch.ones_like(rho)
    elif gate == "bernoulli":
        m = (counter_uniform(SEED, STREAM_GATE, STEP, batch.sample_ids[:, None], batch.position_ids + 1) < rho).double()
    elif gate == "threshold":
        m = (rho >= TAU).double()
    else:
        m = rho
    ratio = (x_s.detach() - batch.old_logprobs.double()).exp()
    weight = {
        "off": torch.ones_like(ratio),
        "tis": ratio.clamp(max=CAP),
        "icepop": torch.where((ratio <= CAP) & (ratio >= 1 / CAP), ratio, 0.0),
    }[config.importance]
    k1 = -weight * (x_t - x_s.detach()) * x_s
    outlier = method.outlier or config.outlier or "fkl"
    top_t, ids = log_t.topk(K, -1)
    top_s = log_s.gather(-1, ids)
    if config.tail == "renormalized":
        top_t, top_s = top_t.log_softmax(-1), top_s.log_softmax(-1)
    kl = (top_t.exp() * (top_t - top_s)).sum(-1)
    if config.tail == "tail":
        rest_t, rest_s = 1 - top_t.exp().sum(-1), 1 - top_s.exp().sum(-1)
        kl = kl + rest_t * (rest_t.log() - rest_s.log())
    if config.name == "eopd":
        r, a = (x_s - batch.old_logprobs.double()).exp(), x_t - x_s.detach()
        k1 = -torch.minimum(r * a, r.clamp(1 - EPS, 1 + EPS) * a)
        entropy = -(log_t.exp() * log_t).sum(-1)
        k1 = k1 + LAMBDA * (entropy > ENTROPY).double() * kl
    if config.name == "topd":
        r = (x_s - batch.old_logprobs.double()).exp()
        a = returns_by_hand(x_t.detach(), batch)
        k1 = -torch.minimum(r * a, r.clamp(1 - EPS, 1 + EPS) * a)
    if config.name in ("entropy_opd", "reopold"):
        floor = math.log(MIXTURE / (1 - MIXTURE)) if config.name == "reopold" else -math.inf
        weight = weight * selected_by_hand(config, log_s.detach(), x_t, batch)
        k1 = -weight * (x_t - x_s.detach()).clamp(min=floor) * x_s
    outside = {
        "fkl": kl,
        "mask": torch.zeros_like(kl),
        "clip": -weight * (x_t - x_s.detach()).clamp(min=CLIP) * x_s,
        "fkl_advantage": weight * kl.detach() * x_s,
    }[outlier]
    loss = torch.where(batch.loss_kind == LOSS_STUDENT, m * k1 + (1 - m) * outside, 0.0)
    return loss + torch.where(batch.loss_kind == LOSS_GUIDANCE, -BETA * x_s, 0.0)


def selected_by_hand(config, log_s, x_t, batch):
    """Which tokens there is a loss on, and how much each of them weighs, in Python, token by token"""
    places = [(row, t) for row in range(B) for t in range(S) if batch.loss_kind[row, t] == LOSS_STUDENT]
    by_entropy = sorted(places, key=lambda place: (log_s[place].exp() * log_s[place]).sum().item())
    is_exploring = config.name == "reopold" and (config.exploration_steps or 0) > STEP
    mask = "entropy" if config.name == "entropy_opd" or not is_exploring else "reward"
    mask = config.refinement_mask if config.refinement_mask != "entropy" else mask
    rewards = x_t - batch.old_logprobs.double()
    rewarded = [place for place in places if rewards[place].exp().item() >= MIXTURE / (1 - MIXTURE)]
    chosen = {"entropy": by_entropy[: math.ceil(SHARE * len(places))], "reward": rewarded, "none": places}[mask]
    weights = torch.zeros_like(x_t)
    for place in chosen:
        weights[place] = len(places) / len(chosen)
    return weights


def returns_by_hand(x_t, batch):
    """TOP-D's advantages in Python, token by token; the batch's samples 5 and 77 are of one prompt"""
    returns = torch.zeros_like(x_t)
    own = [[t for t in range(S) if batch.loss_kind[row, t] == LOSS_STUDENT] for row in range(B)]
    reward = (ALPHA * (x_t - batch.old_logprobs.double()).exp() + 1 - ALPHA).log()
    for row, places in enumerate(own):
        for i, t in enumerate(places):
            later = [reward[row, u].item() for u in places[i + 1 :]]
            returns[row, t] = reward[row, t] + (sum(later) / len(later) if later else 0.0)
    for rows in ((0, 2), (1,)):
        values = torch.tensor([returns[row, t] for row in rows for t in own[row]], dtype=torch.float64)
        for row in rows:
            returns[row, own[row]] = (returns[row, own[row]] - values.mean()) / values.std(correction=0)
    return returns


def sharded_losses(size: int):
    """Every variant over this rank's logits shard: [(loss [b, s], gradient [s, b, V/tp])]."""
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    student, teacher, batch = inputs()
    mask = (batch.loss_kind != LOSS_NONE).t()
    s_shard, t_shard = (x.chunk(size, -1)[rank].contiguous() for x in (student, teacher))
    ids = batch.labels.t()[..., None]
    _, student_entropy = vocab_parallel_logprobs(s_shard, ids, group, VOCAB, with_entropy=True, mask=mask)
    results = []
    for config in variants():
        objective = build_objective(config, GuidanceConfig(beta=BETA), SEED, SAMPLES)
        sampled, entropy = vocab_parallel_logprobs(
            t_shard, batch.labels.t()[..., None], group, VOCAB, with_entropy=True, mask=mask
        )
        values, ids = vocab_parallel_topk(t_shard, K, group, VOCAB, mask=mask)
        scores = TeacherScores(sampled[..., 0].t(), ids.transpose(0, 1), values.transpose(0, 1), entropy.t())
        scores = objective.prepare(batch, scores, STEP, student_entropy.t())
        leaf = student.chunk(size, -1)[rank].clone().requires_grad_()
        looked_up = objective.ids(batch, scores).transpose(0, 1)
        logprobs, _ = vocab_parallel_logprobs(leaf, looked_up, group, VOCAB, mask=mask)
        divergence = None
        if objective.divergence:
            divergence = full_divergence(leaf, t_shard, objective.divergence, group, VOCAB, beta=config.beta, mask=mask)
            divergence = divergence.t()
        result = objective.loss(logprobs.transpose(0, 1), scores, batch, STEP, divergence=divergence)
        result.loss.sum().backward()
        results.append((result.loss.detach(), leaf.grad))
    return results


@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_and_logit_gradients_of_every_variant_equal_float64_autograd(size):
    ranks = run_distributed(sharded_losses, size, size)
    student, teacher, batch = inputs()
    for i, config in enumerate(variants()):
        whole = student.double().requires_grad_()
        loss = expected(config, whole, teacher, batch)
        loss.sum().backward()
        gradient = torch.cat([rank[i][1] for rank in ranks], dim=-1)
        kept = batch.loss_kind != LOSS_NONE
        for ours, theirs in ((ranks[0][i][0][kept], loss.detach()[kept]), (gradient, whole.grad)):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5, msg=lambda m, c=config: f"{c}\n{m}")
        assert ranks[0][i][0][~kept].abs().max() == 0


def one_token(student: float, teacher: float, kind: int = LOSS_STUDENT, **scores):
    """A batch of one token with given log-probs; returns (log-probs leaf [1, 1, 1], scores, batch)."""
    batch = TrainingBatch(
        *(torch.zeros(1, 1, dtype=torch.int64) for _ in range(3)),
        torch.tensor([[kind]], dtype=torch.int8),
        torch.tensor([[student]]),
        torch.tensor([0]),
    )
    empty = torch.zeros(1, 1, 0)
    found = TeacherScores(torch.tensor([[teacher]]), empty.long(), empty, torch.zeros(1, 1))
    return torch.tensor([[[student]]], requires_grad=True), found, batch


def test_the_loss_of_a_trusted_token_by_hand():
    logprobs, scores, batch = one_token(student=-2.0, teacher=-1.5)  # rho = 1, A = 0.5
    result = build_objective(ObjectiveConfig(name="opd"), GuidanceConfig(), 0).loss(logprobs, scores, batch, 0)
    assert result.loss.item() == pytest.approx(1.0)  # -A log pi_S
    result.loss.sum().backward()
    assert logprobs.grad.item() == pytest.approx(-0.5)  # -A
    assert result.metrics["mean_rho"][0].item() == pytest.approx(1.0)
    assert result.metrics["advantage"][0].item() == pytest.approx(0.5)


def test_the_loss_of_a_clipped_outlier_by_hand():
    logprobs, scores, batch = one_token(student=-1.0, teacher=-9.0)  # rho = e^-8, A = -8, clipped to -2
    config = ObjectiveConfig(name="clip_outlier", gate="threshold", clip=-2.0)
    result = build_objective(config, GuidanceConfig(), 0).loss(logprobs, scores, batch, 0)
    assert result.loss.item() == pytest.approx(-2.0)
    result.loss.sum().backward()
    assert logprobs.grad.item() == pytest.approx(2.0)
    assert result.metrics["outlier_fraction"][0].item() == 1


def _two_listed(student: list[float], teacher: list[float], entropy: float):
    """A token that is the first of the two that the teacher lists; both models' log-probs of the two."""
    _, scores, batch = one_token(student=student[0], teacher=teacher[0])
    ids, listed = torch.tensor([[[0, 1]]]), torch.tensor([[teacher]])
    scores = TeacherScores(scores.logprobs, ids, listed, torch.tensor([[entropy]]))
    return torch.tensor([[[student[0], *student]]], requires_grad=True), scores, batch


def test_the_forward_kl_on_every_token_by_hand():
    student, teacher = [math.log(0.5), math.log(0.4)], [math.log(0.3), math.log(0.6)]
    logprobs, scores, batch = _two_listed(student, teacher, entropy=0.1)
    result = build_objective(ObjectiveConfig(name="fkl_topk"), GuidanceConfig(), 0).loss(logprobs, scores, batch, 0)
    assert result.loss.item() == pytest.approx(0.3 * math.log(0.6) + 0.6 * math.log(1.5))
    result.loss.sum().backward()
    assert logprobs.grad.flatten().tolist() == pytest.approx([0.0, -0.3, -0.6])
    assert result.metrics["outlier_fraction"][0].item() == 1


@pytest.mark.parametrize(
    ("old", "policy", "gradient"),
    [  # A = log 0.6 - log 0.5 > 0; r = 0.5 / old
        (0.5, -math.log(1.2), -math.log(1.2)),  # r = 1: -A, and the gradient of r is r
        (0.25, -1.2 * math.log(1.2), 0.0),  # r = 2 is clipped at 1.2
        (0.625, -0.8 * math.log(1.2), -0.8 * math.log(1.2)),  # r = 0.8: the bound itself
    ],
)
@pytest.mark.parametrize("entropy", [0.7, 0.9])
def test_entropy_aware_distillation_by_hand(old, policy, gradient, entropy):
    student, teacher = [math.log(0.5), math.log(0.4)], [math.log(0.6), math.log(0.3)]
    logprobs, scores, batch = _two_listed(student, teacher, entropy)
    batch.old_logprobs[:] = math.log(old)
    result = build_objective(ObjectiveConfig(name="eopd"), GuidanceConfig(), 0).loss(logprobs, scores, batch, 0)
    kl = 0.6 * math.log(1.2) + 0.3 * math.log(0.75) if entropy > 0.8 else 0.0
    assert result.loss.item() == pytest.approx(policy + kl, abs=1e-6)
    result.loss.sum().backward()
    listed = [-0.6, -0.3] if entropy > 0.8 else [0.0, 0.0]
    assert logprobs.grad.flatten().tolist() == pytest.approx([gradient, *listed], abs=1e-6)


LOG_A, KL = math.log(0.3) - math.log(0.5), 0.3 * math.log(0.6) + 0.6 * math.log(1.5)
RENORMALIZED = math.log(3 / 5) / 3 + 2 * math.log(3 / 2) / 3  # of 1/3, 2/3 to 5/9, 4/9


@pytest.mark.parametrize(
    ("options", "old", "loss", "gradient"),
    [  # pi_S = 0.5, 0.4 and pi_T = 0.3, 0.6 at the two listed tokens; the first is sampled: rho = 0.6
        ({"gate": "soft"}, 0.5, -0.6 * LOG_A * math.log(0.5) + 0.4 * KL, [-0.6 * LOG_A, -0.12, -0.24]),
        ({"gate": "threshold", "gate_threshold": 0.7}, 0.5, KL, [0.0, -0.3, -0.6]),
        ({"gate": "threshold", "gate_threshold": 0.6}, 0.5, -LOG_A * math.log(0.5), [-LOG_A, 0.0, 0.0]),
        ({"outlier": "fkl_advantage"}, 0.5, KL * math.log(0.5), [KL, 0.0, 0.0]),
        ({"outlier": "fkl_advantage"}, 0.2, 2 * KL * math.log(0.5), [2 * KL, 0.0, 0.0]),  # r = 2.5, capped at 2
        ({"tail": "renormalized"}, 0.5, RENORMALIZED, [0.0, 5 / 9 - 1 / 3, 4 / 9 - 2 / 3]),
        ({"tail": "tail"}, 0.5, KL, [0.0, 0.2, -0.2]),  # both leave 0.1 to the rest: - p + 0.1 pi_S / 0.1
        ({"name": "opd"}, 0.2, -2 * LOG_A * math.log(0.5), [-2 * LOG_A, 0.0, 0.0]),
        ({"name": "opd", "importance": "off"}, 0.2, -LOG_A * math.log(0.5), [-LOG_A, 0.0, 0.0]),
        ({"name": "opd", "importance": "icepop"}, 0.2, 0.0, [0.0, 0.0, 0.0]),
        ({"name": "opd", "importance": "icepop"}, 0.4, -1.25 * LOG_A * math.log(0.5), [-1.25 * LOG_A, 0.0, 0.0]),
    ],
    ids=str,
)
def test_gates_tails_and_importance_by_hand(options, old, loss, gradient):
    student, teacher = [math.log(0.5), math.log(0.4)], [math.log(0.3), math.log(0.6)]
    logprobs, scores, batch = _two_listed(student, teacher, entropy=0.1)
    batch.old_logprobs[:] = math.log(old)
    if options.get("name") != "opd":
        options = {"name": "fkl_outlier", "gate": "threshold", "gate_threshold": 0.7, **options}
    if "outlier" in options:
        options |= {"name": "tropd"}
    found = build_objective(ObjectiveConfig(**options), GuidanceConfig(), 0).loss(logprobs, scores, batch, 0)
    assert found.loss.item() == pytest.approx(loss, abs=1e-6)
    found.loss.sum().backward()
    listed = logprobs.grad.flatten().tolist()
    assert [*listed, *[0.0] * (3 - len(listed))] == pytest.approx(gradient, abs=1e-6)


def test_returns_of_two_responses_by_hand():
    """Rewards 0 and log 1.5 in the first response, log 0.5 in the second; alpha = 0.5."""
    ratios = torch.tensor([[1.0, 2.0], [0.0, 1.0]])  # 0: the teacher rules the token out
    kept = torch.tensor([[True, True], [True, False]])
    old = torch.zeros(2, 2)
    a, b, c = 0.0 + math.log(1.5), math.log(1.5), math.log(0.5)
    mean = (a + b + c) / 3
    deviation = math.sqrt(((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 3)
    found = response_advantages(old, ratios.log(), kept, torch.tensor([7, 7]), alpha=0.5)
    expected = [(a - mean) / deviation, (b - mean) / deviation, (c - mean) / deviation, 0.0]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    alone = response_advantages(old, ratios.log(), kept, torch.tensor([7, 8]), alpha=0.5)
    assert alone.abs().max() == 0  # equal returns, and a single token: none is better


@pytest.mark.parametrize(
    ("options", "step", "losses"),
    [  # rewards log 0.5, log 2, log 0.1, of which lambda = 0.2 floors the last at log 0.25; log pi_S = -1, -2, -3
        ({"name": "entropy_opd", "entropy_share": 0.5}, 0, [1.5 * math.log(0.5), 3.0 * math.log(2), 0.0]),
        ({"name": "entropy_opd", "entropy_share": 0.2}, 0, [3 * math.log(0.5), 0.0, 0.0]),
        ({"name": "reopold"}, 1, [1.5 * math.log(0.5), 3.0 * math.log(2), 0.0]),
        ({"name": "reopold"}, 2, [3 * math.log(0.5), 0.0, 0.0]),
        ({"name": "reopold", "entropy_share": 1.0}, 2, [math.log(0.5), 2 * math.log(2), 3 * math.log(0.25)]),
        ({"name": "reopold", "exploration_mask": "none"}, 1, [math.log(0.5), 2 * math.log(2), 3 * math.log(0.25)]),
        ({"name": "reopold", "exploration_steps": 1}, 1, [3 * math.log(0.5), 0.0, 0.0]),
        ({"name": "reopold", "exploration_mask": "none", "mixture": 0.5}, 0, [0.0, 2 * math.log(2), 0.0]),
    ],
)
def test_the_loss_of_selected_tokens_by_hand(options, step, losses):
    """Three tokens in a training of four steps, so that reopold refines from step 2 on"""
    student = torch.tensor([[-1.0, -2.0, -3.0]])
    batch = TrainingBatch(
        *(torch.zeros(1, 3, dtype=torch.int64) for _ in range(3)),
        torch.full((1, 3), LOSS_STUDENT, dtype=torch.int8),
        student.clone(),
        torch.tensor([0]),
    )
    empty = torch.zeros(1, 3, 0)
    rewards = torch.tensor([[0.5, 2.0, 0.1]]).log()
    scores = TeacherScores(student + rewards, empty.long(), empty, torch.zeros(1, 3))
    objective = build_objective(ObjectiveConfig(**options), GuidanceConfig(), 0, steps=4)
    scores = objective.prepare(batch, scores, step, torch.tensor([[3.0, 2.0, 1.0]]))
    leaf = student.unsqueeze(-1).requires_grad_()
    result = objective.loss(leaf, scores, batch, step)
    assert result.loss[0].tolist() == pytest.approx(losses, abs=1e-6)
    result.loss.sum().backward()
    gradient = [loss / s for loss, s in zip(losses, student[0].tolist(), strict=True)]
    assert leaf.grad.flatten().tolist() == pytest.approx(gradient, abs=1e-6)
    if "selected_fraction" in result.metrics:
        share, count = result.metrics["selected_fraction"]
        assert (share.item(), count.item()) == (sum(w > 0 for w in scores.weights[0].tolist()), 3)
    assert result.metrics["reverse_kl"][0].item() == pytest.approx(-math.log(0.1), abs=1e-6)  # of all tokens


def test_how_many_tokens_a_method_lists_by_default():
    built = {name: build_objective(ObjectiveConfig(name=name), GuidanceConfig(), 0).topk for name in METHODS}
    assert (built["tropd"], built["fkl_topk"], built["eopd"], built["opd"]) == (64, 64, 16, 0)
    assert build_objective(ObjectiveConfig(name="eopd", topk=5), GuidanceConfig(), 0).topk == 5


def test_a_prefix_token_costs_beta_times_its_surprise():
    logprobs, scores, batch = one_token(student=-3.0, teacher=-0.1, kind=LOSS_GUIDANCE)
    result = build_objective(ObjectiveConfig(), GuidanceConfig(beta=0.01), 0).loss(
        torch.cat([logprobs, torch.zeros(1, 1, 0)], -1), scores, batch, 0
    )
    assert result.loss.item() == pytest.approx(0.03)


def test_a_negative_truncated_divergence_keeps_its_gradient():
    student = torch.tensor([math.log(0.5), math.log(0.4)], requires_grad=True)
    teacher = torch.tensor([math.log(0.3), math.log(0.2)])
    kl = topk_forward_kl(student, teacher, "truncated")
    assert kl.item() == pytest.approx(0.3 * math.log(0.6) + 0.2 * math.log(0.5))
    assert kl.item() < 0
    kl.backward()
    assert student.grad.tolist() == pytest.approx([-0.3, -0.2])


def test_the_tail_bucket_makes_the_divergence_exact_and_never_negative():
    generator = torch.Generator().manual_seed(0)
    log_t, log_s = (torch.randn(200, 20, generator=generator).mul(3).log_softmax(-1) for _ in range(2))
    assert (topk_forward_kl(log_s[:, :5], log_t[:, :5], "tail") >= 0).all()
    whole = topk_forward_kl(log_s, log_t, "tail")  # nothing is left for the tail
    exact = (log_t.exp() * (log_t - log_s)).sum(-1)
    torch.testing.assert_close(whole, exact, rtol=1e-4, atol=1e-4)
    assert topk_forward_kl(log_t[:, :5], log_t[:, :5], "tail").abs().max() < 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_without_loss_tokens_gives_zero_and_a_finite_gradient(name):
    _, teacher, batch = inputs()
    batch.loss_kind.zero_()
    objective = build_objective(ObjectiveConfig(name=name, topk=K), GuidanceConfig(), SEED)
    garbage = torch.full((B, S, K), -torch.inf)
    scores = TeacherScores(torch.full((B, S), -torch.inf), torch.zeros(B, S, K, dtype=torch.int64), garbage)
    scores.entropy = torch.full((B, S), torch.nan)
    leaf = torch.zeros(B, S, 1 + objective.topk, requires_grad=True)
    divergence = torch.where(batch.loss_kind == LOSS_NONE, leaf.sum(-1) * 0.0, torch.nan)
    prepared = objective.prepare(batch, scores, STEP, scores.entropy)
    result = objective.loss(leaf, prepared, batch, STEP, divergence=divergence)
    result.loss.sum().backward()
    assert result.loss.abs().max() == 0
    assert torch.isfinite(leaf.grad).all()
    assert leaf.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "trop"}, "unknown; choose one of tropd"),
        ({"name": "opd", "gate": "soft"}, "has no trust region"),
        ({"name": "jsd", "beta": 1.0}, r"objective.beta=1.0 makes no mixture .*fkl_full and rkl_full"),
        ({"name": "tropd_mask", "outlier": "clip"}, "fixes objective.outlier=mask"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_objective(ObjectiveConfig(**options), GuidanceConfig(), 0)


def test_the_smallest_share_selects_the_most_uncertain_token():
    entropy, kept = torch.tensor([[1.0, 3.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]])
    assert most_uncertain(entropy, kept, 1e-7).tolist() == [[False, True, False, False]]
    assert not most_uncertain(entropy, torch.zeros_like(kept), 0.5).any()
