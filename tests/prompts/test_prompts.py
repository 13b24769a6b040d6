"""Prompt files: every kind of line, every mistake by its number, and an order that resumes exactly."""

import json
from collections import Counter

import pytest

from megatron_tropd.errors import UserError
from megatron_tropd.prompts.source import PromptSource, load_prompts
from megatron_tropd.types import Prompt


class _WordTokenizer:
    """One token per word."""

    def encode_prompt(self, prompt):
        text = prompt.text if prompt.text is not None else " ".join(m["content"] for m in prompt.messages)
        return list(range(len(text.split())))


def _write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def _error(path, *lines, **arguments):
    with pytest.raises(UserError) as error:
        load_prompts(_write(path, *lines), _WordTokenizer(), **arguments)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prompts.jsonl"


def test_reads_every_kind_of_line(path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    _write(
        path,
        {"messages": messages, "id": "a", "answer": 4, "teacher_response": "4"},
        "",
        {"text": "Once upon"},
        {"prompt": "Say hello", "id": 17},
    )
    chat, text, plain = load_prompts(path, _WordTokenizer())
    where = [f"{path}:{line}" for line in (1, 3, 4)]
    answers = {"answer": "4", "teacher_response": "4"}
    assert chat == Prompt("a", messages=messages, **answers, row=where[0], tokens=[0, 1, 2, 3, 4])
    assert text == Prompt("3", text="Once upon", index=1, row=where[1], tokens=[0, 1])
    assert plain == Prompt(
        "17", messages=[{"role": "user", "content": "Say hello"}], row=where[2], index=2, tokens=[0, 1]
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2: not valid JSON"),
        ("[1]", "line 2: a JSON list, expected an object"),
        ({"id": "x"}, "line 2: expected exactly one of messages, text and prompt, found none"),
        ({"text": "a", "prompt": "b"}, "found text and prompt"),
        ({"text": " "}, "line 2: text is empty"),
        ({"text": 3}, "line 2: text is a int, expected a string"),
        ({"messages": []}, "line 2: messages is empty"),
        ({"messages": [{"role": "user"}]}, "line 2: each of messages must be"),
        ({"messages": [{"role": "user", "content": ""}]}, "line 2: the last of messages has empty content"),
        ({"text": "a", "id": "first"}, "line 2: id 'first' is taken by line 1"),
        ({"text": "a b c d"}, "line 2: the prompt has 4 tokens, more than the 3 allowed"),
        ({"text": "a", "answer": [1, 2]}, "line 2: answer is a list"),
    ],
)
def test_a_broken_line_is_named(path, line, message):
    assert message in _error(path, {"text": "a b c", "id": "first"}, line, max_tokens=3)


def test_ten_broken_lines_are_reported_at_once(path):
    message = _error(path, *["{"] * 12)
    assert "12 unusable lines" in message
    assert "line 10:" in message
    assert "line 11:" not in message
    assert "and 2 more" in message


def test_empty_and_missing_files(path, tmp_path):
    assert "holds no prompts" in _error(path, "", " ")
    with pytest.raises(UserError, match="nowhere.jsonl cannot be read"):
        load_prompts(tmp_path / "nowhere.jsonl", _WordTokenizer())
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        load_prompts(path, _WordTokenizer())


def _prompts(count):
    return [Prompt(str(i), text=str(i), index=i) for i in range(count)]


def _ids(source, count):
    return [p.id for p in source.next(count)]


def test_each_epoch_draws_every_prompt_once_in_its_own_order():
    source = PromptSource(_prompts(7), seed=3)
    epochs = [source.next(7) for _ in range(3)]
    for number, epoch in enumerate(epochs):
        assert Counter(p.id for p in epoch) == Counter(str(i) for i in range(7))
        assert [p.index for p in epoch] == list(range(7 * number, 7 * number + 7))
    assert len({tuple(p.id for p in epoch) for epoch in epochs}) == 3


def test_order_is_a_pure_function_of_the_seed():
    whole = _ids(PromptSource(_prompts(10), seed=1), 30)
    parts = PromptSource(_prompts(10), seed=1)
    assert [*_ids(parts, 4), *_ids(parts, 9), *_ids(parts, 17)] == whole
    assert _ids(PromptSource(_prompts(10), seed=2), 30) != whole
    # Written down once: a change of the order would change every run that resumes.
    assert whole[:10] == EXPECTED_ORDER


EXPECTED_ORDER = ["5", "9", "6", "1", "8", "2", "3", "4", "7", "0"]


def test_without_shuffling_the_file_order_repeats():
    assert _ids(PromptSource(_prompts(3), shuffle=False), 7) == ["0", "1", "2", "0", "1", "2", "0"]


def test_resume_continues_exactly():
    source = PromptSource(_prompts(10), seed=1)
    source.next(13)
    state = json.loads(json.dumps(source.state_dict()))
    expected = source.next(20)
    resumed = PromptSource(_prompts(10), seed=1)
    resumed.load_state_dict(state)
    assert resumed.next(20) == expected


def test_resume_refuses_other_prompts_or_seed():
    state = PromptSource(_prompts(10), seed=1).state_dict()
    with pytest.raises(UserError, match="data.prompts has changed"):
        PromptSource(_prompts(9), seed=1).load_state_dict(state)
    with pytest.raises(UserError, match=r"data.seed has changed .*it was 1 and is 2"):
        PromptSource(_prompts(10), seed=2).load_state_dict(state)
