"""Prompt sets: what is refused, skipped and counted, that large ones are read as they are drawn, and exact resume."""

import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_tropd.config import ColumnsConfig, DataConfig
from megatron_tropd.errors import UserError
from megatron_tropd.prompts.data_report import understood
from megatron_tropd.prompts.prompt_set import PromptSet
from megatron_tropd.prompts.source import PromptSource, load_prompts


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class _Bytes:
    """One token per byte behind a header of 40; counts its calls, and refuses a system message after others."""

    def __init__(self):
        self.calls = 0

    def encode_prompt(self, prompt):
        self.calls += 1
        messages = prompt.messages or [{"role": "user", "content": prompt.text}]
        if any(message["role"] == "system" for message in messages[1:]):
            raise UserError("the chat template refuses it: system must come first")
        return [*range(40), *"".join(message["content"] for message in messages).encode()]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(count, longest=60):
    generator = random.Random(1)
    return [
        {"id": f"p{i}", "messages": [{"role": "user", "content": f"{i} " + "x" * generator.randint(0, longest)}]}
        for i in range(count)
    ]


def refusal(path, tokenizer=None, remedy="raise data.max_prompt_tokens", **options):
    with pytest.raises(UserError) as error:
        PromptSet(path, tokenizer or _Bytes(), **options).problems.raise_if_any(remedy)
    return str(error.value)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_large_set_is_tokenized_as_it_is_drawn(tmp_path, suffix):
    """Of 30,000 rows the first step tokenizes its own and those among which the longest is looked for."""
    rows = chats(30_000)
    tokenizer = _Bytes()
    prompts = PromptSet(write(tmp_path / f"a.{suffix}", rows), tokenizer, max_tokens=4000)
    prompts.problems.raise_if_any()
    assert len(prompts) == 30_000
    drawn = PromptSource(prompts, seed=3).next(16)
    assert tokenizer.calls < 700
    assert prompts.longest == max(40 + len(row["messages"][0]["content"]) for row in rows)
    for prompt in drawn:
        assert prompt.tokens == _Bytes().encode_prompt(prompt)
        assert prompt.messages == rows[int(prompt.id[1:])]["messages"]
        assert prompt.row == f"{tmp_path / f'a.{suffix}'}:{int(prompt.id[1:]) + 1}"


def test_only_a_ranks_share_is_tokenized(tmp_path):
    path = write(tmp_path / "a.jsonl", chats(3000))
    sources = [PromptSource(PromptSet(path, _Bytes(), max_tokens=4000), seed=3) for _ in range(3)]
    whole = sources[0].next(64)
    before = [source.prompts._tokenizer.calls for source in sources]
    halves = [source.next(64, rank, 2) for rank, source in enumerate(sources[1:])]
    assert [p for half in halves for p in half] == whole
    assert [s.prompts._tokenizer.calls - n for s, n in zip(sources, before, strict=True)] == [0, 32, 32]
    assert sources[1].state_dict() == sources[2].state_dict() == sources[0].state_dict()


def test_of_a_large_set_every_row_that_is_too_long_is_found_up_front(tmp_path):
    rows = chats(5000)
    for place in (17, 4321):
        rows[place]["messages"][0]["content"] = "é" * 100  # 200 bytes, which a bound by characters would pass
    path = write(tmp_path / "a.jsonl", rows)
    assert "2 unusable lines. line 18: the prompt has 240 tokens, more than the 220 allowed; line 4322:" in refusal(
        path, max_tokens=220
    )
    prompts = PromptSet(path, _Bytes(), max_tokens=220, data=DataConfig(skip_long_prompts=True))
    assert (len(prompts.problems), prompts.too_long, len(prompts), prompts.longest) == (0, 2, 4998, 105)
    assert not {"p17", "p4321"} & {prompt.id for prompt in prompts}


def test_of_a_large_set_one_row_per_sequence_of_roles_is_rendered_up_front(tmp_path):
    rows = chats(3000)
    for place in (9, 2999):
        rows[place]["messages"].append({"role": "system", "content": "late"})
    message = refusal(write(tmp_path / "a.jsonl", rows), max_tokens=4000)
    assert "2 unusable lines. line 10: the chat template refuses it" in message
    assert "; line 3000: the chat template" in message


@pytest.mark.parametrize("count", [30, 3000])
def test_long_prompts_and_repeated_ones_are_left_out_and_counted(tmp_path, count):
    rows = chats(count, longest=20)
    rows[3] = {"id": "long", "messages": [{"role": "user", "content": "y" * 500}]}
    rows += [{**rows[0], "id": "again"}, {**rows[0], "id": "with tools", "tools": [{"name": "add"}]}]
    data = DataConfig(skip_long_prompts=True, deduplicate=True)
    prompts = PromptSet(write(tmp_path / "a.jsonl", rows), _Bytes(), max_tokens=200, data=data)
    assert (prompts.too_long, prompts.duplicates, len(prompts)) == (1, 1, count)
    ids = [prompt.id for prompt in prompts]
    assert "with tools" in ids
    assert not {"again", "long"} & set(ids)
    assert [prompt.index for prompt in prompts] == list(range(count))
    text = "\n".join(understood(prompts))
    assert "1 rows are skipped as too long" in text
    assert "1 rows repeat an earlier prompt and are left out" in text
    kept = PromptSet(tmp_path / "a.jsonl", _Bytes())
    assert (kept.duplicates, len(kept)) == (1, count + 2)
    assert "are kept (data.deduplicate=true leaves them out)" in "\n".join(understood(kept))


def test_several_files_are_one_set_with_ids_by_file(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(3)])
    write(tmp_path / "c.parquet", [{"text": "c0", "id": "x"}])
    prompts = PromptSet([str(tmp_path / "[ab].jsonl"), str(tmp_path / "c.parquet")], _Bytes())
    assert [p.id for p in prompts] == [
        "a.jsonl:1",
        "a.jsonl:2",
        "a.jsonl:3",
        "b.jsonl:1",
        "b.jsonl:2",
        "b.jsonl:3",
        "x",
    ]
    assert prompts.part_lengths == [6, 1]
    write(tmp_path / "d.jsonl", [{"text": "d0", "id": "x"}, {"text": ""}])
    message = refusal([str(tmp_path / "c.parquet"), str(tmp_path / "d.jsonl")])
    assert f"line 1: id 'x' is taken by row 1 of {tmp_path / 'c.parquet'}; line 2: text is empty" in message


def test_problems_of_several_files_are_named_by_file(tmp_path):
    for name in ("a.jsonl", "b.parquet"):
        write(tmp_path / name, [{"text": "good"}, {"text": " "}])
    message = refusal([str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")])
    assert f"2 unusable rows. {tmp_path / 'a.jsonl'} line 2: text is empty; {tmp_path / 'b.parquet'} row 2:" in message


def test_columns_that_a_file_does_not_have(tmp_path):
    path = write(tmp_path / "a.parquet", [{"q": "2 + 2?", "a": "4"}])
    data = DataConfig(columns=ColumnsConfig(prompt="question"))
    assert "data.columns.prompt=question" in refusal(path, data=data)
    data = DataConfig(columns=ColumnsConfig(prompt="q", answer="a"))
    assert load_prompts(path, _Bytes(), data=data)[0].answer == "4"
    other = write(tmp_path / "problems.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    problems = load_prompts(other, _Bytes(), require=("answer",), key="evaluation.problems", data=data)
    assert problems[0].answer == "2"


def test_a_column_that_no_line_has_is_refused_though_it_need_not_be_in_each(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b", "topic": "sums"}])
    data = DataConfig(columns=ColumnsConfig(domain="topic"))
    assert [prompt.domain for prompt in load_prompts(path, _Bytes(), data=data)] == [None, "sums"]
    data = DataConfig(columns=ColumnsConfig(domain="subject"))
    assert "data.columns.domain=subject" in refusal(path, data=data)


def test_field_cases_a18_unknown_fields_are_named_and_near_misses_pointed_at(tmp_path):
    row = {"text": "a", "teacher_responce": "b", "level": 3, "chat_template_kwarg": {}, "finish_reason": "stop"}
    lines = list(understood(PromptSet(write(tmp_path / "a.jsonl", [row]), _Bytes())))
    assert lines[0].endswith("1 rows of JSONL, read as raw text: text <- text")
    assert lines[1].endswith("not read: teacher_responce, level, chat_template_kwarg, finish_reason")
    assert "teacher_responce is not read; was teacher_response meant" in lines[2]
    assert "chat_template_kwarg is not read; was chat_template_kwargs meant" in lines[3]
    assert len(lines) == 4


def test_field_cases_b7_a_lone_surrogate_is_named_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "half \\ud83d"}\n{"text": "a", "id": "\\udc00"}\n')
    message = refusal(path)
    assert r"line 2: text holds the lone surrogate \ud83d at character 6" in message
    assert r"line 3: id holds the lone surrogate \udc00" in message


def test_field_cases_a20_responses_are_refused_by_line(tmp_path):
    rows = [{"text": "a", "teacher_response": value} for value in ("fine", None, "", ["a"])]
    message = refusal(write(tmp_path / "a.jsonl", rows))
    assert "2 unusable lines. line 3: teacher_response is empty; line 4: teacher_response is a list" in message
    message = refusal(write(tmp_path / "a.jsonl", rows[:2]), require=("teacher_response",))
    assert "line 2: teacher_response is missing" in message


def test_field_cases_a8_the_digest_covers_contents(tmp_path):
    """Whatever the format: a changed text, response, id, tool or order is another digest."""
    rows = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": f"add {i}"}], "teacher_response": "x"}
        for i in range(3)
    ]

    def digest(rows, name="a.jsonl", data=None):
        return PromptSet(write(tmp_path / name, rows), None, data=data).fingerprint()[0]["digest"]

    same = digest(rows)
    assert digest(rows, "b.parquet") == same
    assert digest([{**row, "level": 3} for row in rows]) == same  # a field that nothing reads
    changes = {
        "text": {"messages": [{"role": "user", "content": "add 7"}]},
        "role": {"messages": [{"role": "system", "content": "add 0"}]},
        "teacher_response": {"teacher_response": "y"},
        "cut": {"finish_reason": "length"},
        "id": {"id": "q"},
        "tools": {"tools": [{"name": "add"}]},
        "kwargs": {"chat_template_kwargs": {"enable_thinking": False}},
        "answer": {"answer": "3"},
    }
    digests = {name: digest([{**rows[0], **change}, *rows[1:]]) for name, change in changes.items()}
    digests |= {"order": digest(rows[::-1]), "fewer": digest(rows[:2]), "same": same}
    assert len(set(digests.values())) == len(digests)


def test_field_cases_a8_a_changed_file_is_refused_by_name(tmp_path):
    files = [str(write(tmp_path / name, [{"id": name, "text": "a"}])) for name in ("a.jsonl", "b.jsonl")]
    state = json.loads(json.dumps(PromptSource(PromptSet(files, _Bytes())).state_dict()))
    PromptSource(PromptSet(files, _Bytes())).load_state_dict(state)
    write(tmp_path / "b.jsonl", [{"id": "b.jsonl", "text": "edited"}])
    with pytest.raises(UserError, match=r"data.prompts has changed .*\(b.jsonl: other content\)"):
        PromptSource(PromptSet(files, _Bytes())).load_state_dict(state)
    with pytest.raises(UserError, match=r"the files were a.jsonl, b.jsonl and are a.jsonl"):
        PromptSource(PromptSet(files[:1], _Bytes())).load_state_dict(state)


def test_field_cases_a8_a_checkpoint_of_ids_alone_is_refused_in_words(tmp_path):
    source = PromptSource(PromptSet(write(tmp_path / "a.jsonl", [{"text": "a"}]), _Bytes()))
    old = {"cursor": 4, "seed": 0, "shuffle": True, "prompts": "0" * 64}
    with pytest.raises(UserError, match="earlier version, which noted only the ids .*checkpoint.resume=false"):
        source.load_state_dict(old)


def test_weights_are_exact_proportions_and_resume(tmp_path):
    files = [str(write(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(5)])) for name in "abc"]

    def source():
        prompts = PromptSet(files, _Bytes())
        return PromptSource(prompts, seed=1, weights=[1, 2, 5], parts=prompts.part_lengths)

    whole = source().next(160)
    names = [prompt.text[0] for prompt in whole]
    for drawn in range(1, 161):
        for name, weight in zip("abc", (1, 2, 5), strict=True):
            assert abs(names[:drawn].count(name) - weight * drawn / 8) < 1
    assert [prompt.index for prompt in whole] == list(range(160))
    of_c = [prompt.text for prompt in whole if prompt.text[0] == "c"]
    assert [sorted(of_c[i : i + 5]) for i in range(0, 100, 5)] == [[f"c{i}" for i in range(5)]] * 20
    assert len({tuple(of_c[i : i + 5]) for i in range(0, 100, 5)}) > 10
    first = source()
    first.next(77)
    resumed = source()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.next(83) == whole[77:]
    other = PromptSource(first.prompts, seed=1, weights=[1, 2, 4], parts=first.prompts.part_lengths)
    with pytest.raises(UserError, match=r"data.weights has changed"):
        other.load_state_dict(first.state_dict())


def test_several_processes_open_a_parquet_file_at_once(tmp_path):
    import multiprocessing

    path = write(tmp_path / "a.parquet", chats(3000))
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(_open_in_cache, [(str(path), str(tmp_path / "shared"))] * 3)
    assert len(set(found)) == 1


def _open_in_cache(path, cache):
    datasets.config.HF_DATASETS_CACHE = cache
    return PromptSet(path, _Bytes()).fingerprint()[0]["digest"]
