"""The CPU's shims of Megatron: collectives of different sizes, which gloo refuses."""

import torch
import torch.distributed as dist
from support.helpers import run_distributed

from megatron_tropd.config import ModelConfig
from megatron_tropd.parallel.groups import initialize


def _gather_of_all_ranks():
    """Exchange tensors of different sizes without naming a group."""
    groups = initialize(ModelConfig())
    mine = torch.full((1 + groups.rank,), float(groups.rank))
    gathered = [torch.empty(1), torch.empty(2)]
    dist.all_gather(gathered, mine)
    scattered = torch.empty(1 + groups.rank)
    dist.reduce_scatter(scattered, [torch.ones(1), torch.ones(2)])
    return [t.tolist() for t in gathered], scattered.tolist()


def test_uneven_collectives_of_all_ranks():
    ranks = run_distributed(_gather_of_all_ranks, 2)
    assert [gathered for gathered, _ in ranks] == [[[0.0], [1.0, 1.0]]] * 2
    assert [scattered for _, scattered in ranks] == [[2.0], [2.0, 2.0]]


def _tensors_in_a_context():
    initialize(ModelConfig())
    with torch.device("meta"):
        made = [torch.empty(2), torch.zeros(2), torch.nn.Linear(2, 2).weight]
    return [tensor.device.type for tensor in made], torch.zeros(1, device="cuda").device.type


def test_a_context_of_another_device_holds():
    ((devices, named),) = run_distributed(_tensors_in_a_context, 1)
    assert devices == ["meta"] * 3
    assert named == "cpu"
