"""Samples: every token's own text and numbers, and of the teacher's alternatives those that it holds possible."""

import json
import math

import pytest
import torch
from support.tiny_models import write_model

from megatron_tropd.objective.objectives import TokenDetails
from megatron_tropd.objective.trust_region import TrustGate
from megatron_tropd.records.metrics import MetricsWriter, read_records
from megatron_tropd.reporting.rollout_records import sample_records
from megatron_tropd.tokenizers.tokenizer import load_tokenizer
from megatron_tropd.types import Prompt, Rollouts, TeacherScores


@pytest.fixture
def tokenizer(tmp_path):
    write_model(tmp_path / "model", "llama_tied", seed=1)
    return load_tokenizer(tmp_path / "model")


def test_alternatives_that_the_teacher_rules_out_are_none(tokenizer, tmp_path):
    sequence = tokenizer.encode("ab c")
    places = len(sequence)
    rollouts = Rollouts(
        prompts=[Prompt(id="p", tokens=sequence[:1])],
        sample_ids=[0],
        tokens=[sequence],
        lengths=[places],
        prompt_lengths=[1],
        prefix_lengths=[1],
        logprobs=[[0.0] * places],
        finish_reasons=["length"],
        texts=["b c"],
    )
    student, teacher = torch.full((1, places), -1.0), torch.full((1, places), -math.inf)
    gate = TrustGate(torch.zeros(1, places), torch.zeros(1, places))
    listed = torch.tensor([-0.25, -1.5, *[-math.inf] * 6]).expand(1, places, 8)
    scores = TeacherScores(teacher, torch.tensor(sequence[0]).expand(1, places, 8), listed)
    (record,) = sample_records(rollouts, TokenDetails(student, teacher, gate), tokenizer, 1, scores)
    own = [tokenizer.decode_response([token]) for token in sequence]
    (dropped,) = sample_records(rollouts, TokenDetails(student, teacher, gate), tokenizer, 1, scores, [True])
    assert dropped["tokens"] == [{"text": text, "kind": "dropped"} for text in own[1:]]
    assert [token["text"] for token in record["tokens"]] == own[1:]
    assert [token["kind"] for token in record["tokens"]] == ["guidance", *["outlier"] * (places - 2)]
    for token in record["tokens"][1:]:
        assert token["alternatives"] == [[own[0], -0.25], [own[0], -1.5]]
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write_samples(0, [record])
    (written,) = read_records(tmp_path / "run" / "samples.jsonl")
    assert written["tokens"][1]["teacher_logprob"] is None
    assert json.loads(json.dumps(written, allow_nan=False)) == written
