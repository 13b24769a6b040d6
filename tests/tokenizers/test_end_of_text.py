"""End-of-text ids as one event: the losses, gradients and log-probs of a vocabulary in which they are one token."""

import json

import pytest
import torch
from support.helpers import run_distributed
from support.tiny_models import write_model
from support.train_runs import assert_same, overrides_of, records, train_rank

from megatron_tropd.config import GuidanceConfig, ObjectiveConfig
from megatron_tropd.objective.objectives import build_objective
from megatron_tropd.rollout.sampling import draw
from megatron_tropd.tokenizers.end_of_text import EndOfText
from megatron_tropd.types import LOSS_STUDENT, TeacherScores, TrainingBatch

VOCAB, K, ENDS = 20, 6, [2, 9, 14]
OTHERS = [i for i in range(VOCAB) if i not in ENDS]


def material(ends_in_topk):
    """Student and teacher logits [2, 8, V] in float64; `ends_in_topk` of the ends are among the teacher's top-k."""
    generator = torch.Generator().manual_seed(ends_in_topk)
    student, teacher = (torch.randn(2, 8, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher[..., ENDS] = torch.tensor([2.5 if i < ends_in_topk else -4.0 for i in range(3)], dtype=torch.float64)
    labels = torch.randint(VOCAB, (2, 8), generator=generator)
    labels[0, :3] = torch.tensor(ENDS)
    return student.requires_grad_(), teacher, labels


def loss_of(objective, student, teacher, labels, end, k):
    """The objective over gathered log-probs, as the hook and the training step gather them."""
    teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
    label = labels.unsqueeze(-1)
    gathered = teacher.gather(-1, end.extend(label))
    topk = end.merge_topk(*teacher.topk(k), gathered[..., 1:])
    scores = TeacherScores(end.merge(gathered, label).squeeze(-1), topk[1], topk[0])
    positions = torch.arange(8).expand(2, 8)
    kind = torch.full((2, 8), LOSS_STUDENT, dtype=torch.int8)
    batch = TrainingBatch(labels, labels, positions, kind, torch.full((2, 8), -2.0), torch.arange(2))
    ids = objective.ids(batch, scores)
    return objective.loss(end.merge(student.gather(-1, end.extend(ids)), ids), scores, batch, step=0).loss


def coarse(logits):
    """Logits over a vocabulary whose last token is the whole event."""
    return torch.cat([logits[..., OTHERS], logits[..., ENDS].logsumexp(-1, keepdim=True)], -1)


@pytest.mark.parametrize("ends_in_topk", [1, 2, 3])
@pytest.mark.parametrize("tail", ["truncated", "renormalized", "tail"])
@pytest.mark.parametrize("outlier", ["fkl", "mask", "clip", "fkl_advantage"])
def test_losses_and_gradients_are_those_of_one_token(outlier, tail, ends_in_topk):
    config = ObjectiveConfig(outlier=outlier, tail=tail, topk=K, gate="threshold")
    objective = build_objective(config, GuidanceConfig(), seed=3)
    student, teacher, labels = material(ends_in_topk)
    ours = loss_of(objective, student, teacher, labels, EndOfText(ENDS), K)
    (gradient,) = torch.autograd.grad(ours.sum(), student)
    place = {fine: OTHERS.index(fine) if fine in OTHERS else len(OTHERS) for fine in range(VOCAB)}
    mapped = torch.tensor([place[i] for i in labels.flatten().tolist()]).view_as(labels)
    theirs = loss_of(objective, coarse(student), coarse(teacher), mapped, EndOfText(), K - ends_in_topk + 1)
    (expected,) = torch.autograd.grad(theirs.sum(), student)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)
    unmerged = loss_of(objective, student, teacher, labels, EndOfText(), K)
    assert not torch.allclose(unmerged, ours)  # it does matter here


def test_a_drawn_end_has_the_log_prob_of_the_event():
    logits = torch.randn(500, VOCAB, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, plain = draw(logits, uniforms, 0.7)
    same, merged = draw(logits, uniforms, 0.7, end=EndOfText(ENDS))
    assert torch.equal(tokens, same)
    ended = torch.isin(tokens, torch.tensor(ENDS))
    assert ended.any()
    event = (logits / 0.7).log_softmax(-1)[:, ENDS].logsumexp(-1)
    torch.testing.assert_close(merged[ended], event[ended])
    assert torch.equal(merged[~ended], plain[~ended])


def test_one_id_is_nothing_to_merge():
    ids, values = torch.tensor([[3, 4]]), torch.tensor([[-1.0, -2.0]])
    end = EndOfText([3])
    assert not end
    assert end.extend(ids) is ids
    assert end.merge(values, ids) is values


def test_a_run_whose_models_end_differently_is_the_same_in_other_layouts(tmp_path):
    write_model(tmp_path / "student", "llama_tied", seed=1)
    write_model(tmp_path / "teacher", "llama", seed=2, hidden_size=64)
    config = tmp_path / "teacher" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [2, *range(40, 60)]}))
    with open(tmp_path / "prompts.jsonl", "w") as file:
        for i in range(6):
            file.write(json.dumps({"id": str(i), "text": f"add {i}", "teacher_response": "it is"}) + "\n")
    runs = {}
    for name, processes, layout in (
        ("single", 1, []),
        ("other", 2, ["student.tensor_model_parallel_size=2", "teacher.pipeline_model_parallel_size=2"]),
        ("apart", 2, ["teacher.ranks=dedicated"]),
    ):
        run_distributed(train_rank, processes, overrides_of(tmp_path, tmp_path / name, *layout))
        runs[name] = records(tmp_path / name)
    for name in ("other", "apart"):
        assert_same(runs[name], runs["single"], tolerance=2e-4)
    assert sum(r["finish_eos"] for r in runs["single"]) > 0
    assert all(r["logprob_mismatch"] < 1e-4 for r in runs["single"] if "logprob_mismatch" in r)
