"""What every kernel needs to know of a vocabulary shard: its columns, its rows in bounded chunks, its collective."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

# fp32 numbers of a chunk (1 MiB): stays in a core's L2 cache, and is the only [rows, V/tp] temporary a kernel holds.
CHUNK_ELEMENTS = 1 << 18

_logged: set[str] = set()


@dataclass(frozen=True)
class VocabShard:
    """The columns [start, start + true_width) of the true vocabulary that a rank holds; the rest are padding."""

    start: int
    true_width: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, local_width: int, group: dist.ProcessGroup | None, vocab_size: int) -> VocabShard:
        """Describe this rank's shard of `local_width` columns.

        Raises:
            ValueError: the shards together hold fewer columns than the vocabulary.
        """
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        if local_width * size < vocab_size:
            raise ValueError(
                f"{size} shard(s) of {local_width} logits hold fewer than vocab_size={vocab_size} columns; pass the "
                "true vocabulary size and the process group over which the logits are sharded"
            )
        start = rank * local_width
        return cls(start, min(max(vocab_size - start, 0), local_width), group)

    @property
    def size(self) -> int:
        """Number of ranks that share the vocabulary."""
        return 1 if self.group is None else self.group.size()

    def all_gather(self, packed: torch.Tensor) -> torch.Tensor:
        """Gather `packed` [n, c] of every rank into [tp, n, c]; the only collective of a forward pass."""
        if self.size == 1:
            return packed.unsqueeze(0)
        gathered = packed.new_empty((self.size, *packed.shape))
        dist.all_gather_into_tensor(gathered.view(-1, packed.size(-1)), packed.contiguous(), group=self.group)
        return gathered


def as_rows(logits: torch.Tensor) -> torch.Tensor:
    """View `logits` [..., V/tp] as [n, V/tp].

    Raises:
        ValueError: the leading dimensions cannot be merged without a copy of the logits.
    """
    try:
        return logits.view(-1, logits.size(-1))
    except RuntimeError as error:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and strides {logits.stride()} cannot be viewed as rows without a "
            "copy; pass them as the output layer made them, e.g. [s, b, v/tp], and transpose ids instead"
        ) from error


def row_chunks(rows: torch.Tensor, columns: int) -> Iterator[torch.Tensor]:
    """Split row indices into chunks of at most CHUNK_ELEMENTS fp32 numbers of `columns` each."""
    yield from rows.split(max(1, CHUNK_ELEMENTS // max(columns, 1)))


def choose(operation: str, implementation: str, available: dict[str, object]) -> object:
    """Return the implementation by name (`auto`: chunked) and log the choice once.

    Raises:
        ValueError: there is no implementation of that name.
    """
    name = "chunked" if implementation == "auto" else implementation
    if name not in available:
        raise ValueError(f"{operation}: implementation {name!r} is none of auto, {', '.join(available)}")
    if operation not in _logged:
        _logged.add(operation)
        logger.info("%s: implementation %s", operation, name)
    return available[name]
