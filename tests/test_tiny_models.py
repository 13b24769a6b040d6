"""The shipped small teacher and student: size, tokenizer, problems, and how good and how bad they are."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

TINY = Path(__file__).parents[1] / "examples" / "tiny"


@pytest.fixture(scope="module")
def make_tiny():
    spec = importlib.util.spec_from_file_location("make_tiny", TINY / "make_tiny.py")
    module = sys.modules["make_tiny"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / name).read_text().splitlines()]


def question(record: dict) -> str:
    (message,) = record["messages"]
    assert message["role"] == "user"
    return message["content"]


def test_everything_together_is_at_most_10_mb():
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 10_000_000


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_the_tokenizer_folder_encodes_as_the_bare_sentencepiece_model(kind):
    tokenizer = AutoTokenizer.from_pretrained(TINY / kind)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(TINY / kind / "tokenizer.model"))
    assert len(tokenizer) == pieces.vocab_size()
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))] == [
        pieces.id_to_piece(i) for i in range(len(tokenizer))
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (pieces.bos_id(), pieces.eos_id())
    texts = ["", " ", " a", "a ", "  a  b", "\n", "\n\n a", " \n \n", "12+7=19\n#### 19", "Zebra? {ok}~", "naïve 日本x"]
    texts += [question(record) for record in read("problems.jsonl")]
    texts += [record["teacher_response"] for record in read("prompts.jsonl")]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == pieces.encode(text), text
        if 0 not in ids:  # an unknown character is printed differently
            assert tokenizer.decode(ids) == pieces.decode(ids) == text


def test_teacher_and_student_share_their_tokenizer():
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (TINY / "teacher" / name).read_bytes() == (TINY / "student" / name).read_bytes()


def test_the_chat_template_writes_the_prompt_of_the_training_data(make_tiny):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "student")
    record = read("problems.jsonl")[0]
    chat = tokenizer.apply_chat_template(record["messages"], add_generation_prompt=True, return_dict=False)
    assert chat == tokenizer(make_tiny.prompt_text(question(record))).input_ids
    whole = [*record["messages"], {"role": "assistant", "content": "#### 5"}]
    ids = tokenizer.apply_chat_template(whole, return_dict=False)
    response = [*tokenizer("#### 5", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert ids[: len(chat) + len(response)] == chat + response


def test_answers_are_right_and_prompts_and_problems_are_disjoint(make_tiny):
    prompts, problems = read("prompts.jsonl"), read("problems.jsonl")
    assert len(prompts) >= 1900
    assert 200 <= len(problems) <= 300
    numbers = {}
    for record in (*prompts, *problems):
        start, changes = make_tiny.parse(question(record))
        assert str(start + sum(changes)) == record["answer"]
        numbers[start, changes] = record["id"]
    assert len(numbers) == len(prompts) + len(problems)
    assert len(set(numbers.values())) == len(numbers)


def test_most_teacher_responses_reach_the_answer(make_tiny):
    prompts = read("prompts.jsonl")
    responses = [record["teacher_response"] for record in prompts]
    assert make_tiny.accuracy(responses, [int(record["answer"]) for record in prompts]) >= 0.9


def test_the_careless_solver_forgets_carries_and_borrows(make_tiny):
    assert [make_tiny.forget_carry(34, 27), make_tiny.forget_carry(42, -18)] == [51, 36]
    assert [make_tiny.forget_carry(34, 25), make_tiny.forget_carry(47, -12)] == [59, 35]
    problem = make_tiny.Problem("", 34, (27, -15))
    assert make_tiny.solution(problem) == "34+27=61\n61-15=46\n#### 46"


@pytest.mark.parametrize(("kind", "low", "high"), [("teacher", 0.9, 1.0), ("student", 0.05, 0.4)])
def test_greedy_accuracy_on_unseen_problems(make_tiny, kind, low, high):
    torch.set_num_threads(1)
    problems = read("problems.jsonl")
    model = LlamaForCausalLM.from_pretrained(TINY / kind, dtype=torch.float32)
    assert model.config.tie_word_embeddings == (kind == "student")
    responses = make_tiny.respond(model, AutoTokenizer.from_pretrained(TINY / kind), [question(p) for p in problems])
    assert low <= make_tiny.accuracy(responses, [int(p["answer"]) for p in problems]) <= high
