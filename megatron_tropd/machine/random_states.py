"""Stores the states of all random generators of a rank in a file of tensors, numbers and strings only."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_tropd.errors import UserError
from megatron_tropd.system.safe_pickles import load_plain


def save_random_states(path: str | Path) -> None:
    """Write the states of Python's, numpy's, torch's, CUDA's and Megatron's generators."""
    numpy_state = np.random.get_state(legacy=True)
    assert isinstance(numpy_state, tuple)  # a dictionary only of other generators
    name, keys, *rest = numpy_state
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    torch.save(states, path)


def load_random_states(path: str | Path) -> None:
    """Restore what `save_random_states` wrote, in this version or an earlier one.

    Raises:
        UserError: the file cannot be read, or holds more than plain data.
    """
    try:
        _set(load_plain(path))
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: the random states cannot be read as plain data ({' '.join(str(error).split())[:200]}), and "
            "reading them otherwise could run code. Give another training.seed: the run then goes on with new ones."
        ) from error


def _set(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.asarray(keys).astype(np.uint32), *rest))
    get_cuda_rng_tracker().set_states(states["tracker"])
    torch.cuda.set_rng_state(states["cuda"])
    torch.set_rng_state(states["torch"])
