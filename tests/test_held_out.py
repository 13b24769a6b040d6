"""The held-out divergence: against float64 over the whole vocabulary, sharded or not, and by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close, run_distributed

from megatron_tropd.held_out import forward_kl, load_held_out
from megatron_tropd.types import UserError

VOCAB = 103  # padded to 104 by the student and to 112 by the teacher


def _logits(rows: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher [rows, 112] and student [rows, 104] in float64; padding columns hold garbage that must not count."""
    generator = torch.Generator().manual_seed(3)
    teacher, student = (3 * torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (112, 104))
    teacher[:, VOCAB:], student[:, VOCAB:] = 50.0, 70.0
    return teacher, student


def _reference(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    t, s = (logits[:, :VOCAB].log_softmax(-1) for logits in (teacher, student))
    return (t.exp() * (t - s)).sum(-1)


def test_one_row_by_hand():
    teacher = torch.tensor([[math.log(3.0), 0.0]])  # 3/4, 1/4
    student = torch.tensor([[0.0, 0.0]])  # 1/2, 1/2
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert forward_kl(teacher, student, None, 2).item() == pytest.approx(expected, abs=1e-6)


def test_equal_models_diverge_by_nothing():
    teacher, _ = _logits()
    assert forward_kl(teacher, teacher.clone(), None, VOCAB).abs().max() < 1e-12


@pytest.mark.parametrize("chunk_rows", [1, 16, 512])
def test_paddings_of_different_width_and_any_chunk(chunk_rows):
    teacher, student = _logits()
    assert_close(forward_kl(teacher, student, None, VOCAB, chunk_rows), _reference(teacher, student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_logits_are_read_in_fp32(dtype):
    teacher, student = (logits.to(dtype) for logits in _logits())
    result = forward_kl(teacher, student, None, VOCAB)
    assert result.dtype == torch.float32
    assert_close(result, _reference(teacher.double(), student.double()))


def _sharded_kl(dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    dist.init_process_group("gloo")
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    teacher, student = (logits.to(dtype).chunk(size, dim=1)[rank] for logits in _logits())
    return forward_kl(teacher, student, group, VOCAB), rank


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sharded_vocabulary(world_size, dtype):
    teacher, student = (logits.to(dtype).double() for logits in _logits())
    for kl, _ in run_distributed(_sharded_kl, world_size, dtype):
        assert_close(kl, _reference(teacher, student), dtype)


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
