"""The rollouts' benchmark: its table and JSON, its refusals, and bounds for what a decode step asks of the device."""

import json

import pytest
import torch
import torch.distributed as dist
from support.helpers import run_distributed

from megatron_tropd.rollout.operation_counts import OperationCounts

LAYERS = 4  # of the shipped student
FEW = ["--prompts", "8", "--new-tokens", "6", "--repeats", "1"]


def benchmark_rank(options):
    from megatron_tropd.rollout.benchmark import main

    return main(options)


@pytest.mark.parametrize("size", [1, 2])
def test_a_decode_step_asks_for_no_more_than_it_must(size, tmp_path):
    options = [*FEW, "--json", str(tmp_path / "found.json"), "--tensor-model-parallel-size", str(size)]
    assert run_distributed(benchmark_rank, size, options) == [0] * size
    found = json.loads((tmp_path / "found.json").read_text())
    counts = found["per decode step"]
    assert 0 < counts["operations"] <= 100 * LAYERS  # about 350 with megatron-core 0.16.1
    assert 0 < counts["synchronisations"] <= 24  # the engine's, but for one of the rows and one of the tokens
    # Two all-reduces per layer, one of the embedding, a gather of the logits, and the tokens to the other rank.
    assert counts["collectives"] == (0 if size == 1 else 2 * LAYERS + 3)
    names = [cost["name"] for cost in found["costs"]]
    peers = ["Hugging Face generate", "its forward pass alone"]
    assert names == ["this package", *(peers if size == 1 else [])]
    assert all(cost["tokens_per_second"] > 0 for cost in found["costs"] if "forward" not in cost["name"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--new-tokens", "2"], "--new-tokens is at least 3"),
        (["--samples", "0"], "are at least 1"),
    ],
)
def test_sizes_that_measure_nothing_are_refused(options, message, capfd):
    with pytest.raises(SystemExit, match="2"):
        benchmark_rank(options)
    assert message in capfd.readouterr().err


def test_sequences_beyond_the_context_are_refused():
    assert run_distributed(benchmark_rank, 1, [*FEW, "--prompt-tokens", "100000"]) == [2]


def counted_rank():
    dist.init_process_group("gloo")
    values = torch.arange(6.0)
    with OperationCounts() as counts:
        doubled = values.view(2, 3)[1] * 2
        assert doubled.tolist() == [6.0, 8.0, 10.0]
        assert doubled.sum().item() == 24.0
        dist.all_reduce(doubled)
    values.tolist()
    values.add_(1)
    return counts.totals()


@torch.inference_mode()
def test_inference_mode_counts_the_same():
    values = torch.arange(6.0)
    with OperationCounts() as counts:
        same = torch.nn.functional.dropout(values.to(torch.float32), training=False).view_as(values).flatten().float()
        doubled = same * 2
        assert doubled.sum().item() == 30.0
        assert doubled[doubled > 4].numel() == 3
    # times, sum, greater; item, a mask
    assert counts.totals() == {"operations": 3, "synchronisations": 2, "collectives": 0}


def test_operations_are_counted_by_kind():
    assert run_distributed(counted_rank, 1) == [{"operations": 2, "synchronisations": 2, "collectives": 1}]
