"""A teacher on dedicated ranks against the float64 model: scores, hidden states, its output layer in new shards."""

import os

import pytest
import torch
from support.helpers import run_distributed
from support.step_models import layout, load, make_batch
from support.tiny_models import VOCAB_SIZE, write_model

WIDTH = 72  # of a shard of the student's vocabulary, padded to 144


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "teacher", "llama", hidden_size=64)
    return folder


def remote_rank(folder, teacher, packed):
    """Two ranks of a student under TP, and behind them the teacher's."""
    from megatron_tropd.parallel import groups as parallel
    from megatron_tropd.parallel.partition import Partition
    from megatron_tropd.teacher.exchange import Exchange
    from megatron_tropd.teacher.hook import TeacherHook
    from megatron_tropd.teacher.remote import RemoteTeacher, serve

    partition = Partition(int(os.environ["RANK"]), 2, int(os.environ["WORLD_SIZE"]))
    config = layout(*(teacher if partition.is_teacher else (2, 1)), False, folder / "teacher")
    groups = parallel.initialize(config, partition=partition)
    partition.meet()
    if partition.is_teacher:
        hook = TeacherHook(groups, VOCAB_SIZE, topk=4, exchange=Exchange(None, groups, partition.bridge))
        return serve(hook.attach(load(config, groups, training=False)), partition)
    exchange = Exchange(groups, None, partition.bridge)
    remote = RemoteTeacher(partition, exchange, topk=4, hidden_size=64, dtype=torch.float32)
    with remote.weights():
        scores = remote.score(make_batch(), 2, packed)
        hidden, weight = remote.hidden_states(make_batch(), 2), remote.output_weight(WIDTH)
    scores.topk_ids = scores.topk_ids.clone()  # torch.save takes no views of one storage in two dtypes
    partition.order("stop", summary={"steps": 3})
    return scores, hidden, weight


@pytest.mark.parametrize(
    ("teacher", "packed"), [((1, 1), None), ((2, 1), 40), ((1, 2), None)], ids=["single", "tp2_packed", "pp2"]
)
def test_what_the_student_gets_is_the_float64_models(folder, teacher, packed):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64, attn_implementation="eager")
    batch = make_batch()
    with torch.no_grad():
        logits = model(batch.tokens).logits
    logprobs, kept = logits.log_softmax(-1), batch.loss_kind != 0
    found = run_distributed(remote_rank, 2 + teacher[0] * teacher[1], folder, teacher, packed)
    assert all(summary == {"steps": 3} for summary in found[2:])
    output_layer = torch.cat([weight for *_, weight in found[:2]])
    assert not output_layer[VOCAB_SIZE:].any()
    close = {"rtol": 1e-5, "atol": 2e-5}
    for scores, hidden, _ in found[:2]:
        sampled = logprobs.gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(scores.logprobs.double()[kept], sampled[kept], **close)
        torch.testing.assert_close(scores.topk_logprobs.double()[kept], logprobs.topk(4).values[kept], **close)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        torch.testing.assert_close(scores.entropy.double()[kept], entropy[kept], **close)
        ours = hidden.double() @ output_layer.double().t()
        torch.testing.assert_close(ours[kept][:, :VOCAB_SIZE], logits[kept][:, :VOCAB_SIZE], **close)
        assert not hidden[~kept].any()
