"""One order of (value, id) pairs on every rank, and the merge of the shards' own top-k under it."""

from __future__ import annotations

import torch

_LOW = (1 << 32) - 1


def keys(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Pack fp32 values and ids into int64 that sort by value, then by lower id."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0 and 0 equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    return (ordered << 32) | (_LOW - ids)


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fp32 values and int64 ids of `keys`."""
    ordered = (packed >> 32).to(torch.int32)
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.view(torch.float32), _LOW - (packed & _LOW)


def merge(gathered: torch.Tensor, k: int, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the shards' parts [tp, n, 2 + 2k] into log-probs [n, k] fp32 and ids [n, k] int64.

    A part is: maximum, sum of e^(z - max), k largest z, their global ids (exact in fp32 below 2^24). Rows that the mask
    [n] leaves out give zeros.
    """
    tops, totals = gathered[..., 0], gathered[..., 1]
    top = tops.amax(0)
    rest = (totals * (tops - top).exp()).sum(0).log()
    values = gathered[..., 2 : 2 + k].transpose(0, 1).flatten(1)
    ids = gathered[..., 2 + k :].transpose(0, 1).flatten(1).to(torch.int64)
    best = keys(values, ids).topk(k, dim=1).values
    values, ids = unpack(best)
    logprobs = values.sub_(top[:, None]).sub_(rest[:, None])
    if mask is not None:
        logprobs, ids = logprobs.masked_fill_(~mask[:, None], 0.0), ids.masked_fill_(~mask[:, None], 0)
    return logprobs, ids
