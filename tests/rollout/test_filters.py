"""Filters of responses: what each finds, by hand, and what becomes of the losses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.objective_cases import BETA, SEED, STEP, VOCAB, inputs, scores_of, variants

from megatron_tropd.config import GuidanceConfig, RolloutConfig
from megatron_tropd.methods import METHODS
from megatron_tropd.objective.objectives import build_objective
from megatron_tropd.parallel.batching import pad_rollouts
from megatron_tropd.rollout.filters import FILTERS, judge, repetition
from megatron_tropd.types import LOSS_NONE, Prompt, Rollouts


def rollouts():
    """Responses to two prompts of two tokens; of some, a teacher wrote the first token."""
    p, q = Prompt(id="p", index=0), Prompt(id="q", index=1)
    rows = [  # prompt, prefix length, response, finish reason, the student's text
        (p, 0, [7, 8, 2], "eos", "ab"),
        (p, 0, [7, 8, 2], "eos", "ab"),  # a duplicate
        (q, 0, [7, 8, 2], "eos", "ab"),  # of another prompt
        (q, 1, [7, 8, 2], "eos", "b"),  # the same tokens, of which the teacher wrote one: a duplicate, too
        (q, 0, [5, 6, 5, 6, 5, 6], "length", "cdcdcd"),  # 3 of 5 bigrams occurred before
        (p, 0, [2], "eos", " "),
        (p, 1, [9, 2], "eos", ""),  # the teacher's prefix is a response
        (q, 2, [7, 2], "prefix", ""),
        (q, 2, [7, 2], "prefix", ""),
    ]
    return Rollouts(
        tokens=[[3, 4, *response] for _, _, response, _, _ in rows],
        prompt_lengths=[2] * len(rows),
        prefix_lengths=[prefix for _, prefix, *_ in rows],
        lengths=[2 + len(response) for _, _, response, *_ in rows],
        logprobs=[[-1.0] * (len(response) - prefix) for _, prefix, response, *_ in rows],
        finish_reasons=[reason for *_, reason, _ in rows],
        sample_ids=list(range(len(rows))),
        prompts=[prompt for prompt, *_ in rows],
        texts=[text for *_, text in rows],
    )


@pytest.mark.parametrize(
    ("name", "met"), [("truncated", [4]), ("repeating", [4]), ("empty", [5]), ("duplicate", [1, 3])]
)
@pytest.mark.parametrize(("action", "weight"), [("drop", 0.0), ("mask", 0.0), ("downweight", 0.25)])
def test_what_each_filter_meets_and_what_becomes_of_it(name, met, action, weight):
    options = {f"on_{name}": action, "downweight": 0.25, "repetition_ngram": 2}
    found = judge(rollouts(), RolloutConfig(**options))
    assert [i for i, dropped in enumerate(found.dropped) if dropped] == (met if action == "drop" else [])
    assert found.weights == [weight if i in met else 1.0 for i in range(9)]
    assert found.counts == {name: len(met)}
    assert found.filtered == len(met)


def test_the_strongest_action_counts_and_a_response_is_counted_once():
    actions = {"on_truncated": "downweight", "on_repeating": "mask", "on_duplicate": "drop"}
    found = judge(rollouts(), RolloutConfig(**actions, repetition_ngram=2))
    assert (found.weights[4], found.dropped[4]) == (0.0, False)
    assert [i for i, dropped in enumerate(found.dropped) if dropped] == [1, 3]
    assert found.counts == {"truncated": 1, "repeating": 1, "duplicate": 2}
    assert found.filtered == 3


def test_without_filters_nothing_is_looked_at():
    found = judge(Rollouts([], [], [], [], [], [], []), RolloutConfig())
    assert (found.dropped, found.weights, found.counts) == ([], [], {})


def test_all_filters_have_a_key():
    assert {key for key in vars(RolloutConfig()) if key.startswith("on_")} == {f"on_{name}" for name in FILTERS}


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6))
def test_the_share_of_repeated_ngrams_is_that_of_a_count_in_python(tokens, n):
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    expected = sum(ngram in ngrams[:i] for i, ngram in enumerate(ngrams)) / len(ngrams) if ngrams else 0.0
    assert repetition(tokens, n) == pytest.approx(expected)


def test_dropped_rows_have_no_loss_and_filler_rows_a_weight_of_one():
    batch = pad_rollouts(rollouts(), row_multiple=4, dropped=[i == 1 for i in range(9)], weights=[0.5] * 9)
    assert (batch.loss_kind[1] == LOSS_NONE).all()
    assert batch.num_loss_tokens == pad_rollouts(rollouts()).num_loss_tokens - 3
    assert batch.weights.shape == batch.tokens.shape
    assert batch.weights[:, 0].tolist() == [0.5] * 9 + [1.0] * 3
    assert pad_rollouts(rollouts(), weights=[1.0] * 9).weights is None


def test_a_teachers_prefix_that_fills_the_budget_meets_no_filter():
    cut = [3, 4, 7, 8]
    given = Rollouts([cut] * 2, [2] * 2, [2] * 2, [4] * 2, [[]] * 2, ["length"] * 2, [0, 1], texts=[""] * 2)
    verdicts = judge(given, RolloutConfig(**{f"on_{name}": "drop" for name in FILTERS}))
    assert verdicts.dropped == [False, False]
    assert verdicts.filtered == 0


WITH_TEACHER = [c for c in variants() if METHODS[c.name].divergence is None and not METHODS[c.name].data]


@pytest.mark.parametrize("config", WITH_TEACHER, ids=lambda c: "-".join(map(str, vars(c).values())))
def test_the_losses_and_gradients_of_every_method_are_those_of_the_responses_times_their_weights(config):
    student, teacher, batch = inputs()
    scores = scores_of(teacher, batch)
    objective = build_objective(config, GuidanceConfig(beta=BETA), SEED)
    scores = objective.prepare(batch, scores, STEP, scores.entropy)
    logprobs = student[..., :VOCAB].log_softmax(-1).transpose(0, 1).gather(-1, objective.ids(batch, scores))
    factors = torch.tensor([1.0, 0.0, 0.25])[:, None].expand_as(batch.tokens)
    found = []
    for weights in (None, factors):
        batch.weights = weights
        leaf = logprobs.clone().requires_grad_()
        result = objective.loss(leaf, scores, batch, STEP)
        result.loss.sum().backward()
        found.append((result.loss.detach(), leaf.grad, result.gradients))
    (loss, gradient, kinds), (weighed, weighed_gradient, weighed_kinds) = found
    torch.testing.assert_close(weighed, loss * factors)
    torch.testing.assert_close(weighed_gradient, gradient * factors[..., None])
    for kind, norms in kinds.items():
        torch.testing.assert_close(weighed_kinds[kind], norms * factors.to(norms.dtype), rtol=1e-4, atol=1e-6)
