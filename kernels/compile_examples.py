"""Arguments with which every Triton kernel is compiled without a GPU: shapes, dtypes, masks and paddings, no memory.

How a kernel declares its cases: each `kernels/<folder>/triton.py` has a function

    def example_launches(example: Example) -> None: ...

that launches every kernel of the file, in every variant of its compile-time arguments, by the very functions that the
operation calls, on tensors of `example`. These are on PyTorch's `meta` device: they have a shape and a dtype, and no
data, so the function must not look at values. Nothing is run: `benchmarks/compilation.py` compiles what a launch on a
GPU would compile, alignment included. `tests/kernels/test_triton_compiles.py` fails for a kernel that no example
launches, and for one without 16-byte loads where rows are aligned, unless the file names it with the reason:

    NARROW_LOADS = {"_some_kernel": "reads a few ids per row"}
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from megatron_tropd.kernels.sharding import VocabShard

_ROWS = 64


@dataclass(frozen=True)
class Example:
    """One combination: rows of `columns` logits, of which the first `vocab` are no padding."""

    dtype: torch.dtype
    masked: bool
    vocab: int
    columns: int

    @property
    def aligned(self) -> bool:
        """Whether Triton can load rows 16 bytes at a time: it tells a row stride that 16 divides from others."""
        return self.columns % 16 == 0

    @property
    def dtype_name(self) -> str:
        """E.g. bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """E.g. `bfloat16, masked, 151669 of 151680`."""
        mask = "masked" if self.masked else "no mask"
        return f"{self.dtype_name}, {mask}, {self.vocab} of {self.columns}"

    @property
    def shard(self) -> VocabShard:
        """The whole vocabulary as the only shard."""
        return VocabShard(0, self.vocab, None)

    def logits(self) -> torch.Tensor:
        """Return [64, columns] of `dtype` without data."""
        return torch.empty(_ROWS, self.columns, dtype=self.dtype, device="meta")

    def mask(self) -> torch.Tensor | None:
        """Return [64] bool without data, or None."""
        return torch.empty(_ROWS, dtype=torch.bool, device="meta") if self.masked else None

    def per_row(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return [64, *shape] without data."""
        return torch.empty(_ROWS, *shape, dtype=dtype, device="meta")


def examples(brief: bool = False) -> list[Example]:
    """Return all combinations: both dtypes, with and without mask, a vocabulary that 16 divides and a padded one.

    One per dtype has rows without padding that 16 does not divide: it must compile, if only to narrow loads. `brief`
    leaves half of the combinations out, so that each pair of properties but not each triple is there.
    """
    dtypes = (torch.bfloat16, torch.float32)
    sizes = ((128256, 128256), (151669, 151680))
    padded = [Example(d, m, *size) for d, m, size in itertools.product(dtypes, (True, False), sizes)]
    if brief:
        half = [e for e in padded if (e.dtype == torch.bfloat16) ^ e.masked ^ (e.vocab == e.columns)]
        return [*half, Example(torch.bfloat16, False, 151669, 151669)]
    return [*padded, *(Example(dtype, False, 151669, 151669) for dtype in dtypes)]
