"""What the Triton kernels share: the running maximum of a row, the size of its blocks, masks as they load them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def advance(top, z):
    """Return the running maximum with block z in it, the shift of what was summed, and z less that maximum."""
    new_top = tl.maximum(top, tl.max(z, 0))
    shift = tl.where(top == -float("inf"), 0.0, top - new_top)  # 0: nothing was summed yet
    relative = tl.maximum(z - tl.where(new_top == -float("inf"), 0.0, new_top), -1e30)
    return new_top, shift, relative


def block_size(width: int, largest: int) -> int:
    """Return the power of two that covers a row of `width` columns, between 16 and `largest`."""
    return min(largest, max(16, triton.next_power_of_2(width)))


def as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """View a boolean mask as int8, which kernels can load."""
    return None if mask is None else mask.contiguous().view(torch.int8)
