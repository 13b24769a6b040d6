"""Rows as well-known data sets have them: which columns are read, and what must not be taught or dropped."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_tropd.data.choices import letter
from megatron_tropd.prompts.data_report import understood
from megatron_tropd.prompts.prompt_set import PromptSet


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def open_rows(tmp_path, rows, suffix="jsonl"):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptSet(str(path), None)


def fields(prompt):
    names = ("id", "messages", "text", "tools", "answer", "teacher_response", "teacher_finish_reason")
    return {name: getattr(prompt, name) for name in names if getattr(prompt, name) is not None}


OPTIONS = "2 + 2?\n\nA. 3\nB. 4"
SETS = {
    "AIME 2024": (
        {"ID": "2024-I-1", "Problem": "2 + 2?", "Solution": r"\boxed{5}", "Answer": 4},
        {"id": "2024-I-1", "messages": [user("2 + 2?")], "answer": "4"},
    ),
    "NuminaMath": (
        {
            "source": "a",
            "problem": "2 + 2?",
            "solution": r"\boxed{4}",
            "messages": [user("2 + 2?"), assistant("It is 4.")],
        },
        {"messages": [user("2 + 2?")], "answer": "4", "teacher_response": "It is 4."},
    ),
    "OpenR1-Math": (
        {
            "problem": "2 + 2?",
            "answer": "4",
            "generations": ["a"],
            "messages": [user("Think. 2 + 2?"), assistant("It is 4.")],
        },
        {"messages": [user("Think. 2 + 2?")], "answer": "4", "teacher_response": "It is 4."},
    ),
    "UltraChat": (
        {"prompt": "Hi", "prompt_id": "a", "messages": [user("Hi"), assistant("Ho"), user("2 + 2?"), assistant("4")]},
        {"messages": [user("Hi"), assistant("Ho"), user("2 + 2?")], "teacher_response": "4"},
    ),
    "Alpaca with its text": (
        {"instruction": "Add.", "input": "2, 2", "output": "4", "text": "## Add.\n## 2, 2\n## 4"},
        {"messages": [user("Add.\n\n2, 2")], "teacher_response": "4"},
    ),
    "Magpie": (
        {
            "instruction": "2 + 2?",
            "response": "4",
            "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
        },
        {"messages": [user("2 + 2?")], "teacher_response": "4"},
    ),
    "LIMA": (
        {"conversations": ["Hi", "Ho", "2 + 2?", "4"], "source": "a"},
        {"messages": [user("Hi"), assistant("Ho"), user("2 + 2?")], "teacher_response": "4"},
    ),
    "Capybara": (
        {"conversation": [{"input": "Hi", "output": "Ho"}, {"input": "2 + 2?", "output": "4"}]},
        {"messages": [user("Hi"), assistant("Ho"), user("2 + 2?")], "teacher_response": "4"},
    ),
    "LLaMA-Factory's history": (
        {"instruction": "2 + 2?", "input": "", "output": "4", "history": [["Hi", "Ho"]]},
        {"messages": [user("Hi"), assistant("Ho"), user("2 + 2?")], "teacher_response": "4"},
    ),
    "role and value": (
        {"conversations": [{"role": "user", "value": "2 + 2?"}, {"role": "assistant", "value": "4"}]},
        {"messages": [user("2 + 2?")], "teacher_response": "4"},
    ),
    "MMLU": (
        {"question": "2 + 2?", "subject": "sums", "choices": ["3", "4"], "answer": 1},
        {"messages": [user(OPTIONS)], "answer": "B"},
    ),
    "MMLU-Pro": (
        {"question": "2 + 2?", "options": ["3", "4"], "answer": "B", "answer_index": 1},
        {"messages": [user(OPTIONS)], "answer": "B"},
    ),
    "ARC": (
        {"question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"},
        {"messages": [user(OPTIONS)], "answer": "B"},
    ),
    "MedQA": (
        {"question": "2 + 2?", "options": {"A": "3", "B": "4"}, "answer": "4", "answer_idx": "B"},
        {"messages": [user(OPTIONS)], "answer": "B"},
    ),
    "AQuA": (
        {"question": "2 + 2?", "options": ["A)3", "B)4"], "answer": "B"},
        {"messages": [user(OPTIONS)], "answer": "B"},
    ),
    "options in the question": (
        {"question": OPTIONS, "options": ["3", "4"], "answer": "B"},
        {"messages": [user(OPTIONS)], "answer": "B"},
    ),
    "Skywork-OR1": (
        {"prompt": [user("2 + 2?")], "reward_model": {"ground_truth": '["\\\\frac{8}{2}"]', "style": "rule"}},
        {"messages": [user("2 + 2?")], "answer": r"\frac{8}{2}"},
    ),
    "a response with its prompt": (
        {"prompt": [user("2 + 2?")], "response": [user("2 + 2?"), assistant("4")]},
        {"messages": [user("2 + 2?")], "teacher_response": "4"},
    ),
    "OpenAI's functions": (
        {"messages": [user("2 + 2?")], "functions": [{"name": "add"}]},
        {"messages": [user("2 + 2?")], "tools": [{"type": "function", "function": {"name": "add"}}]},
    ),
    "tools as JSON texts": (
        {"messages": [user("2 + 2?")], "tools": ['{"type": "function", "function": {"name": "add"}}']},
        {"messages": [user("2 + 2?")], "tools": [{"type": "function", "function": {"name": "add"}}]},
    ),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", SETS)
def test_field_cases_well_known_data_sets(tmp_path, name, suffix):
    row, expected = SETS[name]
    prompts = open_rows(tmp_path, [row], suffix)
    prompts.problems.raise_if_any()
    assert fields(prompts[0]) == {"id": "1", **expected}


@pytest.mark.parametrize(
    ("row", "responses"),
    [
        ({"prompt": "2 + 2?", "completion": "5", "label": False}, []),
        ({"prompt": [user("2 + 2?")], "completion": [assistant("5")], "label": False}, []),
        ({"prompt": "2 + 2?", "completion": "4", "label": True}, ["4"]),
        ({"messages": [user("2 + 2?"), assistant("5", weight=0)]}, []),
        ({"messages": [user("2 + 2?"), assistant("4", weight=1)]}, ["4"]),
        ({"messages": [user("2 + 2?"), assistant("5", train=False)]}, []),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_field_cases_a17_a_response_marked_as_bad_is_not_taught(tmp_path, row, responses, suffix):
    prompts = open_rows(tmp_path, [row], suffix)
    prompts.problems.raise_if_any()
    assert fields(prompts[0])["messages"] == [user("2 + 2?")]
    assert [p.teacher_response for p in prompts if p.teacher_response is not None] == responses
    assert any("1 responses are not used" in line for line in understood(prompts)) == (not responses)


@pytest.mark.parametrize("text", ["[ 1, 2 ] + [3] = ?", '[{"x": 1}] is what?', '[{"x": 1}]', "[[1]]", " [ ] todo"])
def test_a_prompt_that_begins_with_a_bracket_is_text(tmp_path, text):
    prompts = open_rows(tmp_path, [{"prompt": text}])
    prompts.problems.raise_if_any()
    assert prompts[0].messages == [user(text)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_field_cases_a18_tool_calls_have_objects_as_arguments_and_no_empty_fields(tmp_path, suffix):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    row = {"messages": [{**user("2 + 2?"), "tool_calls": None}, {**assistant(None), "tool_calls": [call]}, user("So?")]}
    prompts = open_rows(tmp_path, [row], suffix)
    prompts.problems.raise_if_any()
    asked, calls, _ = prompts[0].messages
    assert asked == user("2 + 2?")
    assert calls["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "2 + 2?", "choices": ["3", "4"], "answer": 2}, "answer '2' is none of the options A, B"),
        ({"question": "2 + 2?", "choices": [["3"], ["4"]], "answer": 1}, "choices holds an option that is no text"),
        ({"prompt": "Hi", "messages": [user("2 + 2?"), assistant("4")]}, "found messages and prompt"),
        ({"messages": [user("2 + 2?"), assistant("4")], "response": "5"}, "there are a teacher_response and an"),
        ({"instruction": "a", "history": "b"}, "history is no list of [question, response] pairs"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, row, message):
    assert message in open_rows(tmp_path, [row]).problems.first[0].message


@pytest.mark.parametrize(
    ("answer", "expected"), [(1, "B"), (1.0, "B"), ("1", "B"), ("B", "B"), (" B ", "B"), ("4", "B"), ("3", "A")]
)
def test_answers_of_multiple_choice(answer, expected):
    assert letter(answer, {"A": "3", "B": "4"}) == expected


def test_field_cases_a10_rows_of_a_json_array_on_one_line_have_ids_of_their_own(tmp_path):
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"instruction": text, "output": text.upper()} for text in "abc"]))
    prompts = PromptSet(str(path), None)
    prompts.problems.raise_if_any()
    assert [prompt.id for prompt in prompts] == ["1", "2", "3"]
    path.write_text(json.dumps([{"id": "same", "text": text} for text in "abc"]))
    assert "id 'same' is taken by row 1" in PromptSet(str(path), None).problems.first[0].message


def test_a_list_of_strings_is_a_conversation_in_columns_of_conversations_alone(tmp_path):
    assert "each of prompt must be" in open_rows(tmp_path, [{"prompt": ["a", "b"]}]).problems.first[0].message


def test_what_a_question_may_be_about_is_pointed_at(tmp_path):
    lines = list(understood(open_rows(tmp_path, [{"question": "Where?", "context": "Bob is in Bonn."}])))
    assert any("the column context is no part of the prompt" in line for line in lines)


def test_a_parquet_file_without_a_known_column_has_its_columns_named(tmp_path):
    message = open_rows(tmp_path, [{"chosen": "a", "rejected": "b"}], "parquet").problems.first[0].message
    assert message.endswith("name its column by data.columns.prompt, of chosen, rejected")
