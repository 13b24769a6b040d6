"""Treats different EOS ids of teacher and student as one EOS token, whose probability is the sum over all of them.

A base model ends with one token and the instructed teacher with another; read token by token, each would find the
other's ending improbable. Where the two sets are equal there is nothing to merge, and nothing is computed.

    end = EndOfText(student_ids | teacher_ids)
    logprobs = end.merge(gather(end.extend(ids)), ids)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

ABSENT = -1e4  # log-prob of a top-k place whose id has been merged into another: no mass, and no infinity


class EndOfText:
    """The ids that are one event; of fewer than two there is nothing to merge."""

    def __init__(self, ids: Iterable[int] = ()):
        """Take the ids of both models."""
        ids = sorted(set(ids))
        self.ids = ids if len(ids) > 1 else []
        self._on: dict[torch.device, torch.Tensor] = {}  # copied to a device once, not in every micro-batch

    def __bool__(self) -> bool:
        return bool(self.ids)

    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        """Append the event's ids to `ids` [..., j], so that `merge` finds their log-probs in the last columns."""
        if not self:
            return ids
        return torch.cat([ids, self._tensor(ids.device).expand(*ids.shape[:-1], -1)], dim=-1)

    def merge(self, logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return log-probs [..., j] at `ids`, those of the merged EOS event for its ids; differentiable.

        Args:
            logprobs: [..., j + e] at `extend(ids)`.
            ids: [..., j]: the sampled token, then perhaps a top-k, in which the event is counted once; ABSENT after.
        """
        if not self:
            return logprobs
        j = ids.size(-1)
        own, event = logprobs[..., :j], self.event(logprobs[..., j:])
        inside = self._inside(ids)
        sampled, topk = inside[..., :1], inside[..., 1:]
        repeated = torch.cat([torch.zeros_like(sampled), _repeated(topk)], dim=-1)
        return torch.where(repeated, ABSENT, torch.where(inside, event, own))

    def merge_topk(
        self, values: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a top-k [..., k] with the event once, at its own probability, and in order again.

        Args:
            values: [..., k] log-probs, most probable first.
            ids: [..., k]; an event whose ids are all below the k-th stays out.
            logprobs: [..., e] of the event's ids.
        """
        if not self:
            return values, ids
        inside = self._inside(ids)
        values = torch.where(inside, self.event(logprobs), values)
        values, order = torch.where(_repeated(inside), ABSENT, values).sort(dim=-1, descending=True, stable=True)
        return values, ids.gather(-1, order)

    @staticmethod
    def event(logprobs: torch.Tensor) -> torch.Tensor:
        """Return the event's log-prob [..., 1] from those of its ids [..., e]; -inf has no gradient rather than NaN."""
        possible = logprobs.amax(-1, keepdim=True) != -torch.inf
        return torch.where(possible, torch.where(possible, logprobs, 0.0).logsumexp(-1, keepdim=True), -torch.inf)

    def _inside(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.isin(ids, self._tensor(ids.device))

    def _tensor(self, device: torch.device) -> torch.Tensor:
        if device not in self._on:
            self._on[device] = torch.tensor(self.ids, dtype=torch.int64, device=device)
        return self._on[device]


def _repeated(inside: torch.Tensor) -> torch.Tensor:
    """Mark the event's further places in a top-k [..., k]."""
    return inside & (inside.cumsum(-1) > 1)
