"""Files of teacher responses: joined by id, whole ones first, broken rows by line."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_tropd.config import ColumnsConfig
from megatron_tropd.errors import UserError
from megatron_tropd.prompts.responses import Responses


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_field_cases_b6_ids_are_joined_whatever_their_type(tmp_path):
    rows = [{"id": 1, "teacher_response": "A"}, {"id": "two", "teacher_response": "B"}]
    file = write(tmp_path / "a.jsonl", *rows)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    responses = Responses(file, "guidance.responses")
    assert (responses.get("1"), responses.get("two"), responses.get("3")) == (("A", None), ("B", None), None)
    table = pyarrow.table({"id": [1.0, 2.0], "teacher_response": ["A", "B"]})  # pandas makes numbers with gaps floats
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    responses = Responses(tmp_path / "a.parquet", "guidance.responses")
    assert (responses.get("1")[0], "2" in responses, "2.0" in responses) == ("A", True, False)


def test_field_cases_a6_the_first_whole_response_of_several_is_taken(tmp_path, caplog):
    rows = [("a", "A1", "length"), ("a", "A2", "eos"), ("a", "A3", "eos"), ("b", "B1", "length"), ("b", "B2", "length")]
    rows = [dict(zip(("id", "teacher_response", "finish_reason"), row, strict=True)) for row in rows]
    with caplog.at_level("INFO", logger="megatron_tropd"):
        responses = Responses(write(tmp_path / "a.jsonl", *rows), "guidance.responses")
    assert (responses.get("a"), responses.get("b")) == (("A2", "eos"), ("B1", "length"))
    assert "responses to 2 prompts, 1 of them cut, the first whole one of several for 3 rows more" in caplog.text


def of_batch(body, **fields):
    return {"id": "batch_1", "custom_id": "p", "response": {"status_code": 200, "body": body}, "error": None, **fields}


WHOLE, CUT = {"text": "A", "finish_reason": "stop"}, {"text": "B", "finish_reason": "length"}
OUTPUT = [{"type": "message", "content": [{"type": "output_text", "text": "A"}]}]
MESSAGE = {"role": "assistant", "content": "A", "refusal": None, "reasoning_content": None}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (of_batch({"choices": [{"message": MESSAGE, "finish_reason": "length"}]}), "length"),
        (of_batch({"choices": [WHOLE]}), "stop"),
        (
            of_batch({"choices": [CUT, WHOLE]}),
            "stop",
        ),
        (
            of_batch(
                {
                    "output": [{"type": "message", "content": [{"type": "output_text", "text": "A"}]}],
                    "status": "incomplete",
                }
            ),
            "length",
        ),
        (
            {
                "custom_id": "p",
                "result": {
                    "type": "succeeded",
                    "message": {"content": [{"type": "text", "text": "A"}], "stop_reason": "max_tokens"},
                },
            },
            "length",
        ),
        ({"id": "p", "prompt": "x", "outputs": [{"text": "A", "finish_reason": "length"}]}, "length"),
        ({"id": "p", "generated_text": "A", "details": {"finish_reason": "length"}}, "length"),
        ({"id": "p", "text": "A", "meta_info": {"finish_reason": {"type": "length", "length": 4}}}, "length"),
        ({"id": "p", "teacher_response": "A", "finish_reason": "FinishReason.LENGTH"}, "length"),
        ({"id": "p", "teacher_response": "A", "stop_reason": 151645}, "stop"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_field_cases_a6_what_servers_and_engines_write(tmp_path, row, reason, suffix):
    path = write(tmp_path / "a.jsonl", row)
    if suffix == "parquet":
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert Responses(path, "guidance.responses").get("p") == ("A", reason)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: a JSON list"),
        ({"id": "p"}, "line 2: teacher_response is missing"),
        ({"teacher_response": "x"}, "line 2: id is missing"),
        ({"id": "p", "teacher_response": None}, "line 2: teacher_response is missing"),
        ({"id": "p", "teacher_response": " "}, "line 2: teacher_response is empty"),
        ({"id": "p", "teacher_response": ["x"]}, "line 2: teacher_response is a list"),
        ({"id": True, "teacher_response": "x"}, "line 2: id is a bool"),
        ({"id": "p", "teacher_response": "\ud83d"}, "line 2: teacher_response holds the lone surrogate"),
        (of_batch({"error": {"message": "too long"}}), "the request 'p' failed ({'message': 'too long'}): ask again"),
        (
            of_batch({"choices": [{"message": {**MESSAGE, "reasoning_content": "R"}, "finish_reason": "stop"}]}),
            "the response has reasoning_content apart from its text",
        ),
        ({"custom_id": "p", "result": {"type": "expired"}}, "the request 'p' expired: ask again"),
        ({"id": "p", "response": "x"}, "if response is the teacher's, set data.columns.teacher_response=response"),
    ],
)
def test_field_cases_a20_broken_rows_are_named_by_line(tmp_path, row, message):
    file = write(tmp_path / "a.jsonl", {"id": "o", "teacher_response": "x"}, row)
    with pytest.raises(UserError) as error:
        Responses(file, "guidance.responses")
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_columns_are_taken_from_the_recipe_as_far_as_they_are_there(tmp_path):
    file = write(tmp_path / "a.jsonl", {"id": "p", "response": "x", "why": "length"})
    columns = ColumnsConfig(id="uid", teacher_response="response", finish_reason="why")
    assert Responses(file, "guidance.responses", columns).get("p") == ("x", "length")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_field_cases_b6_other_encodings_are_named(tmp_path, encoding):
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": "p", "teacher_response": "café"}\n', encoding=encoding)
    with pytest.raises(UserError, match=r"UTF-8.*iconv"):
        Responses(file, "guidance.responses")
