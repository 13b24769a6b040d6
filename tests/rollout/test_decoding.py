"""Stop strings as a tokenizer understands them, and the sampling of a recipe."""

import logging

import pytest
import sentencepiece
from support.tiny_models import make_tokenizer
from tokenizers import AddedToken

from megatron_tropd.config import RolloutConfig
from megatron_tropd.rollout.decoding import Stops, explain_stops, make_sampling
from megatron_tropd.tokenizers.tokenizer import HuggingFaceTokenizer, load_tokenizer
from megatron_tropd.types import Sampling


@pytest.fixture(scope="module")
def tokenizer():
    """A byte tokenizer with ids 131 and 132 for <|im_start|> and <|im_end|>, and an ordinary added token."""
    made = make_tokenizer()
    made.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    made.add_tokens([AddedToken("</think>", special=False)])
    return HuggingFaceTokenizer(made, set())


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A bare sentencepiece model with control pieces."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the answer is {n} and a half" for n in range(50)]),
        **{"model_prefix": str(prefix), "vocab_size": 45, "model_type": "bpe", "minloglevel": 2},
        control_symbols=["[INST]", "<|im_end|>"],
    )
    return load_tokenizer(f"{prefix}.model")


def test_field_cases_a4_a_special_token_is_an_end_id(tokenizer, pieces):
    stops = Stops.of(tokenizer, ("<|im_end|>", "\n", "</think>", "###"))
    assert stops == Stops(frozenset({132}), ("\n", "</think>", "###"))
    (control,) = Stops.of(pieces, ("<|im_end|>",)).ids
    assert pieces.pieces()[control] == "<|im_end|>"
    assert Stops.of(tokenizer, ()) == Stops()


def test_field_cases_a4_special_tokens_inside_longer_stop_strings_are_seen(tokenizer, pieces):
    for one in (tokenizer, pieces):
        (end,) = Stops.of(one, ("<|im_end|>",)).ids
        stops = Stops.of(one, ("is<|im_end|>a", "half<|im_end|>"))
        assert stops.ids == frozenset()
        tokens = [*one.encode("the answer is"), end, *one.encode("a")]
        assert stops.found(one.decode, tokens)
        assert not stops.found(one.decode, tokens[: tokens.index(end) + 1])
        assert not stops.found(one.decode, one.encode("the answer isa"))  # without the token
        assert stops.cut(one.decode, tokens) == "the answer "


def test_texts_are_cut_before_the_first_stop_string_and_without_special_tokens(tokenizer):
    stops = Stops.of(tokenizer, ("!<|im_end|>", "b", "c!"))
    (end, start) = (132, 131)
    tokens = [*tokenizer.encode("a"), start, end, *tokenizer.encode("d!"), end, *tokenizer.encode("b")]
    assert stops.cut(tokenizer.decode, tokens) == "ad"
    assert stops.cut(tokenizer.decode, tokenizer.encode("xyc!b")) == "xy"
    assert stops.cut(tokenizer.decode, tokenizer.encode("xyz")) == "xyz"


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("<|eot_id|>", "rollout.stop: '<|eot_id|>' looks like a special token, but the tokenizer has none"),
        ("<end_of_turn>", "looks like a special token"),
        ("é", "rollout.stop: the tokenizer writes 'é' as"),  # the vocabulary ends before its bytes
        ("<|im_end|>", None),
        ("<|im_end|>\n", None),
        ("</answer>", None),
        (" Question:", None),
        ("\n\n", None),
    ],
)
def test_field_cases_a4_what_cannot_fire_is_said(tokenizer, caplog, stop, message):
    with caplog.at_level(logging.WARNING):
        explain_stops(tokenizer, [stop], "rollout.stop")
    assert (message in caplog.text) if message else not caplog.text


def test_field_cases_a5_evaluation_draws_as_the_recipe_says_but_for_its_own_keys():
    rollout = RolloutConfig(top_k=7, top_p=0.8, temperature=0.9, max_new_tokens=50, samples_per_prompt=3, stop=["x"])
    shared = {"samples_per_prompt": 3, "max_new_tokens": 50, "top_k": 7, "top_p": 0.8}
    assert make_sampling(rollout, 5, step=2) == Sampling(**shared, temperature=0.9, stop=("x",), seed=5, step=2)
    own = make_sampling(rollout, 5, temperature=0.0, top_k=None, top_p=1.0, stop=[], max_new_tokens=None)
    assert own == Sampling(**{**shared, "top_p": 1.0}, temperature=0.0, stop=(), seed=5)
