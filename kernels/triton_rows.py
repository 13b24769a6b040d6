"""What the Triton kernels share: loads of a row, its running maximum, the size of blocks, masks as they load them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_row(logits, row, row_stride, columns, column_stride, width, readable, padded: tl.constexpr):
    """Logits of a block in fp32, -inf from `width` on; nothing is read from `readable` on.

    The load is masked by `readable`, a multiple of 16 where rows allow it: only then are 16 bytes loaded at a time.
    `padded` says whether `readable` exceeds `width`; without, masking values would cost a tenth of the instructions.
    """
    z = tl.load(logits + row * row_stride + columns * column_stride, columns < readable, -float("inf")).to(tl.float32)
    if padded:
        z = tl.where(columns < width, z, -float("inf"))
    return z


@triton.jit
def advance(top, z, factor):
    """Return the running maximum with block z in it, the shift of what was summed, and z less that maximum.

    `factor` is log2(e) / temperature: shift and difference are powers of 2. They are taken before they are scaled, so
    that large logits lose no digits.
    """
    new_top = tl.maximum(top, tl.max(z, 0))
    shift = tl.where(top == -float("inf"), 0.0, (top - new_top) * factor)  # 0: nothing was summed yet
    relative = (z - tl.where(new_top == -float("inf"), 0.0, new_top)) * factor
    return new_top, tl.maximum(shift, -1e30), tl.maximum(relative, -1e30)  # e^-inf * -inf is 0, not NaN


def widths(width: int, *rows: torch.Tensor) -> tuple[int, int, bool]:
    """Return the last arguments of load_row, width, readable and padded, for tensors [n, >= width]."""
    readable = min(triton.cdiv(width, 16) * 16, *(tensor.size(1) for tensor in rows))
    return width, readable, readable != width


def block_size(width: int, largest: int) -> int:
    """Return the power of two that covers a row of `width` columns, between 16 and `largest`."""
    return min(largest, max(16, triton.next_power_of_2(width)))


def as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """View a boolean mask as int8, which kernels can load."""
    return None if mask is None else mask.contiguous().view(torch.int8)
