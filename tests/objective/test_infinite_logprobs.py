"""Log-probs of -inf, of a teacher that rules tokens out or lists a few: every method against float64 by hand."""

import math

import pytest
import torch
from support.objective_cases import BETA, CAP, CLIP, SEED, STEP, K, variants

from megatron_tropd.config import GuidanceConfig, ObjectiveConfig
from megatron_tropd.counter_rng import STREAM_GATE, counter_uniform
from megatron_tropd.methods import METHODS
from megatron_tropd.objective.divergence import Divergence
from megatron_tropd.objective.forward_kl import topk_forward_kl
from megatron_tropd.objective.objectives import build_objective
from megatron_tropd.objective.token_statistics import summarise
from megatron_tropd.objective.trust_region import GATES, trust_gate
from megatron_tropd.tokenizers.end_of_text import EndOfText
from megatron_tropd.types import LOSS_GUIDANCE, LOSS_STUDENT, TeacherScores, TrainingBatch

NONE, FLOOR = -math.inf, -1e4
SOME = [-0.9, -1.1, -2.0, -3.0, -4.0, -5.0]
PART = [-0.7, -0.8, *[NONE] * (K - 2)]
ONE = [0.0, *[NONE] * (K - 1)]
NOTHING = [NONE] * K
# name -> kind, log-probs of student, teacher and rollout at the token, of student and teacher at the teacher's top-k
TOKENS = {
    "ordinary": (LOSS_STUDENT, -1.5, -1.2, -1.4, SOME, SOME[::-1]),
    "ordinary outlier": (LOSS_STUDENT, -0.5, -3.2, -0.6, SOME[::-1], SOME),
    "ruled out by the teacher": (LOSS_STUDENT, -1.5, NONE, -1.4, SOME, SOME),
    "without a probability of the student": (LOSS_STUDENT, NONE, -1.5, -1.4, SOME, SOME),
    "without any": (LOSS_STUDENT, NONE, NONE, -1.4, SOME, SOME),
    "that the rollout never draws": (LOSS_STUDENT, -1.5, -1.0, NONE, SOME, SOME),
    "that nobody draws": (LOSS_STUDENT, NONE, NONE, NONE, SOME, SOME),
    "whose importance overflows": (LOSS_STUDENT, -1.5, NONE, -500.0, SOME, SOME),
    "whose rho underflows": (LOSS_STUDENT, -0.1, -900.0, -0.1, SOME, SOME),
    "of a short list": (LOSS_STUDENT, -1.5, NONE, -1.4, SOME, PART),
    "of an empty list": (LOSS_STUDENT, -1.5, NONE, -1.4, SOME, NOTHING),
    "of two empty lists": (LOSS_STUDENT, -1.5, NONE, -1.4, NOTHING, NOTHING),
    "where the student lacks the list": (LOSS_STUDENT, -1.5, NONE, -1.4, NOTHING, SOME),
    "where the student lacks a part": (LOSS_STUDENT, -1.5, NONE, -1.4, PART, SOME),
    "of a sure teacher": (LOSS_STUDENT, -1.5, NONE, -1.4, SOME, ONE),
    "of a sure student": (LOSS_STUDENT, 0.0, NONE, 0.0, ONE, SOME),
    "of two that are sure": (LOSS_STUDENT, 0.0, 0.0, 0.0, ONE, ONE),
    "of a prefix": (LOSS_GUIDANCE, -1.5, NONE, 0.0, SOME, SOME),
    "of a prefix, impossible": (LOSS_GUIDANCE, NONE, NONE, 0.0, SOME, SOME),
}

ENTROPIES = torch.arange(len(TOKENS))[None] % 4.0  # of the student; tokens of all kinds are among the highest


def batch_of_all():
    kinds, student, teacher, old, student_topk, teacher_topk = zip(*TOKENS.values(), strict=True)
    places = torch.arange(len(kinds))[None]
    batch = TrainingBatch(
        places,
        places,
        places,
        torch.tensor([kinds], dtype=torch.int8),
        torch.tensor([old]),
        torch.tensor([5]),
    )
    ids = torch.zeros(1, len(kinds), K, dtype=torch.int64)
    scores = TeacherScores(torch.tensor([teacher]), ids, torch.tensor([teacher_topk]))
    scores.entropy = torch.full((1, len(kinds)), 3.0)  # above the threshold of every variant
    logprobs = torch.cat([torch.tensor([student])[..., None], torch.tensor([student_topk])], -1)
    return logprobs, scores, batch


def by_hand(config: ObjectiveConfig, place: int, token: tuple, given: float) -> tuple[float, list[float]]:
    """Loss of one token and its gradient to the 1 + k log-probs, in Python's float64 and without one infinity.

    `given`: the advantage of an objective over whole responses, or the weight of one on selected tokens.
    """
    kind, student, teacher, old, student_topk, teacher_topk = token
    nothing = [0.0] * (1 + K)
    method = METHODS[config.name]
    if method.data or kind == LOSS_GUIDANCE:
        beta = 1.0 if method.data else BETA
        if kind != LOSS_GUIDANCE:
            return 0.0, nothing
        return (-beta * student, [-beta] + [0.0] * K) if student > NONE else (-beta * FLOOR, nothing)
    rho = 0.0 if teacher == NONE else 1.0 if student == NONE else math.exp(min(0.0, teacher - student))
    uniform = counter_uniform(SEED, STREAM_GATE, STEP, torch.tensor([[5]]), torch.tensor([[place + 1]])).item()
    gate = config.gate or "bernoulli"
    weight = {
        "soft": rho,
        "bernoulli": float(uniform < rho),
        "threshold": float(rho >= config.gate_threshold and rho > 0),
    }[gate]
    if not method.gated:
        weight = 0.0 if method.everywhere else float(teacher > NONE or method.floored)
    ratio = 0.0 if student == NONE else math.inf if student - old > 700 else math.exp(student - old)
    importance = {"off": 1.0, "tis": min(ratio, CAP), "icepop": ratio if 1 / CAP <= ratio <= CAP else 0.0}
    importance = importance[config.importance]
    loss, gradient = 0.0, list(nothing)
    if weight and student > NONE and teacher > NONE:
        loss, gradient[0] = -importance * (teacher - student) * student, -importance * (teacher - student)
    if method.floored and weight and student > NONE:
        advantage = max(teacher - student, math.log(config.mixture / (1 - config.mixture)))
        loss, gradient[0] = -importance * advantage * student, -importance * advantage
    if method.selects:
        loss, gradient[0] = given * loss, given * gradient[0]
    if config.name == "eopd":
        advantage = teacher - student if student > NONE and teacher > NONE else 0.0
        loss, gradient = clipped_by_hand(config, student, old, advantage)
        kl, listed = kl_by_hand(student_topk, teacher_topk, config.tail)
        return loss + config.entropy_weight * kl, [gradient, *(config.entropy_weight * g for g in listed)]
    if method.returns:
        loss, gradient = clipped_by_hand(config, student, old, given if student > NONE else 0.0)
        return loss, [gradient, *[0.0] * K]
    outlier = method.outlier or config.outlier or "fkl"
    outside, outside_gradient = 0.0, list(nothing)
    if outlier == "clip" and method.gated and student > NONE:
        advantage = max(CLIP, teacher - student)
        outside, outside_gradient[0] = -importance * advantage * student, -importance * advantage
    if outlier.startswith("fkl") and (method.gated or method.everywhere):
        outside, topk_gradient = kl_by_hand(student_topk, teacher_topk, config.tail)
        outside_gradient[1:] = topk_gradient
        if outlier == "fkl_advantage":
            outside_gradient = [importance * outside if student > NONE else 0.0, *[0.0] * K]
            outside = importance * outside * (student if student > NONE else 0.0)
    mixed = [weight * a + (1 - weight) * b for a, b in zip(gradient, outside_gradient, strict=True)]
    return weight * loss + (1 - weight) * outside, mixed


def clipped_by_hand(config, student: float, old: float, advantage: float) -> tuple[float, float]:
    """PPO's clipped policy loss and its derivative in the student's log-prob."""
    known = student > NONE and old > NONE
    ratio = math.exp(min(student - old, 20)) if known else 1.0
    bound = min(max(ratio, 1 - config.ppo_clip), 1 + config.ppo_clip)
    is_free = known and student - old <= 20 and ratio * advantage <= bound * advantage
    return -min(ratio * advantage, bound * advantage), -ratio * advantage if is_free else 0.0


def kl_by_hand(student: list[float], teacher: list[float], tail: str) -> tuple[float, list[float]]:
    """Forward KL over the listed tokens that have any probability, and its gradient."""
    leaf = torch.tensor([max(s, FLOOR) for s in student], dtype=torch.float64, requires_grad=True)
    listed = [i for i, t in enumerate(teacher) if t > NONE]
    log_q, log_p = leaf, torch.tensor(teacher, dtype=torch.float64)
    if tail == "renormalized":
        log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1) if listed else log_p
    kl = sum((log_p[i].exp() * (log_p[i] - log_q[i]) for i in listed), leaf.sum() * 0)
    if tail == "tail":
        eps = torch.finfo(torch.float32).eps  # the least that is left to the rest
        rest_p, rest_q = (-torch.expm1(x.logsumexp(-1).clamp(max=-eps)) for x in (log_p, log_q))
        kl = kl + rest_p * (rest_p.log() - rest_q.log())
    kl.backward()
    return kl.item(), [g if s > NONE else 0.0 for g, s in zip(leaf.grad.tolist(), student, strict=True)]


# A threshold of 0 takes everything but what the teacher rules out.
CASES = [c for c in variants() if not METHODS[c.name].divergence]
CASES.append(ObjectiveConfig(gate="threshold", gate_threshold=0.0, topk=K, clip=CLIP, importance_cap=CAP))


@pytest.mark.parametrize("config", CASES, ids=lambda c: "-".join(map(str, (c.name, c.gate, c.outlier, c.tail))))
def test_field_cases_a22_every_method_is_finite_at_infinite_logprobs_and_right(config):
    logprobs, scores, batch = batch_of_all()
    objective = build_objective(config, GuidanceConfig(beta=BETA), SEED)
    leaf = logprobs[..., : 1 + objective.topk].requires_grad_()
    scores = objective.prepare(batch, scores, STEP, ENTROPIES)
    result = objective.loss(leaf, scores, batch, STEP)
    result.loss.sum().backward()
    for place, (name, token) in enumerate(TOKENS.items()):
        whole = scores.weights if scores.advantages is None else scores.advantages
        given = 1.0 if whole is None else whole[0, place].item()
        loss, gradient = by_hand(config, place, token, given)
        found = leaf.grad[0, place].tolist()
        # The gradient of a tail that is nearly nothing is rounded off: a millionth of fp32 over what is left.
        assert result.loss[0, place].item() == pytest.approx(loss, rel=2e-5, abs=2e-5), name
        assert found == pytest.approx(gradient[: len(found)], rel=2e-3, abs=2e-5), name
    for name, (total, count) in result.metrics.items():
        assert torch.isfinite(torch.stack([total, count])).all(), name
    for name, value in {**result.maxima, **result.minima}.items():
        assert torch.isfinite(value), name


def test_field_cases_a22_metrics_say_how_many_tokens_are_ruled_out_and_average_the_others():
    logprobs, scores, batch = batch_of_all()
    objective = build_objective(ObjectiveConfig(name="tropd_mask"), GuidanceConfig(), SEED)
    metrics = objective.loss(logprobs[..., :1], scores, batch, STEP).metrics
    students = [t for t in TOKENS.values() if t[0] == LOSS_STUDENT]
    both = [t for t in students if t[1] > NONE and t[2] > NONE]
    assert [x.item() for x in metrics["ruled_out_fraction"]] == [len(students) - len(both), len(students)]
    mean = sum(t[2] - t[1] for t in both) / len(both)
    assert (metrics["advantage"][0] / metrics["advantage"][1]).item() == pytest.approx(mean)
    assert metrics["logprob_mismatch"][1].item() == sum(t[1] > NONE and t[3] > NONE for t in students)


def test_histograms_leave_out_tokens_whose_numbers_would_be_infinite():
    logprobs, scores, batch = batch_of_all()
    objective = build_objective(ObjectiveConfig(name="tropd_mask"), GuidanceConfig(), SEED)
    counts = objective.loss(logprobs[..., :1], scores, batch, STEP).counts
    students = [t for t in TOKENS.values() if t[0] == LOSS_STUDENT]
    assert counts["rho"].sum() == len(students)  # 0 is a probability
    assert counts["advantage"].sum() == sum(t[1] > NONE and t[2] > NONE for t in students)
    assert counts["mismatch"].sum() == sum(t[1] > NONE and t[3] > NONE for t in students)
    found = summarise({name: histogram.tolist() for name, histogram in counts.items()})
    assert all(math.isfinite(value) for key, value in found.items() if key != "rho_histogram")
    scores.logprobs.fill_(NONE)
    counts = objective.loss(logprobs[..., :1], scores, batch, STEP).counts
    found = summarise({name: histogram.tolist() for name, histogram in counts.items()})
    assert sum(found["rho_histogram"]) == len(students)
    assert not [key for key in found if key.startswith("advantage")]


@pytest.mark.parametrize("config", CASES, ids=lambda c: "-".join(map(str, (c.name, c.gate, c.outlier, c.tail))))
def test_the_shares_of_the_gradient_are_those_of_the_gradient_at_infinite_logprobs(config):
    logprobs, scores, batch = batch_of_all()
    objective = build_objective(config, GuidanceConfig(beta=BETA), SEED)
    leaf = logprobs[..., : 1 + objective.topk].requires_grad_()
    result = objective.loss(leaf, objective.prepare(batch, scores, STEP, ENTROPIES), batch, STEP)
    result.loss.sum().backward()
    trained = leaf.grad[0].abs().sum(-1) > 0
    for kind, weights in result.gradients.items():
        assert torch.isfinite(weights).all(), kind
        assert not weights[0][~trained].any(), kind


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_field_cases_a22_what_the_teacher_rules_out_is_outside_the_region_whatever_the_threshold(gate, threshold):
    student, teacher = torch.tensor([[-1.0, NONE, -1.0]]), torch.tensor([[NONE, NONE, -1.0]])
    places = torch.arange(3)[None]
    found = trust_gate(student, teacher, gate, threshold, seed=0, step=0, sample_ids=places, positions=places)
    assert found.rho.tolist() == [[0.0, 0.0, 1.0]]
    assert found.weight.tolist() == [[0.0, 0.0, 1.0]]


@pytest.mark.parametrize("tail", ["truncated", "renormalized", "tail"])
def test_field_cases_a22_a_short_list_of_the_teacher_has_the_divergence_of_what_is_listed(tail):
    student = torch.tensor(SOME, requires_grad=True)
    kl = topk_forward_kl(student, torch.tensor(PART), tail)
    kl.backward()
    expected, gradient = kl_by_hand(SOME, PART, tail)
    assert kl.item() == pytest.approx(expected, rel=1e-5)
    assert student.grad.tolist() == pytest.approx(gradient, rel=1e-4, abs=1e-6)


def test_field_cases_a22_an_end_of_text_without_probability_has_no_gradient():
    end = EndOfText([2, 3])
    ids = torch.tensor([[1, 5, 2], [2, 3, 0], [1, 4, 6]])
    leaf = torch.tensor(
        [[-1.0, -2.0, NONE, NONE, NONE], [NONE, NONE, -1.0, NONE, NONE], [-1.0, -2.0, -3.0, -4.0, NONE]]
    )
    leaf.requires_grad_()
    merged = end.merge(leaf, ids)
    assert merged.tolist() == [[-1.0, -2.0, NONE], [NONE, NONE, -1.0], [-1.0, -2.0, -3.0]]
    torch.where(merged == NONE, 0.0, merged).sum().backward()
    assert leaf.grad.tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_field_cases_a22_merged_divergences_take_no_outcome_that_cannot_happen(kind):
    divergence = Divergence(kind, None, None, 8, beta=0.3)
    student = torch.tensor([NONE, -1.0, NONE], requires_grad=True)
    teacher = torch.tensor([NONE, -2.0, -3.0 if kind == "jsd" else NONE])
    terms = divergence._terms(student, teacher)
    terms.sum().backward()
    assert terms[0] == 0
    assert torch.isfinite(terms).all()
    assert torch.isfinite(student.grad).all()
    assert student.grad[1] != 0
