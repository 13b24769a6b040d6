"""Rows of the layouts that people's files have, as Prompts; what a row may not hold, by name."""

import pytest

from megatron_tropd.config import ColumnsConfig
from megatron_tropd.data.layouts import RowReader
from megatron_tropd.data.values import id_text

CHAT = [{"role": "user", "content": "2 + 2?"}]
SHAREGPT = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def read(row, columns=None, **options):
    """Return a row's fields that are set, and the name of its layout."""
    reader = RowReader(ColumnsConfig(**(columns or {})), **options)
    prompt = reader.read(row, "7")
    fields = {name: value for name, value in vars(prompt).items() if value not in (None, [], "", 0)}
    return fields, next(iter(reader.layouts))


def refusal(row, columns=None, **options):
    with pytest.raises(ValueError, match=r".") as error:
        read(row, columns, **options)
    return str(error.value)


LAYOUTS = {
    "OpenThoughts": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "user", "value": "2 + 2?"}, {"from": "assistant", "value": "4"}],
        },
        {"messages": [SYSTEM, *CHAT], "teacher_response": "4"},
    ),
    "ShareGPT conversations": ({"conversations": SHAREGPT}, {"messages": CHAT, "teacher_response": "4"}),
    "messages": (
        {"messages": [*CHAT, {"role": "assistant", "content": "4"}]},
        {"messages": CHAT, "teacher_response": "4"},
    ),
    "GSM8K": ({"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 1,234"}, {"messages": CHAT, "answer": "1,234"}),
    "MATH": (
        {"problem": "2 + 2?", "level": "Level 1", "solution": r"So $\boxed{\frac{8}{2}}$."},
        {"messages": CHAT, "answer": r"\frac{8}{2}"},
    ),
    "verl": (
        {
            "data_source": "openai/gsm8k",
            "prompt": [SYSTEM, *CHAT],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"index": 3, "answer": "four"},
        },
        {"messages": [SYSTEM, *CHAT], "answer": "4", "domain": "openai/gsm8k"},
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "2 + 2", "output": "4"},
        {"messages": [{"role": "user", "content": "Add.\n\n2 + 2"}], "teacher_response": "4"},
    ),
    "Dolly": (
        {"instruction": "Add.", "context": "2 + 2", "response": "4", "category": "qa"},
        {"messages": [{"role": "user", "content": "Add.\n\n2 + 2"}], "teacher_response": "4"},
    ),
    "prompt/completion": ({"prompt": "2 + 2?", "completion": "4"}, {"messages": CHAT, "teacher_response": "4"}),
    "prompt/response": ({"prompt": "2 + 2?", "response": "4"}, {"messages": CHAT, "teacher_response": "4"}),
    "prompt as messages": (
        {"prompt": CHAT, "completion": [{"role": "assistant", "content": "4"}]},
        {"messages": CHAT, "teacher_response": "4"},
    ),
    "question/response": (
        {"system_prompt": "Be brief.", "question": "2 + 2?", "response": "4"},
        {"messages": [SYSTEM, *CHAT], "teacher_response": "4"},
    ),
    "question/final_answer": (
        {"question": "2 + 2?", "final_answer": "4", "r1_solution_1": "..."},
        {"messages": CHAT, "answer": "4"},
    ),
    "input/output": ({"input": "2 + 2?", "output": "4"}, {"messages": CHAT, "teacher_response": "4"}),
    "raw text": ({"text": "2 + 2 =", "id": 3, "domain": "sums"}, {"text": "2 + 2 =", "id": "3", "domain": "sums"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_recognised(name):
    row, expected = LAYOUTS[name]
    assert read(row) == ({"id": "7", **expected}, name)


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"q": "2 + 2?", "a": 4, "key": 5}, {"prompt": "q", "answer": "a", "id": "key"}, {"answer": "4", "id": "5"}),
        ({"prompt": "x", "messages": CHAT}, {"messages": "messages"}, {}),
        ({"prompt": "2 + 2?", "messages": [SYSTEM]}, {"prompt": "prompt"}, {}),
        (
            {"turns": SHAREGPT, "topic": "sums"},
            {"messages": "turns", "domain": "topic"},
            {"domain": "sums", "teacher_response": "4"},
        ),
        ({"prompt": "2 + 2?", "x": {"y": {"z": 4.0}}}, {"answer": "x.y.z"}, {"answer": "4.0"}),
        (
            {"prompt": "2 + 2?", "response": "a", "chosen": "4"},
            {"teacher_response": "chosen"},
            {"teacher_response": "4"},
        ),
        (
            {"prompt": "2 + 2?", "response": "4", "why": "length"},
            {"finish_reason": "why"},
            {"teacher_response": "4", "teacher_finish_reason": "length"},
        ),
    ],
)
def test_columns_that_the_recipe_names_take_precedence(row, columns, expected):
    assert read(row, columns)[0] == {"id": "7", "messages": CHAT, **expected}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "messages": CHAT},
            "found messages and prompt; data.columns.messages=messages or data.columns.prompt=prompt decides",
        ),
        (
            {"question": "a", "problem": "b"},
            "found question and problem; data.columns.prompt=question or data.columns.prompt=problem",
        ),
        (
            {"prompt": "a", "completion": "b", "response": "c"},
            "completion and response could each be the teacher response; data.columns.teacher_response=completion or",
        ),
        (
            {"question": "a", "final_answer": "1", "ground_truth": "2"},
            "final_answer and ground_truth could each be the answer; data.columns.answer=final_answer or",
        ),
        ({"Title": "a", "Result": "b"}, "found none; name its column by data.columns.prompt, of Title, Result"),
        ({"question": "a", "input": "b", "answer": "c"}, "found question and input; data.columns.prompt=question or"),
        ({"text": "a", "question": "b"}, "found text and question; data.columns.text=text or"),
        ({"instruction": "a", "input": "b", "context": "c"}, "input and context"),
    ],
)
def test_two_readings_are_refused_with_the_key_that_decides(row, message):
    assert message in refusal(row)


def test_a_column_that_is_missing_is_named():
    assert "column q (data.columns.prompt) is missing" in refusal({"prompt": "a"}, {"prompt": "q"})
    assert "answer is missing; name its column by data.columns.answer, of target" in refusal(
        {"text": "a", "target": 1}, require=("answer",)
    )


def test_field_cases_a17_the_assistants_last_turn_is_the_teacher_response():
    turns = [SYSTEM, *CHAT, {"role": "assistant", "content": "4"}, *CHAT, {"role": "assistant", "content": "four"}]
    assert read({"messages": turns})[0] == {"id": "7", "messages": turns[:-1], "teacher_response": "four"}
    assert read({"prompt": turns})[0] == {"id": "7", "messages": turns[:-1], "teacher_response": "four"}
    for row in ({"messages": turns}, {"conversations": SHAREGPT}):
        assert "data.assistant_turn=refuse" in refusal(row, assistant_turn="refuse")
    assert "teacher_response and an assistant's turn" in refusal({"messages": turns, "teacher_response": "4"})
    assert "has reasoning_content" in refusal(
        {"messages": [*CHAT, {"role": "assistant", "content": "4", "reasoning_content": "hm"}]}
    )
    assert "has tool_calls" in refusal(
        {"messages": [*CHAT, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    )
    assert "nothing asks for it" in refusal({"messages": [{"role": "assistant", "content": "4"}]})
    assert "the last of messages has empty content" in refusal(
        {"messages": [*CHAT, {"role": "assistant", "content": " "}]}
    )


def test_field_cases_a17_roles_of_other_files():
    names = {
        "human": "user",
        "User": "user",
        "gpt": "assistant",
        "bot": "assistant",
        "model": "assistant",
        "tool": "tool",
    }
    for name, role in names.items():
        turns = [{"from": "system", "value": "s"}, {"from": name, "value": "x"}, {"from": "human", "value": "y"}]
        assert [m["role"] for m in read({"conversations": turns})[0]["messages"]] == ["system", role, "user"]
    reader = RowReader()
    reader.read({"messages": [{"role": "critic", "content": "x"}, *CHAT]}, "1")
    assert dict(reader.roles) == {"critic": 1}


def test_tool_calls_and_parts_are_kept_for_the_template():
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "name": "add", "content": "4"}
    assert read({"messages": [*CHAT, call, result]})[0]["messages"] == [*CHAT, call, result]
    without = {"role": "assistant", "tool_calls": [CALL]}  # as a columnar file gives it
    assert read({"messages": [*CHAT, without, result]})[0]["messages"] == [*CHAT, call, result]
    turns = [
        SHAREGPT[0],
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"},
    ]
    assert read({"conversations": turns})[0]["messages"] == [*CHAT, call, {"role": "tool", "content": "4"}]
    parts = [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2?"}]
    assert read({"messages": [{"role": "user", "content": parts}]})[0]["messages"] == CHAT
    image = [*parts, {"type": "image_url", "image_url": "x"}]
    assert "part of type image_url; only text" in refusal({"messages": [{"role": "user", "content": image}]})
    assert "content of a user message is missing" in refusal({"messages": [{"role": "user", "content": None}]})
    columns = {"role": ["system", "user"], "content": ["Be brief.", "2 + 2?"]}
    assert read({"messages": columns})[0]["messages"] == [SYSTEM, *CHAT]


def test_field_cases_a18_tools_and_template_arguments_are_read_per_row():
    row = {"messages": CHAT, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    fields = read(row)[0]
    assert (fields["tools"], fields["chat_template_kwargs"]) == ([TOOL], {"enable_thinking": False})
    as_text = {"messages": '[{"role": "user", "content": "2 + 2?"}]', "tools": '[{"a": {"b": null}}]'}  # a CSV file's
    assert read(as_text)[0] == {"id": "7", "messages": CHAT, "tools": [{"a": {"b": None}}]}
    assert "tools" not in read({"messages": CHAT, "tools": []})[0]
    assert "tools is a dict, expected a list" in refusal({"messages": CHAT, "tools": TOOL})
    assert "each of tools must be an object" in refusal({"messages": CHAT, "tools": ["add"]})
    assert "chat_template_kwargs is a bool" in refusal({"messages": CHAT, "chat_template_kwargs": True})
    assert "tools has no use beside raw text" in refusal({"text": "a", "tools": [TOOL]})


@pytest.mark.parametrize("value", ["", "  \n", [], ["a"], {"a": 1}, True, False, 4, 0.5, float("nan")])
def test_field_cases_a20_what_is_no_response_is_refused(value):
    message = refusal({"text": "a", "teacher_response": value})
    assert message.startswith(("teacher_response is empty", "teacher_response is a "))


def test_field_cases_a20_null_is_no_response():
    assert "teacher_response" not in read({"text": "a", "teacher_response": None})[0]
    assert "teacher_response is missing" in refusal(
        {"text": "a", "teacher_response": None}, require=("teacher_response",)
    )
    assert "content" in refusal({"messages": [*CHAT, {"role": "assistant", "content": None}]})


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, True, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["answer", "id", "domain"])
def test_field_cases_a20_answers_ids_and_domains_are_strings_or_numbers(field, value):
    assert refusal({"text": "a", field: value}).startswith(f"{field} is ")


def test_field_cases_b6_numeric_ids_are_the_same_in_every_format():
    assert [id_text(value) for value in (7, 7.0, "7", 0)] == ["7", "7", "7", "0"]
    with pytest.raises(ValueError, match="id is empty"):
        id_text(" ")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a\ud83d"},
        {"prompt": "a\ud83d"},
        {"text": "a", "id": "\udc00"},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": "a", "name": "\ud800"}]},
        {"messages": [*CHAT, {"role": "assistant", "content": "\ud800"}]},
        {"conversations": [{"from": "human", "value": "\ud800"}]},
        {"text": "a", "teacher_response": "a\ud83d b"},
        {"text": "a", "answer": "\ud83d"},
        {"text": "a", "domain": "\ud83d"},
        {"messages": CHAT, "tools": [{"name": "\ud83d"}]},
        {"messages": CHAT, "chat_template_kwargs": {"\ud83d": 1}},
        {"messages": CHAT, "system": "\ud83d"},
    ],
)
def test_field_cases_b7_lone_surrogates_are_refused(row):
    assert r"holds the lone surrogate \ud" in refusal(row)


@pytest.mark.parametrize(
    ("reason", "kept"),
    [("length", "length"), ("max_tokens", "length"), ("LENGTH", "length"), ("stop", "stop"), ("eos", "eos")],
)
def test_field_cases_a6_finish_reasons_of_rows(reason, kept):
    for name in ("finish_reason", "teacher_finish_reason"):
        assert read({"text": "a", "teacher_response": "b", name: reason})[0]["teacher_finish_reason"] == kept
    assert "teacher_finish_reason" not in read({"text": "a", "finish_reason": reason})[0]
    assert "finish_reason is a list" in refusal({"text": "a", "teacher_response": "b", "finish_reason": [reason]})


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"so $x$ is $\boxed{5}$ or $\boxed{7}$.", "5, 7"),
        (r"so \fbox{3}", "3"),
        (r"so \boxed 3", "3"),
        ("none", None),
        (r"\boxed{" * 20000, None),
    ],
)
def test_field_cases_a11_the_box_of_a_solution_is_found_as_that_of_a_response(solution, answer):
    assert read({"problem": "2 + 2?", "solution": solution})[0].get("answer") == answer
