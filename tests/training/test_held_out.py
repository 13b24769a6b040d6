"""The held-out divergence: against float64 transformers models under different layouts; what a file must hold."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from support.helpers import run_distributed
from support.step_models import layout, load
from support.tiny_models import VOCAB_SIZE, write_model

from megatron_tropd.training.held_out import interval, load_held_out
from megatron_tropd.types import UserError

RESPONSES = ["it is four", "no", "the answer: 17, I think", "forty-two", "!"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student, and a teacher of another width whose vocabulary is padded further."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "student", "llama_tied", seed=1)
    write_model(folder / "teacher", "qwen2", seed=2, hidden_size=64, embeddings=300)
    return folder


def prompts_of(tokenizer):
    from megatron_tropd.types import Prompt

    prompts = [Prompt(f"p{i}", text=f"ask {i}", teacher_response=text) for i, text in enumerate(RESPONSES)]
    for prompt in prompts:
        prompt.tokens = tokenizer.encode_prompt(prompt)
    return prompts


def measure_rank(models, student, teacher):
    from megatron_tropd.config import TrainingConfig
    from megatron_tropd.objective.divergence import Divergence
    from megatron_tropd.parallel import groups as parallel
    from megatron_tropd.teacher.exchange import Exchange
    from megatron_tropd.teacher.hook import TeacherHook
    from megatron_tropd.tokenizers.tokenizer import load_tokenizer
    from megatron_tropd.training.held_out import HeldOut
    from megatron_tropd.training.student import build_student

    layouts = layout(*student, models / "student"), layout(*teacher, models / "teacher")
    groups = parallel.initialize(layouts[0])
    others = parallel.build_groups(layouts[1], groups)
    exchange = None if others is groups else Exchange(groups, others)
    hook = TeacherHook(others, VOCAB_SIZE, topk=0, exchange=exchange).attach(load(layouts[1], others, training=False))
    trained = build_student(load(layouts[0], groups, training=True), TrainingConfig(), groups, VOCAB_SIZE)
    tokenizer = load_tokenizer(models / "student")
    divergence = Divergence("forward_kl", hook.output_weight(trained.vocabulary_width), groups.tp, VOCAB_SIZE)
    options = {"micro_batch_size": 2, "max_response_tokens": 12, "pad_multiple": 16}
    return HeldOut(prompts_of(tokenizer), tokenizer, trained, hook, divergence, **options).measure()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((1, 1, False), (1, 1, False)), ((2, 1, True), (2, 1, True)), ((2, 1, True), (1, 2, False))],
    ids=["single", "tp2", "tp2_teacher_pp2"],
)
def test_the_divergence_is_that_of_the_float64_models(models, student, teacher):
    from transformers import AutoModelForCausalLM

    from megatron_tropd.tokenizers.tokenizer import load_tokenizer

    tokenizer, sums, lengths = load_tokenizer(models / "student"), [], []
    pair = [AutoModelForCausalLM.from_pretrained(models / role, dtype=torch.float64) for role in ("teacher", "student")]
    for prompt in prompts_of(tokenizer):
        response = tokenizer.encode_response(prompt.teacher_response)[:12]
        sequence = torch.tensor([[*prompt.tokens, *response]])
        with torch.no_grad():
            t, s = (model(sequence).logits[0, -len(response) - 1 : -1, :VOCAB_SIZE].log_softmax(-1) for model in pair)
        sums.append((t.exp() * (t - s)).sum().item())
        lengths.append(len(response))
    tokens, mean = sum(lengths), sum(sums) / sum(lengths)
    errors = [total - mean * length for total, length in zip(sums, lengths, strict=True)]
    half = 1.96 * statistics.stdev(errors) * len(errors) ** 0.5 / tokens  # the errors' mean is zero
    for found in run_distributed(measure_rank, student[0] * student[1], models, student, teacher):
        assert found["held_out_tokens"] == tokens
        assert found["held_out_kl"] == pytest.approx(mean, rel=1e-5)
        assert found["held_out_kl_low"] == pytest.approx(mean - half, rel=1e-4)
        assert found["held_out_kl_high"] == pytest.approx(mean + half, rel=1e-4)


def test_one_response_or_a_number_that_is_none_has_no_interval():
    assert interval(0.5, [2.0], [4.0]) == {}
    assert interval(math.nan, [2.0, math.nan], [4.0, 4.0]) == {}  # of training.on_nan=skip
    assert interval(0.5, [1.0, 1.0], [2.0, 2.0]) == {"held_out_kl_low": 0.5, "held_out_kl_high": 0.5}


class _Words:
    def encode_prompt(self, prompt):
        return list(range(len(prompt.text.split())))


def _write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_prompts_are_joined_with_responses_by_id(tmp_path):
    prompts = _write(tmp_path / "prompts.jsonl", [{"id": "a", "text": "one two"}, {"id": "b", "text": "three"}])
    responses = _write(
        tmp_path / "responses.jsonl",
        [
            {"id": "b", "teacher_response": "B"},
            {"id": "z", "teacher_response": "Z"},
            {"id": "a", "teacher_response": "A"},
        ],
    )
    assert [p.teacher_response for p in load_held_out(prompts, responses, _Words())] == ["A", "B"]


def test_a_missing_response_is_named(tmp_path):
    prompts = _write(tmp_path / "prompts.jsonl", [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}])
    responses = _write(tmp_path / "responses.jsonl", [{"id": "a", "teacher_response": "A"}])
    with pytest.raises(UserError, match="no teacher_response for 1 of the 2 prompts .*'b'.*megatron-tropd generate"):
        load_held_out(prompts, responses, _Words())
    with pytest.raises(UserError, match=r"absent.jsonl: no such file; write it with"):
        load_held_out(prompts, tmp_path / "absent.jsonl", _Words())
    with pytest.raises(UserError, match="line 1: teacher_response is missing"):
        load_held_out(prompts, None, _Words())


def test_field_cases_b6_responses_are_joined_by_numeric_ids_and_behind_a_byte_order_mark(tmp_path):
    prompts = _write(tmp_path / "prompts.jsonl", [{"id": 1, "text": "one"}, {"text": "two"}])
    responses = _write(tmp_path / "r.jsonl", [{"id": 2, "teacher_response": "B"}, {"id": "1", "teacher_response": "A"}])
    responses.write_bytes(b"\xef\xbb\xbf" + responses.read_bytes())
    assert [p.teacher_response for p in load_held_out(prompts, responses, _Words())] == ["A", "B"]
