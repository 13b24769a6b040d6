"""The gate by hand, its sampling rate, and the counter-based random numbers behind it and behind the sampler."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tropd.counter_rng import STREAM_GATE, STREAM_SAMPLING, counter_uniform
from megatron_tropd.objective.trust_region import trust_gate

# Of seed, stream and step, also beyond int64, at (sample 0, position 5) and (2^62, -1).
PINNED = {
    (0, 1, 0): ["0x1.5e23e8f3630a9p-1", "0x1.04ddfd0be621dp-1"],
    (7, 1, 3): ["0x1.ae309a4150c9ep-2", "0x1.2474a63fc82b0p-3"],
    (-5, 2, 10): ["0x1.f423e35b449a2p-2", "0x1.34554297c4018p-2"],
    (2**63 - 1, 2, 2**40): ["0x1.db7247d091a14p-3", "0x1.cd90b1fbf9dd4p-2"],
    (2**64 + 3, 1, -(2**62)): ["0x1.91db436adf9e7p-1", "0x1.25116ef1b0400p-11"],
}


def gate(kind: str, student, teacher, **options):
    student, teacher = torch.tensor([student]), torch.tensor([teacher])
    where = {"sample_ids": torch.tensor([[3]]), "positions": torch.arange(student.size(1))[None]}
    return trust_gate(student, teacher, kind, 0.5, **{"seed": 1, "step": 2, **where, **options})


def test_rho_is_the_probability_ratio_capped_at_one():
    found = gate("soft", [math.log(0.5), math.log(0.2), math.log(0.5)], [math.log(0.1), math.log(0.4), math.log(0.5)])
    assert found.rho[0].tolist() == pytest.approx([0.2, 1.0, 1.0])
    assert torch.equal(found.weight, found.rho)


def test_the_threshold_gate_keeps_equality_inside():
    found = gate("threshold", [0.0, 0.0, 0.0], [math.log(0.49), math.log(0.5), math.log(0.51)])
    assert found.weight[0].tolist() == [0.0, 1.0, 1.0]


def test_the_bernoulli_gate_lets_in_a_share_of_rho():
    for rho in (0.05, 0.5, 0.9, 1.0):
        found = gate("bernoulli", [0.0] * 40_000, [math.log(rho)] * 40_000)
        assert found.weight.mean().item() == pytest.approx(rho, abs=4 * math.sqrt(rho * (1 - rho) / 40_000) + 1e-9)


def test_impossible_tokens_are_outliers_and_certain_ones_never():
    found = gate("bernoulli", [-1.0, -1.0], [-math.inf, -0.5])
    assert found.rho[0].tolist() == [0.0, 1.0]
    assert found.weight[0].tolist() == [0.0, 1.0]


def test_an_unknown_gate_is_refused():
    with pytest.raises(ValueError, match="none of bernoulli"):
        gate("hard", [0.0], [0.0])


def test_numbers_do_not_depend_on_the_batch_and_its_order():
    ids, positions = torch.arange(50)[:, None], torch.arange(30)[None]
    everything = counter_uniform(7, STREAM_GATE, 3, ids, positions)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(counter_uniform(7, STREAM_GATE, 3, ids[order], positions), everything[order])
    assert counter_uniform(7, STREAM_GATE, 3, ids[9], positions[0, 4:5]).item() == everything[9, 4].item()


def test_every_argument_changes_the_numbers():
    base = (7, STREAM_GATE, 3, torch.tensor([5]), torch.tensor([11]))
    others = [
        (8, *base[1:]),
        (7, STREAM_SAMPLING, *base[2:]),
        (7, STREAM_GATE, 4, *base[3:]),
        (*base[:3], torch.tensor([6]), base[4]),
        (*base[:4], torch.tensor([12])),
    ]
    numbers = [counter_uniform(*arguments).item() for arguments in (base, *others)]
    assert len(set(numbers)) == len(numbers)


def test_numbers_are_uniform_and_independent():
    numbers = counter_uniform(0, STREAM_SAMPLING, 0, torch.arange(400)[:, None], torch.arange(500)[None])
    assert numbers.dtype == torch.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, bins=100, min=0, max=1)
    chi_square = ((counts - 2000) ** 2 / 2000).sum().item()
    assert chi_square < 160  # 99 degrees of freedom: 1 in 10,000
    for shifted in (numbers[:, 1:] * numbers[:, :-1], numbers[1:] * numbers[:-1]):
        assert shifted.mean().item() == pytest.approx(0.25, abs=0.003)


def test_numbers_are_pinned():
    """A change would change every run that resumes."""
    numbers = counter_uniform(1234, STREAM_GATE, 10, torch.tensor([0, 1]), torch.tensor([5, 5]))
    assert numbers.tolist() == [0.6516678428201828, 0.8997756401215906]
    for (seed, stream, step), pinned in PINNED.items():
        numbers = counter_uniform(seed, stream, step, torch.tensor([0, 2**62]), torch.tensor([5, -1]))
        assert [number.hex() for number in numbers.tolist()] == pinned


class OperatorCalls(TorchDispatchMode):
    """Counts operators, each of which is a kernel's launch on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_draw_takes_few_operators():
    ids, positions = torch.arange(4)[:, None], torch.arange(8)[None]
    with OperatorCalls() as calls:
        counter_uniform(7, STREAM_SAMPLING, 3, ids, positions)
    assert 0 < calls.count <= 30
