"""Files of teacher responses: joined by id, whole ones first, broken rows by line."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_tropd.config import ColumnsConfig
from megatron_tropd.errors import UserError
from megatron_tropd.responses import Responses


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
