"""Prefix schedules by hand, prefixes as token ids, and what is refused."""

import json
from pathlib import Path

import pytest
from support.tiny_models import make_tokenizer

from megatron_tropd.config import GuidanceConfig
from megatron_tropd.errors import UserError
from megatron_tropd.prompts.guidance import Guidance, prefix_fraction
from megatron_tropd.rollout.endings import Endings
from megatron_tropd.tokenizers.tokenizer import HuggingFaceTokenizer
from megatron_tropd.types import Prompt


@pytest.fixture(scope="module")
def tokenizer():
    return HuggingFaceTokenizer(make_tokenizer(), set())


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("cosine", [1.0, 0.8535534, 0.5, 0.1464466, 0.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("constant", [1.0] * 5),
        ("none", [0.0] * 5),
    ],
)
def test_schedules_at_their_quarters(schedule, shares):
    assert [prefix_fraction(schedule, step, 8) for step in (0, 2, 4, 6, 8)] == pytest.approx(shares)
    assert prefix_fraction(schedule, 2, 8, start=0.5) == pytest.approx(0.5 * shares[1])


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="none of cosine"):
        prefix_fraction("square", 0, 1)


def prompt(response: str | None = "0123456") -> Prompt:
    return Prompt(id="p", text="?", teacher_response=response, tokens=[1])


def test_a_prefix_is_the_floor_of_its_share_of_the_response_with_eos(tokenizer):
    guidance = Guidance(GuidanceConfig(), 8, tokenizer, max_tokens=100)
    whole = tokenizer.encode("0123456") + [tokenizer.eos_id]  # 8 tokens
    (at_start,), (middle,), (late,) = (guidance.prefixes([prompt()], step) for step in (0, 4, 6))
    assert at_start == whole
    assert middle == whole[:4]
    assert late == whole[:1]  # floor(0.146 * 8)
    assert guidance.prefixes([prompt()], 8) == [[]]


def test_a_chats_response_ends_as_its_template_ends_a_turn(tokenizer):
    endings = Endings(frozenset({tokenizer.eos_id, 9}), turn_end=9)
    guidance = Guidance(GuidanceConfig(), 8, tokenizer, max_tokens=100, endings=endings)
    text, chat = prompt(), Prompt(id="c", messages=[{"role": "user", "content": "?"}], teacher_response="0123456")
    written = Prompt(id="w", text="?", teacher_response="0123456</s>")
    (of_text,), (of_chat,), (of_written,) = (guidance.prefixes([p], 0) for p in (text, chat, written))
    assert of_text == of_written == [*tokenizer.encode("0123456"), tokenizer.eos_id]  # not twice
    assert of_chat == [*tokenizer.encode("0123456"), 9]


def test_prefixes_are_cut_to_the_longest_response(tokenizer):
    guidance = Guidance(GuidanceConfig(schedule="constant"), 8, tokenizer, max_tokens=5)
    assert len(guidance.prefixes([prompt()], 3)[0]) == 5


def test_without_guidance_every_prefix_is_empty(tokenizer):
    for options in ({"enabled": False}, {}):
        config = GuidanceConfig(schedule="none" if not options else "cosine")
        guidance = Guidance(config, 8, tokenizer, max_tokens=100, **options)
        guidance.check(["p"], 1)
        assert guidance.prefixes([prompt()], 0) == [[]]
        assert guidance.fraction(0) == 0


def test_data_objectives_take_the_whole_response_at_every_step(tokenizer):
    guidance = Guidance(GuidanceConfig(schedule="none"), 8, tokenizer, max_tokens=100, whole_response=True)
    assert guidance.prefixes([prompt()], 7)[0][-1] == tokenizer.eos_id
    assert guidance.fraction(7) == 1


def test_prompts_without_responses_are_named(tokenizer):
    guidance = Guidance(GuidanceConfig(), 8, tokenizer, max_tokens=100)
    with pytest.raises(UserError, match="1 of 2 prompts have no teacher_response, the first is id 'q'"):
        guidance.check(["q"], 2)


def test_a_file_of_responses_goes_before_the_prompts_own(tokenizer, tmp_path: Path):
    file = tmp_path / "responses.jsonl"
    file.write_text(json.dumps({"id": "p", "teacher_response": "ab"}) + "\n\n")
    guidance = Guidance(GuidanceConfig(responses=str(file)), 8, tokenizer, max_tokens=100)
    assert guidance.prefixes([prompt()], 0)[0] == [*tokenizer.encode("ab"), tokenizer.eos_id]


def test_field_cases_a6_a_response_that_was_cut_has_no_eos(tokenizer, tmp_path: Path):
    """Neither of the prompt's own row nor of a file, neither as guidance nor as the data of sft and seqkd."""
    cut = Prompt(id="p", text="?", teacher_response="0123456", teacher_finish_reason="length", tokens=[1])
    for options in ({}, {"whole_response": True}):
        guidance = Guidance(GuidanceConfig(), 8, tokenizer, max_tokens=100, **options)
        assert guidance.prefixes([cut], 0) == [tokenizer.encode("0123456")]
    file = tmp_path / "responses.jsonl"
    file.write_text(json.dumps({"id": "p", "teacher_response": "ab", "finish_reason": "length"}))
    config = GuidanceConfig(responses=str(file))
    guidance = Guidance(config, 8, tokenizer, max_tokens=100)
    assert guidance.prefixes([prompt()], 0) == [tokenizer.encode("ab")]


def test_field_cases_a6_a_response_that_is_cut_here_has_no_eos(tokenizer):
    guidance = Guidance(GuidanceConfig(), 8, tokenizer, max_tokens=7, whole_response=True)
    assert guidance.prefixes([prompt()], 0) == [tokenizer.encode("0123456")]


@pytest.mark.parametrize(
    ("opening", "response", "expected"),
    [
        ("<think>\n", "<think>\nTwo.\n</think>\n4", "Two.\n</think>\n4"),
        ("<think>\n", "<think>Two.</think>4", "Two.</think>4"),
        ("<think>", "\n<think>\nTwo.", "\nTwo."),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n4", "4"),
        ("<think>\n", "Two.\n</think>\n4", "Two.\n</think>\n4"),
        ("", "<think>\nTwo.\n</think>\n4", "<think>\nTwo.\n</think>\n4"),
        ("the tag <b> bold ", "<b>4</b>", "<b>4</b>"),
    ],
)
def test_field_cases_a18_a_response_does_not_open_again_what_the_template_opened(
    tokenizer, opening, response, expected
):
    guidance = Guidance(GuidanceConfig(schedule="constant"), 8, tokenizer, max_tokens=100)
    question = Prompt(id="p", text="2 + 2?" + opening, teacher_response=response)
    assert guidance.prefixes([question], 0)[0] == [*tokenizer.encode(expected), tokenizer.eos_id]


@pytest.mark.parametrize("reason", [None, "length"])
def test_field_cases_a6_a_response_ends_at_the_end_of_text_that_it_contains(tokenizer, caplog, reason):
    guidance = Guidance(GuidanceConfig(schedule="constant"), 8, tokenizer, max_tokens=100)
    texts = ("4</s>\n", "4</s>", "4</s>[user]5?\n[assistant]5</s>", "4</s>\n[user]")
    for i, text in enumerate(texts):
        row = Prompt(id=f"p{i}", text="?", teacher_response=text, teacher_finish_reason=reason)
        assert guidance.prefixes([row], 0)[0] == [*tokenizer.encode("4"), tokenizer.eos_id]
    assert caplog.text.count("goes on after an end of text") == 1
    assert "prompt 'p2'" in caplog.text
