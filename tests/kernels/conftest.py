"""Kernels run with poisoned memory."""

import pytest
import torch

from megatron_tropd.kernels import linear


@pytest.fixture(autouse=True)
def chunks_of_any_size(monkeypatch):
    """Let tests cut logits into chunks of a few tokens."""
    monkeypatch.setattr(linear, "LEAST_TOKENS", 1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what torch.empty and its like return with NaN, so that nothing is left unwritten by accident."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
