"""Random numbers as a pure function of (seed, stream, step, sample id, position): no state, no layout, no device.

Every rank that evaluates the same arguments gets the same number, so the gate and the sampler agree under every
parallel layout and after a resume. The mixing is splitmix64's finalizer (Steele, Lea & Flood
2014), applied once per argument.
"""

from __future__ import annotations

import torch

STREAM_GATE = 1  # objective/trust_region.py
STREAM_SAMPLING = 2  # rollout/engine.py

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_UINT64 = (1 << 64) - 1


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Mix the bits of int64."""
    x = (x ^ _shift_right(x, 30)) * _to_int64(_MIX1)
    x = (x ^ _shift_right(x, 27)) * _to_int64(_MIX2)
    return x ^ _shift_right(x, 31)


def _mix_integer(x: int) -> int:
    """Do the same with a Python integer in [0, 2^64): on a GPU each operator of a tensor would be a kernel's launch."""
    x = (x ^ (x >> 30)) * _MIX1 & _UINT64
    x = (x ^ (x >> 27)) * _MIX2 & _UINT64
    return x ^ (x >> 31)


def _to_int64(value: int) -> int:
    """Wrap a Python integer to int64's range."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def counter_uniform(
    seed: int, stream: int, step: int, sample_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return uniforms in [0, 1), float64, of the broadcast shape of `sample_ids` and `positions` (integer tensors).

    `positions` are absolute places in the sequence (0 = first prompt token).
    """
    start = 0
    for part in (seed, stream, step):
        start = _mix_integer((start + part + _GOLDEN) & _UINT64)
    state = _mix(sample_ids.to(torch.int64) + _to_int64(start + _GOLDEN))
    state = _mix(state + positions.to(torch.int64) + _to_int64(_GOLDEN))
    return _shift_right(state, 11).to(torch.float64) * 2.0**-53
