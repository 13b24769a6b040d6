"""What every kernel needs to know of a vocabulary shard: its columns, its rows in bounded chunks, its collective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

# fp32 numbers of a chunk (1 MiB): stays in a core's L2 cache, and is the only [rows, V/tp] temporary a kernel holds.
CHUNK_ELEMENTS = 1 << 18


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

    def local_ids(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, for global ids, the column in this shard (0 where it is another's) and whether this shard owns it."""
        local = ids - self.start
        owned = (local >= 0) & (local < self.true_width)
        return torch.where(owned, local, 0), owned


def exp_(z: torch.Tensor) -> torch.Tensor:
    """Overwrite fp32 `z` with e^z, exactly 0 below e^-87: on CPU an exp with a subnormal result is ten times slower."""
    return F.threshold(z.clamp_(min=-87.0).exp_(), 1.7e-38, 0.0, inplace=True)


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


def row_chunks(rows: int, columns: int, mask: torch.Tensor | None) -> Iterator[slice | torch.Tensor]:
    """Yield the rows to compute, at most CHUNK_ELEMENTS numbers of `columns` each: slices, or indices with a mask [n].

    Listing the rows of a mask synchronises where the mask is on a GPU; the Triton kernels do without.
    """
    size = max(1, CHUNK_ELEMENTS // max(columns, 1))
    if mask is None:
        yield from (slice(start, min(start + size, rows)) for start in range(0, rows, size))
    else:
        yield from (chunk for chunk in mask.nonzero().squeeze(1).split(size) if chunk.numel())


class ChunkReader:
    """Copies chunks of a shard's true columns to fp32, all into one buffer, since fresh memory costs page faults."""

    def __init__(self, logits: torch.Tensor, shard: VocabShard, scale: float):
        """`logits` [n, V/tp]; `scale` = 1 / temperature is applied to what is read."""
        self.logits, self.scale = logits[:, : shard.true_width], scale
        self._buffer = logits.new_empty((0, shard.true_width), dtype=torch.float32)

    def __call__(self, chunk: slice | torch.Tensor) -> torch.Tensor:
        """Return [c, true width] fp32, which the caller may overwrite and the next call does."""
        part = self.logits[chunk]
        if self._buffer.size(0) < part.size(0):
            self._buffer = self._buffer.new_empty(part.shape)
        z = self._buffer[: part.size(0)].copy_(part)
        return z.mul_(self.scale) if self.scale != 1.0 else z


def rows_with_gradient(gradient: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the rows [n] that the mask keeps and whose gradient [n] or [n, j] is not all zero; None for all."""
    used = gradient.reshape(gradient.size(0), -1).ne(0).any(1)
    if mask is not None:
        used = used & mask
    return None if bool(used.all()) else used


def write_rows(out: torch.Tensor, chunk: slice | torch.Tensor, values: torch.Tensor) -> None:
    """Copy `values` [c, true width] into the rows of `chunk`; a slice takes them without a copy in out's dtype."""
    if isinstance(chunk, slice):
        out[chunk, : values.size(1)].copy_(values)
    else:
        out[chunk, : values.size(1)] = values.to(out.dtype)


def check_leading(mask: torch.Tensor | None, **tensors: torch.Tensor) -> None:
    """Raise ValueError unless all named tensors [..., c] and the mask [...] have the same leading dimensions."""
    shapes = {name.replace("_", " "): tuple(t.shape) for name, t in tensors.items()}
    leading = {shape[:-1] for shape in shapes.values()} | (set() if mask is None else {tuple(mask.shape)})
    if len(leading) > 1:
        named = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"{named} and mask {None if mask is None else tuple(mask.shape)} must share their leading dimensions"
        )


def zero_other_rows(out: torch.Tensor, mask: torch.Tensor | None, shard: VocabShard) -> None:
    """Zero what a backward pass leaves alone: rows that the mask [n] leaves out, and padding columns."""
    if mask is not None:
        out.masked_fill_(~mask.unsqueeze(1), 0.0)
    if shard.true_width < out.size(1):
        out[:, shard.true_width :].zero_()


def recut_shards(tensor: torch.Tensor, width: int, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """Move a sharded dimension to shards of `width`: for vocabularies that were padded differently.

    Rank r holds global columns [r w, (r + 1) w) of `tensor` and returns [r `width`, (r + 1) `width`), zeros beyond the
    end. One exchange; nearly everything stays where it is. Works for logits (dim=1) and output-layer weights (dim=0).

    Args:
        tensor: this rank's shard, two-dimensional.
        width: columns of the new shards.
        group: the ranks that share it.
        dim: the sharded dimension.
    """
    old, size, rank = tensor.size(dim), group.size(), group.rank()
    columns = tensor.transpose(0, dim)  # the sharded dimension first: blocks of it are contiguous

    def overlap(holder: int, wanter: int) -> tuple[int, int]:
        start = max(holder * old, wanter * width)
        return start, max(start, min((holder + 1) * old, (wanter + 1) * width))

    sent = [overlap(rank, other) for other in range(size)]
    received = [overlap(other, rank) for other in range(size)]
    out = columns.new_zeros((width, columns.size(1)))
    source = torch.cat([columns[a - rank * old : b - rank * old] for a, b in sent])
    taken = [b - a for a, b in received]
    target = out.new_empty((sum(taken), columns.size(1)))
    dist.all_to_all_single(target, source, taken, [b - a for a, b in sent], group=group)
    for (start, _), block in zip(received, target.split(taken), strict=True):
        if block.size(0):
            out[start - rank * width : start - rank * width + block.size(0)] = block
    return out.transpose(0, dim).contiguous()
