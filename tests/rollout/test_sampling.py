"""Drawing: the softmax's distribution, top-k and top-p, reported log-probs, and how a response ends."""

from types import SimpleNamespace

import pytest
import torch

from megatron_tropd.rollout import sampling
from megatron_tropd.rollout.sampling import Response, Sampler, draw, keep_top
from megatron_tropd.types import Prompt, Sampling

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.4, -30.0, 1.5, -3.0])


def _draws(count, temperature=1.0, top_k=0, top_p=1.0, logits=LOGITS):
    """Draw once at each of `count` evenly spaced uniforms: their counts are the distribution, without noise."""
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return draw(logits.expand(count, -1), uniforms, temperature, top_k, top_p)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_softmax(temperature):
    generator = torch.Generator().manual_seed(0)
    count = 20_000
    uniforms = torch.rand(count, generator=generator, dtype=torch.float64)
    tokens, logprobs = draw(LOGITS.expand(count, -1), uniforms, temperature)
    expected = torch.softmax(LOGITS.double() / temperature, -1)
    observed = torch.bincount(tokens, minlength=7)
    likely = expected * count > 5
    chi_square = ((observed - expected * count) ** 2 / (expected * count))[likely].sum()
    assert chi_square < 22.5  # the 0.999 quantile at 6 degrees of freedom
    assert observed[~likely].sum() < 20
    torch.testing.assert_close(logprobs, expected.log()[tokens].float(), atol=1e-5, rtol=1e-5)


def test_draws_are_the_inverse_of_the_cumulative_distribution():
    tokens, _ = _draws(10_000)
    assert torch.equal(tokens, tokens.sort().values)  # a larger uniform never gives a lower id
    shares = torch.bincount(tokens, minlength=7) / 10_000
    torch.testing.assert_close(shares, torch.softmax(LOGITS, -1), atol=2e-4, rtol=0)


def test_greedy_takes_the_lowest_of_the_most_probable():
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 1.0, 5.0, 5.0]])
    for uniform in (0.0, 0.999):
        tokens, logprobs = draw(logits, torch.full((2,), uniform, dtype=torch.float64), temperature=0)
        assert tokens.tolist() == [1, 0]
        torch.testing.assert_close(logprobs, logits.log_softmax(-1)[range(2), tokens])


@pytest.mark.parametrize(
    ("top_k", "top_p", "allowed"),
    [
        (1, 1.0, {0}),
        (2, 1.0, {0, 5}),
        (3, 1.0, {0, 5, 2}),
        (0, 0.4, {0}),
        (0, 0.7, {0, 5}),
        (0, 1e-6, {0}),
        (2, 0.55, {0}),  # of the two kept, the first has 0.62
        (2, 0.7, {0, 5}),
        (50, 1.0, {0, 1, 2, 3, 5, 6}),
    ],
)
def test_nothing_outside_top_k_and_top_p_is_drawn(top_k, top_p, allowed):
    tokens, logprobs = _draws(5_000, top_k=top_k, top_p=top_p)
    assert set(tokens.tolist()) == allowed
    # Log-probs are of the whole softmax, before the filters.
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1)[tokens], atol=1e-5, rtol=1e-5)


def test_what_top_k_keeps_keeps_its_proportions():
    tokens, _ = _draws(10_000, top_k=2)
    shares = torch.bincount(tokens, minlength=7) / 10_000
    expected = torch.softmax(LOGITS, -1)
    expected = torch.where(torch.tensor([1, 0, 0, 0, 0, 1, 0]).bool(), expected, 0.0)
    torch.testing.assert_close(shares, expected / expected.sum(), atol=2e-4, rtol=0)


def test_the_nucleus_is_the_fewest_tokens_that_reach_the_mass():
    probabilities = torch.softmax(torch.randn(200, 50, generator=torch.Generator().manual_seed(1)) * 2, -1)
    kept = keep_top(probabilities, 0, 0.8)
    mass, smallest = kept.sum(-1), torch.where(kept > 0, kept, 2.0).amin(-1)
    assert (mass >= 0.8 - 1e-5).all()
    assert (mass - smallest < 0.8 + 1e-5).all()
    assert (torch.where(kept > 0, 0.0, probabilities).amax(-1) <= smallest).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53, 0.5])
def test_tokens_without_probability_are_never_drawn(uniform):
    infinite = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    tokens, logprobs = draw(infinite, torch.tensor([uniform], dtype=torch.float64), 1.0)
    assert tokens.item() in (1, 3)
    assert logprobs.item() == pytest.approx(-0.6931, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_batches_are_drawn_in_parts_with_the_same_result(monkeypatch, dtype):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(37, 50, generator=generator).to(dtype)
    uniforms = torch.rand(37, generator=generator, dtype=torch.float64)
    whole = draw(logits, uniforms, 0.7, 20, 0.9)
    monkeypatch.setattr(sampling, "ELEMENTS_AT_ONCE", 500)
    parts = draw(logits, uniforms, 0.7, 20, 0.9)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    assert parts[1].dtype == torch.float32


class _Letters:
    """Ids are letters, 25 ends."""

    eos_ids = frozenset({25, 24})

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def pieces(self):
        return {i: chr(97 + i) for i in range(26)}


def _sampler(monkeypatch, responses, tokenizer=None, **options):
    groups = SimpleNamespace(
        device=torch.device("cpu"),
        mp=SimpleNamespace(size=lambda: 1),
        cp=SimpleNamespace(size=lambda: 1),
        pp_size=1,
        tp_size=1,
        rank=0,
        tp_rank=0,
    )
    groups.is_last_stage = True
    monkeypatch.setattr(sampling.dist, "get_process_group_ranks", lambda group: [0])
    return Sampler(responses, tokenizer or _Letters(), Sampling(temperature=0, **options), groups, vocab_size=26)


def _feed(sampler, rows, text):
    """Give the responses `rows` one letter each, as the most probable of the logits (padding is more probable)."""
    logits = torch.zeros(len(rows), 32)
    logits[range(len(rows)), [ord(c) - 97 for c in text]] = 5.0
    logits[:, 26:] = 9.0
    tokens, ended = sampler.advance(logits, rows, torch.full((len(rows),), 3))
    assert tokens.tolist() == [ord(c) - 97 for c in text]
    return ended


def _responses(*budgets):
    return [Response(Prompt(str(i), tokens=[0]), i, [], budget) for i, budget in enumerate(budgets)]


def test_responses_end_at_any_end_id_a_stop_string_or_their_budget(monkeypatch):
    responses = _responses(9, 9, 2, 9)
    sampler = _sampler(monkeypatch, responses, stop=("cab", "x"))
    assert _feed(sampler, [0, 1, 2, 3], "zcay") == [True, False, False, True]
    assert _feed(sampler, [2, 1], "ba") == [True, False]
    assert _feed(sampler, [1], "b") == [True]
    assert [r.finish_reason for r in responses] == ["eos", "stop", "length", "eos"]
    assert [_Letters().decode(r.tokens) for r in responses] == ["z", "cab", "ab", "y"]
    assert [len(r.logprobs) for r in responses] == [1, 3, 2, 1]


def test_a_stop_string_is_found_at_the_end_of_a_long_response(monkeypatch):
    (response,) = responses = _responses(500)
    sampler = _sampler(monkeypatch, responses, stop=("ba",))
    assert not any(_feed(sampler, [0], "a")[0] for _ in range(300))
    assert _feed(sampler, [0], "b") == [False]
    assert _feed(sampler, [0], "a") == [True]
    assert response.finish_reason == "stop"


def test_the_end_id_goes_before_the_budget(monkeypatch):
    responses = _responses(1, 1)
    sampler = _sampler(monkeypatch, responses, stop=("b",))
    assert _feed(sampler, [0, 1], "zb") == [True, True]
    assert [r.finish_reason for r in responses] == ["eos", "stop"]


class _Marked(_Letters):
    """Letter u is the special token <end>, which decoding leaves out."""

    def decode(self, ids):
        return super().decode([i for i in ids if i != 20])

    def pieces(self):
        return {**super().pieces(), 20: "<end>"}


def test_field_cases_a4_special_tokens_in_stop_strings_end_responses(monkeypatch):
    responses = _responses(9, 9, 9)
    sampler = _sampler(monkeypatch, responses, tokenizer=_Marked(), stop=("<end>",))
    assert _feed(sampler, [0, 1, 2], "uaz") == [True, False, True]
    assert [r.finish_reason for r in responses] == ["eos", None, "eos"]

    responses = _responses(9, 9, 9)
    sampler = _sampler(monkeypatch, responses, tokenizer=_Marked(), stop=("a<end>b", "c<end>"))
    assert _feed(sampler, [0, 1, 2], "aac") == [False, False, False]
    assert _feed(sampler, [0, 1, 2], "ubu") == [False, False, True]
    assert _feed(sampler, [0, 1], "bu") == [True, False]
    assert [r.finish_reason for r in responses] == ["stop", None, "stop"]


class _CountingLetters(_Letters):
    def __init__(self):
        self.decoded = 0

    def decode(self, ids):
        self.decoded += 1
        return super().decode(ids)


def test_text_is_decoded_only_where_a_stop_string_may_end(monkeypatch):
    (response,) = responses = _responses(500)
    sampler = _sampler(monkeypatch, responses, stop=("ab", "cd"))
    tokenizer = sampler._tokenizer = _CountingLetters()
    for letter in "axc" * 50:
        _feed(sampler, [0], letter)
    assert tokenizer.decoded == 3  # each letter by itself, once
    assert _feed(sampler, [0], "b") == [False]
    assert _feed(sampler, [0], "c") + _feed(sampler, [0], "d") == [False, True]
    assert response.finish_reason == "stop"


@pytest.mark.parametrize(("stop", "text"), [("\n\n", "b"), ("é", "\ufffd")])
def test_blanks_and_unfinished_characters_may_end_a_stop_string(monkeypatch, stop, text):
    sampler = _sampler(monkeypatch, _responses(5), stop=(stop,))
    sampler._tokenizer = SimpleNamespace(decode=lambda ids: text)
    assert sampler._can_end_stop_string(1)
