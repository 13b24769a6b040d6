"""`megatron-tropd data`: the report on good and bad files, and its exit status."""

import json

import pytest
from support.tiny_models import make_tokenizer

from megatron_tropd.cli import main
from megatron_tropd.prompts.data_view import visible
from megatron_tropd.tokenizers.tokenizer import HuggingFaceTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(str(folder))
    return folder


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def run(capsys, *words):
    status = main(["data", *map(str, words)])
    return status, capsys.readouterr().out


def test_a_good_file(tmp_path, capsys, tokenizer):
    rows = [{"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}", "level": 1} for i in range(9)] * 2
    status, text = run(capsys, write(tmp_path / "a.jsonl", rows), "--tokenizer", tokenizer, "data.max_prompt_tokens=99")
    assert status == 0
    assert f"{tmp_path / 'a.jsonl'}: JSONL, 18 rows\n  layout    GSM8K\n" in text
    assert "columns   prompt <- question, answer <- answer\n  not read  level\n" in text
    assert text.count("\n  answer: ") == 3
    assert "0 + 1?" in text
    assert "usable      18 of 18 rows\nduplicates  9 rows" in text
    assert "too long    0; the limit is 99 tokens (data.max_prompt_tokens)" in text
    assert text.endswith("problems    none\n")


def test_problems_are_listed_by_row(tmp_path, capsys, tokenizer):
    rows = ["{", {"text": "x" * 50}, {"text": "fine", "teacher_response": "y", "finish_reason": "length"}]
    path = write(tmp_path / "a.jsonl", rows)
    status, text = run(capsys, "data.max_prompt_tokens=20", path, "--tokenizer", tokenizer)
    assert status == 1
    assert "problems    2\n  line 1: not valid JSON" in text
    assert "line 2: the prompt has" in text
    assert "teacher response, which was cut: no EOS follows: y" in text
    assert "1 row with a teacher's, 1 of them cut" in text
    status, text = run(
        capsys, path, "--tokenizer", tokenizer, "data.max_prompt_tokens=20", "data.skip_long_prompts=true"
    )
    assert "problems    1\n" in text
    assert "too long    1;" in text


def test_without_a_tokenizer_messages_are_shown_and_each_row_is_counted_once(tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": "hi \x1b[31m"}]}, {"text": "raw"}, {"text": "rough"}]
    status, text = run(capsys, write(tmp_path / "a.jsonl", rows))
    assert status == 0
    assert "raw text (2 rows), messages (1 row)" in text
    assert "[user] hi \\x1b[31m" in text
    assert "not measured: give --tokenizer" in text


def test_several_files_and_columns(tmp_path, capsys):
    write(tmp_path / "a.jsonl", [{"q": "x"}])
    write(tmp_path / "b.jsonl", [{"q": "y"}])
    status, text = run(capsys, tmp_path / "a.jsonl", "data.columns.prompt=q", tmp_path / "b.jsonl")
    assert (status, text.count("columns   prompt <- q")) == (0, 2)
    assert run(capsys, tmp_path / "*.jsonl", "data.columns.prompt=q")[0] == 0
    assert run(capsys, tmp_path / "a.jsonl")[0] == 1
    assert run(capsys, tmp_path / "nowhere.jsonl")[0] == 2
    assert run(capsys)[0] == 2


def test_special_tokens_are_visible_and_the_middle_of_long_texts_is_not():
    tokenizer = HuggingFaceTokenizer(make_tokenizer(), set())
    ids = [tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eos_id]
    pieces = tokenizer.pieces()
    ends = [pieces[tokenizer.bos_id], pieces[tokenizer.eos_id]]
    assert visible(ids, tokenizer) == f"{ends[0]}a b{ends[1]}"
    assert visible(ids, tokenizer, ("<<", ">>")) == f"<<{ends[0]}>>a b<<{ends[1]}>>"
    text = visible([*tokenizer.encode("x" * 9000), tokenizer.eos_id], tokenizer)
    assert text.endswith(f"x{ends[1]}")
    assert "characters ...]" in text
    assert len(text) < 1600
