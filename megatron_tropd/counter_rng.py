"""Random numbers as a pure function of (seed, stream, step, sample id, position): no state, no layout, no device.

Every rank that evaluates the same arguments gets the same number, so the gate and the sampler agree under every
parallel layout and after a resume. The mixing is splitmix64's finalizer (Steele, Lea & Flood
2014), applied once per argument.
"""

from __future__ import annotations

import torch

STREAM_GATE = 1  # trust_region.py
STREAM_SAMPLING = 2  # rollout.py

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def _to_int64(value: int) -> int:
    """Wrap a Python integer to int64's range."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def counter_uniform(
    seed: int, stream: int, step: int, sample_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return uniforms in [0, 1), float64, of the broadcast shape of `sample_ids` and `positions` (integer tensors).

    `positions` are absolute places in the sequence (0 = first prompt token).
    """
    state = torch.zeros((), dtype=torch.int64, device=sample_ids.device)
    for part in (seed, stream, step):
        state = _mix(state + _to_int64(part) + _GOLDEN)
    state = _mix(state + sample_ids.to(torch.int64) + _GOLDEN)
    state = _mix(state + positions.to(torch.int64) + _GOLDEN)
    return _shift_right(state, 11).to(torch.float64) * 2.0**-53
